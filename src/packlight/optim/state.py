"""A quantised optimiser state: plain tensors in the optimiser's own state dict.

torch.optim.AdamW keeps `step`, `exp_avg` and `exp_avg_sq` per parameter, and its checkpoints hold nothing
else. A tensor subclass that hides codes and scales behind those names does not load with weights_only=True,
and breaks wherever an operation is missing. So a compact state is plain tensors under names of their own, and
there are two forms of it:

    compact   step, then for each moment its tensors as `MomentFormat.tensors` lists them: exp_avg_codes,
              exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale, exp_avg_sq_rows, exp_avg_sq_cols; under fp32
              exp_avg and exp_avg_sq themselves; param_error where a bf16 parameter has error bits
    portable  step, exp_avg, exp_avg_sq in fp32: what torch.optim.AdamW resumes from

SGD's states have one moment, momentum_buffer. Scales and small tensors do not depend on the parameter's dtype.
The byte formula is the formats' (`MomentFormat.nbytes`), and the same record allocates.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 3, appendix D.1.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight.numerics import AdamWSettings, Moment, MomentFormat, decode, encode, moment_formats, zero_moment
from packlight.numerics.rounding import ERROR_DTYPES
from packlight.optim.piece import local_of

State = dict[str, Tensor]

STEP_BYTES = 4
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")
# torch.optim.SGD's only moment.
MOMENTUM = ("momentum_buffer",)


def state_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    state_format: str,
    *,
    moments: Sequence[str] = MOMENTS,
    rounding: str = "nearest",
) -> int:
    """Return the bytes that a parameter's state takes.

    4 for `step`, and for n > 4096 elements per moment (4bit: B = ceil(n / 128) blocks, C = 64 floor(n / 128) +
    min(64, n mod 128) bytes of codes):
    fp32: 4 n. 4bit: C + 4 B; the second moment with row and column scales: C + 4 B + 8 (rows + columns).
    8bit: n + 2 ceil(n / 32). fp8: n + 5 B. paper4bit: C + 4 B; the second moment, rank-1: C + 4 sum(shape).

    Args:
        shape: the logical parameter's shape; n is its number of elements.
        dtype: the parameter's dtype.
        state_format: a format's name.
        moments: the moments' names.
        rounding: how the parameter is rounded: a bf16 one has n or 2 n bytes of error bits under "master24" and
            "master32".

    Returns:
        The bytes of all the state's tensors together.

    Raises:
        ValueError: no such format, or a dtype that the formats do not take.
    """
    check_dtype(dtype)
    formats = moment_formats(state_format, tuple(shape))[: len(moments)]
    error = error_dtype(dtype, rounding)
    error_bytes = 0 if error is None else math.prod(shape) * error.itemsize
    return STEP_BYTES + sum(moment.nbytes(shape) for moment in formats) + error_bytes


def init_state(
    param: Tensor,
    state_format: str,
    *,
    moments: Sequence[str] = MOMENTS,
    rounding: str = "nearest",
    device: torch.device | None = None,
) -> State:
    """Return the compact state of a parameter that has not had a step.

    Args:
        param: fp32, bf16 or fp16, any shape: the parameter.
        state_format: a format's name.
        moments: the moments' names.
        rounding: how the parameter is rounded.
        device: where the state is wanted; None: the parameter's.

    Returns:
        The state: it decodes to zeros; on the device, but `step` on the CPU for a device without kernels.

    Raises:
        ValueError: no such format, or a dtype that the formats do not take.
    """
    check_dtype(param.dtype)
    device = device or param.device
    formats = moment_formats(state_format, tuple(param.shape))[: len(moments)]
    state = {"step": torch.zeros((), dtype=torch.float32, device=step_device(device))}
    for name, moment_format in zip(moments, formats, strict=True):
        state |= _named(name, zero_moment(param.shape, moment_format, device=device))
    error = error_dtype(param.dtype, rounding)
    if error is not None:
        state["param_error"] = torch.zeros(param.numel(), dtype=error, device=device)
    return state


@functools.cache
def state_keys(state_format: str, shape: tuple[int, ...], moments: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of a state's moments, in the order of the kernels.

    Args:
        state_format: a format's name.
        shape: the parameter's shape.
        moments: the moments' names.
    """
    formats = zip(moments, moment_formats(state_format, shape) if moments else (), strict=False)
    return tuple(moment_key(name, suffix) for name, each in formats for suffix in each.tensors(shape))


