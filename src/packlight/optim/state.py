"""A quantised optimiser state: plain tensors in the optimiser's own state dict.

torch.optim.AdamW keeps `step`, `exp_avg` and `exp_avg_sq` per parameter, and its checkpoints hold nothing
else. A tensor subclass that hides codes and scales behind those names does not load with weights_only=True,
and breaks wherever an operation is missing. So a compact state is plain tensors under names of their own, and
there are two forms of it:

    compact   step, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale (blocks) or
              exp_avg_sq_scale_0, _1, ... (rank-1, one per axis); under fp32 step, exp_avg, exp_avg_sq
    portable  step, exp_avg, exp_avg_sq in fp32: what torch.optim.AdamW resumes from

Scales and small tensors are fp32 whatever the parameter's dtype is. The byte formula stands here, beside the
allocation.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 3, appendix D.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight.numerics import (
    AdamWSettings,
    Moment,
    MomentFormat,
    adamw_step,
    decode,
    encode,
    moment_formats,
    zero_moment,
)

State = dict[str, Tensor]

STEP_BYTES = 4
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")


def state_bytes(shape: Sequence[int], dtype: torch.dtype, state_format: str) -> int:
    """Return the bytes that a parameter's state takes.

    fp32: 4 + 8 n. paper4bit, n > 4096: 4 + 2 ceil(n / 2) + 4 ceil(n / 128) + 4 s, with s = sum(shape) rank-1
        scales, or
    ceil(n / 128) where rank-1 scales do not apply. The 4 bytes are `step`, a 0-dim tensor on the CPU.

    Args:
        shape: the logical parameter's shape; n is its number of elements.
        dtype: the parameter's dtype; the bytes do not depend on it.
        state_format: a format's name.

    Returns:
        The bytes of all the state's tensors together.

    Raises:
        ValueError: no such format, or a dtype that the formats do not take.
    """
    check_dtype(dtype)
    formats = moment_formats(state_format, tuple(shape))
    return STEP_BYTES + sum(moment.code_bytes(shape) + moment.scale_bytes(shape) for moment in formats)


def init_state(param: Tensor, state_format: str) -> State:
    """Return the compact state of a parameter that has not had a step.

    Args:
        param: fp32, bf16 or fp16, any shape: the parameter.
        state_format: a format's name.

    Returns:
        The state: zeros, on the parameter's device; `step` is on the CPU.

    Raises:
        ValueError: no such format, or a dtype that the formats do not take.
    """
    check_dtype(param.dtype)
    formats = moment_formats(state_format, tuple(param.shape))
    return _pack(
        torch.zeros((), dtype=torch.float32),
        [zero_moment(param.shape, f, device=param.device) for f in formats],
    )


def stored_moments(state: Mapping[str, Tensor], shape: Sequence[int], state_format: str) -> tuple[Moment, Moment]:
    """Return the two moments of a compact state; they share its tensors.

    Args:
        state: a compact state.
        shape: the parameter's shape.
        state_format: the name of the format that the state has.

    Returns:
        exp_avg and exp_avg_sq.

    Raises:
        ValueError: the state lacks a tensor of that format.
    """
    keys = [_keys(name, moment, shape) for name, moment in _formats(state_format, shape)]
    missing = [key for names in keys for key in names if key not in state]
    if missing:
        raise ValueError(
            f"a state of format {state_format!r} for shape {tuple(shape)} was expected to have {missing}, "
            f"but it has {sorted(state)}. Load a portable state_dict, or name the format it was saved in."
        )
    first, second = (
        Moment(moment, tuple(shape), state[names[0]], tuple(state[key] for key in names[1:]))
        for (_, moment), names in zip(_formats(state_format, shape), keys, strict=True)
    )
    return first, second


def to_portable(
    state: Mapping[str, Tensor],
    *,
    shape: Sequence[int],
    state_format: str,
    device: torch.device | str | None = None,
) -> State:
    """Return a compact state as torch.optim.AdamW would hold it.

    Args:
        state: a compact state.
        shape: the parameter's shape.
        state_format: the name of the format that the state has.
        device: where the moments are wanted; None: where they are.

    Returns:
        step (fp32, 0-dim, CPU), exp_avg and exp_avg_sq (fp32, the parameter's shape); all of them new
        tensors.
    """
    values = (decode(moment, device=device) for moment in stored_moments(state, shape, state_format))
    return {"step": _step_tensor(state["step"]), **dict(zip(MOMENTS, values, strict=True))}


def from_portable(portable: Mapping[str, Any], *, state_format: str, device: torch.device | str | None = None) -> State:
    """Return the compact form of a state that torch.optim.AdamW holds.

    Args:
        portable: step (a number or a 0-dim tensor), exp_avg and exp_avg_sq (floating point, the parameter's
            shape).
        state_format: the name of the format that is wanted.
        device: where the compact state is wanted; None: where the moments are.

    Returns:
        The compact state; all of its tensors are new.

    Raises:
        ValueError: the state is not AdamW's, or has amsgrad's third moment.
    """
    if set(portable) != {"step", *MOMENTS}:
        raise ValueError(
            f"a state with {sorted(portable)} came, one with ['exp_avg', 'exp_avg_sq', 'step'] was wanted. "
            "Use the state of an AdamW or Adam without amsgrad."
        )
    formats = moment_formats(state_format, tuple(portable["exp_avg"].shape))
    moments = [encode(portable[name], f, device=device) for name, f in zip(MOMENTS, formats, strict=True)]
    return _pack(_step_tensor(portable["step"]), moments)


def update(param: Tensor, grad: Tensor, state: State, *, state_format: str, settings: AdamWSettings) -> None:
    """Do one AdamW step on a parameter and its compact state, in place.

    Args:
        param: fp32, bf16 or fp16, any shape: the parameter.
        grad: floating point, the same shape: its gradient.
        state: its compact state.
        state_format: the name of the format that the state has.
        settings: the hyper-parameters.

    Raises:
        ValueError: the gradient is sparse.
    """
    if grad.layout != torch.strided:
        raise ValueError(
            f"a gradient of layout {grad.layout} came, a dense one was wanted. "
            "Build the embedding with sparse=False, or give its parameter to torch.optim.SparseAdam."
        )
    exp_avg, exp_avg_sq = stored_moments(state, param.shape, state_format)
    state["step"] += 1
    step = float(state["step"])
    adamw_step(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, settings=settings)


def group_settings(group: Mapping[str, Any], *, grad_scale: float = 1.0) -> AdamWSettings:
    """Return the hyper-parameters that a param group of AdamW or Adam holds.

    Args:
        group: the param group; without `decoupled_weight_decay` it is AdamW's.
        grad_scale: what gradients have to be divided by.

    Returns:
        The hyper-parameters as floats.
    """
    beta1, beta2 = group["betas"]
    return AdamWSettings(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
        decoupled=bool(group.get("decoupled_weight_decay", True)),
        grad_scale=grad_scale,
    )


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


def nbytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors of a state.

    Args:
        state: compact or portable.

    Returns:
        The bytes.
    """
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def _formats(state_format: str, shape: Sequence[int]) -> list[tuple[str, MomentFormat]]:
    return list(zip(MOMENTS, moment_formats(state_format, tuple(shape)), strict=True))


def _keys(name: str, moment: MomentFormat, shape: Sequence[int]) -> list[str]:
    if moment.book is None:
        return [name]
    if moment.scale == "block":
        return [f"{name}_codes", f"{name}_scale"]
    return [f"{name}_codes", *(f"{name}_scale_{axis}" for axis in range(len(shape)))]


def _pack(step: Tensor, moments: Sequence[Moment]) -> State:
    state = {"step": step}
    for name, moment in zip(MOMENTS, moments, strict=True):
        state.update(zip(_keys(name, moment.format, moment.shape), (moment.codes, *moment.scales), strict=True))
    return state


def _step_tensor(step: Any) -> Tensor:
    return torch.tensor(float(step), dtype=torch.float32)