def stored_moments(
    state: Mapping[str, Tensor], shape: Sequence[int], state_format: str, *, moments: Sequence[str] = MOMENTS
) -> tuple[Moment, ...]:
    """Return the moments of a compact state; they share its tensors.

    Args:
        state: a compact state.
        shape: the parameter's shape.
        state_format: the name of the format that the state has.
        moments: the moments' names.

    Returns:
        One for each name.

    Raises:
        ValueError: the state lacks a tensor of that format, or one has another shape or dtype.
    """
    formats = moment_formats(state_format, tuple(shape))
    return tuple(_moment(state, name, each, shape) for name, each in zip(moments, formats, strict=False))


def to_portable(
    state: Mapping[str, Tensor],
    *,
    shape: Sequence[int],
    state_format: str,
    moments: Sequence[str] = MOMENTS,
    device: torch.device | str | None = None,
) -> State:
    """Return a compact state as torch's optimiser would hold it.

    Args:
        state: a compact state.
        shape: the parameter's shape.
        state_format: the name of the format that the state has.
        moments: the moments' names.
        device: where the moments are wanted; None: where they are.

    Returns:
        step (fp32, 0-dim, CPU) and the moments (fp32, the parameter's shape); all of them new tensors.
    """
    stored = stored_moments(state, shape, state_format, moments=moments)
    values = (decode(moment, device=device) for moment in stored)
    return {"step": step_tensor(state["step"]), **dict(zip(moments, values, strict=True))}


def from_portable(
    portable: Mapping[str, Any],
    *,
    state_format: str,
    moments: Sequence[str] = MOMENTS,
    device: torch.device | str | None = None,
) -> State:
    """Return the compact form of a state that torch's optimiser holds.

    Args:
        portable: step (a number or a 0-dim tensor) and the moments (floating point, the parameter's shape).
        state_format: the name of the format that is wanted.
        moments: the moments' names.
        device: where the compact state is wanted; None: where the moments are.

    Returns:
        The compact state; all of its tensors are new.

    Raises:
        ValueError: the state is another optimiser's, or has amsgrad's third moment.
    """
    check_portable(portable, moments)
    formats = moment_formats(state_format, tuple(portable[moments[0]].shape)) if moments else ()
    state = {"step": step_tensor(portable["step"])}
    for name, moment_format in zip(moments, formats, strict=False):
        state |= _named(name, encode(portable[name], moment_format, device=device))
    return state


def check_portable(portable: Mapping[str, Any], moments: Sequence[str]) -> None:
    """Raise where a state is not one that torch's optimiser holds.

    Raises:
        ValueError: it is another optimiser's, or has amsgrad's third moment.
    """
    if set(portable) != {"step", *moments}:
        raise ValueError(
            f"a state with {sorted(portable)} came, one with {sorted(['step', *moments])} was wanted. "
            "Use the state of the same kind of optimiser, without amsgrad."
        )


def step_tensor(step: Any) -> Tensor:
    """Return a step count as torch's optimisers hold it: fp32, 0-dim, on the CPU."""
    return torch.tensor(float(step), dtype=torch.float32, device="cpu")  # also under torch.set_default_device


def step_device(device: torch.device) -> torch.device:
    """Return where `step` is kept beside a state on a device: on a GPU too, so that no step waits for it."""
    return device if device.type == "cuda" else torch.device("cpu")


def error_dtype(dtype: torch.dtype, rounding: str) -> torch.dtype | None:
    """Return the dtype of the error bits beside a parameter, None where it has none."""
    return ERROR_DTYPES.get(rounding) if dtype == torch.bfloat16 else None


def group_settings(group: Mapping[str, Any]) -> AdamWSettings:
    """Return the hyper-parameters that a param group of AdamW or Adam holds.

    Args:
        group: the param group; without `decoupled_weight_decay` it is AdamW's.

    Returns:
        The hyper-parameters as floats, the learning rate as `host_lr` has it.
    """
    beta1, beta2 = group["betas"]
    return AdamWSettings(
        lr=host_lr(group),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
        decoupled=bool(group.get("decoupled_weight_decay", True)),
    )


def host_lr(group: Mapping[str, Any]) -> float:
    """Return a group's learning rate; 0 for one on a GPU, which kernels read there: reading it here would wait."""
    lr = group["lr"]
    return 0.0 if isinstance(lr, Tensor) and lr.device.type == "cuda" else float(lr)


def check_range(name: str, value: float | Tensor, *, low: float, below: float = float("inf")) -> None:
    """Raise where a number is out of its range; a tensor on a GPU is not looked at.

    Raises:
        ValueError: it is.
    """
    if isinstance(value, Tensor) and value.device.type == "cuda":
        return
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} of shape {tuple(value.shape)} came, a number or a tensor of one element was wanted")
    if not low <= float(value) < below:
        raise ValueError(f"{name}={float(value)} came, a number from {low} up to below {below} was wanted")


def check_dtype(dtype: torch.dtype) -> None:
    """Raise where the formats do not take parameters of that dtype.

    Raises:
        ValueError: a complex, 64-bit or integer dtype.
    """
    if dtype not in PARAMETER_DTYPES:
        raise ValueError(
            f"a parameter of {dtype} came, one of {', '.join(map(str, PARAMETER_DTYPES))} was wanted. "
            "Leave it to torch.optim.AdamW."
        )


def check_unmade(state: State, param: Tensor, moments: Sequence[str], *, state_format: str) -> None:
    """Raise where a state that is to be made anew is there already, in another format.

    An SGD's momentum may be switched on later, so a state may lack moments.

    Args:
        state: what is there.
        param: whose it is.
        moments: the names of the moments that it is to have.
        state_format: the format that it is to have.

    Raises:
        ValueError: it has all moments.
    """
    if state and all(any(_belongs(key, name) for key in state) for name in moments):
        raise ValueError(
            f"a state with {', '.join(state)} came for a parameter of shape {tuple(param.shape)}, which format "
            f"{state_format!r} does not have. Remove the parameter's state after changing its shape, and leave states "
            "to load_state_dict."
        )


def _belongs(key: str, name: str) -> bool:
    """Tell whether a state's key is a moment's: exp_avg_codes is exp_avg's, exp_avg_sq_codes is not."""
    return key == name or (key.startswith(f"{name}_") and not key.startswith(f"{name}_sq"))


def nbytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors of a state.

    Args:
        state: compact or portable.

    Returns:
        The bytes; of a DTensor those that are here.
    """
    return sum(local_of(value).nbytes for value in state.values() if isinstance(value, Tensor))


def _named(name: str, moment: Moment) -> State:
    return {moment_key(name, suffix): tensor for suffix, tensor in moment.tensors.items()}


def moment_key(name: str, suffix: str) -> str:
    """Return a state's key of one of a moment's tensors."""
    return f"{name}_{suffix}" if suffix else name


def _moment(state: Mapping[str, Tensor], name: str, moment_format: MomentFormat, shape: Sequence[int]) -> Moment:
    wanted = {moment_key(name, suffix): each for suffix, each in moment_format.tensors(shape).items()}
    found = {key: (tuple(state[key].shape), state[key].dtype) for key in wanted if key in state}
    if found != wanted:
        wrong = {key: found.get(key, "nothing") for key in wanted if found.get(key) != wanted[key]}
        raise ValueError(
            f"a state for shape {tuple(shape)} came with {wrong}, "
            f"{ {key: wanted[key] for key in wrong} } was wanted; it has {sorted(state)}. "
            "Load a portable state_dict, or name the format that the state was saved in."
        )
    return Moment(
        moment_format,
        tuple(shape),
        {suffix: state[moment_key(name, suffix)] for suffix in moment_format.tensors(shape)},
    )
