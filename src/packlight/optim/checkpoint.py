"""Checkpoints: states from and to other formats, torch's own optimisers and other libraries' ones.

Everything meets in the portable form, which is torch's: `step` and fp32 moments. A state that already has the wanted
format is copied as it is, so resuming changes no bit; any other is decoded and encoded again. Error bits beside a bf16
parameter are kept, 8 of 16 where there is room for no more; they start at zero where none came.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packlight.numerics.rounding import ERROR_DTYPES, LARGEST_ERROR_8BIT
from packlight.optim.flat import FRAGMENTS, Flat
from packlight.optim.layout import CUT_FORMATS, Layout, gathered_layout, layout_of
from packlight.optim.members import NUMBER
from packlight.optim.piece import is_dtensor, local_of
from packlight.optim.state import MOMENTS, MOMENTUM, State, error_dtype, step_device, step_tensor


@dataclass(frozen=True)
class Converter:
    """What one kind of optimiser saves and loads.

    Attributes:
        moments: the names of its moments.
        torch_options: what torch's param groups hold besides ours.
        read_state: turns a state of torch, torchao or bitsandbytes into the portable form.
        read_group: turns a param group of theirs into our options.
    """

    moments: tuple[str, ...]
    torch_options: Mapping[str, Any]
    read_state: Callable[..., dict[str, Tensor]]
    read_group: Callable[[Mapping[str, Any]], dict[str, Any]]

    def portable(self, state: State, lies: Layout | Flat, moments: tuple[str, ...]) -> State:
        """Return a compact state as torch's optimiser holds it, in fp32; its SGD counts no steps.

        Plain moments come on the CPU, DTensors where they are.
        """
        state = lies.to_portable(state, moments=moments, device="cpu")
        return {key: value for key, value in state.items() if key != "step" or self.moments == MOMENTS}

    def portable_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a param group as torch's optimiser saves it."""
        own = ("state_formats", NUMBER, "bf16_rounding", "seed")
        return {**self.torch_options, **{key: value for key, value in group.items() if key not in own}}

    def own_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a saved param group with our options only.

        Raises:
            ValueError: it is another kind of optimiser's, or has amsgrad.
        """
        options = self.read_group(group)
        return dict(group) if "state_formats" in group else {**options, "params": group["params"]}

    def compact(
        self,
        state: dict[str, Any],
        param: Tensor,
        lies: Layout | Flat,
        *,
        saved_format: str | None,
        group: dict[str, Any],
    ) -> State:
        """Return a saved state in our format; its tensors are new.

        Args:
            state: compact in `saved_format`, or another library's where that is None.
            param: its parameter.
            lies: how the state is to lie.
            saved_format: a format's name, or None.
            group: the parameter's group.

        Raises:
            ValueError: the state does not fit the parameter, or is another kind of optimiser's.
        """
        moments = self.moments if set(state) - {"step", "param_error"} else ()
        if isinstance(lies, Flat):
            return self._flat(state, param, lies)
        layout, device = lies, local_of(param).device
        if saved_format is None:
            # torch and bitsandbytes count no steps of SGD: it has had one at least.
            portable: dict[str, Any] = {"step": 1.0, **self.read_state(state, shape=param.shape)}
            compact: State = layout.from_portable(portable, moments=self.moments, device=device)
        else:
            if "step" not in state:
                raise ValueError(f"a state with {sorted(state)} came, one with a step count was wanted")
            saved = saved_layout(state, param, saved_format)
            saved.stored(state, moments=moments)
            if saved.has_tensors_of(layout) or not moments:
                compact = layout.copied_state(saved.bare(state) if saved.piece != layout.piece else state, device)
            else:
                portable = saved.to_portable(state, moments=moments)
                compact = layout.from_portable(portable, moments=moments, device=device)
        step = state.get("step", compact["step"])
        step = step if isinstance(step, Tensor) else step_tensor(step)
        compact["step"] = step.to(step_device(device), torch.float32, copy=True)
        return _with_error(compact, state.get("param_error"), param, layout, group["bf16_rounding"])

    def _flat(self, state: dict[str, Any], flat: Tensor, lies: Flat) -> State:
        """Return the state of a flat partition: as it was, if it was cut as now; else from torch's form beside it."""
        fragments = state.get(FRAGMENTS, {})
        if lies.is_complete(fragments, self.moments):
            return lies.copied_state(fragments, flat.device, moments=self.moments)
        theirs = {key: state[key] for key in ("step", *self.moments) if key in state}
        portable = {"step": 1.0, **self.read_state(theirs, shape=flat.shape)}
        return lies.from_portable(portable, moments=self.moments, device=flat.device)


def saved_layout(state: Mapping[str, Any], param: Tensor, saved_format: str) -> Layout:
    """Return the layout that a saved state has: a plain parameter's may have been cut, and put together to be saved.

    Args:
        state: compact.
        param: its parameter, of which only the shape is looked at, and whether it is a DTensor.
        saved_format: the name of the state's format.

    Raises:
        ValueError: no format has that name.
    """
    own = layout_of(param, saved_format)
    codes = [value for key, value in state.items() if key.endswith("_codes")]
    has_rows = any(each.dim() > 1 for each in codes)
    is_fp32 = not codes and saved_format in CUT_FORMATS and any(name in state for name in (*MOMENTS, *MOMENTUM))
    if is_dtensor(param) or not (has_rows or is_fp32):
        return own
    gathered = gathered_layout(tuple(param.shape), saved_format)
    return gathered if has_rows or gathered.state_format == "fp32" else own


def _with_error(compact: State, error: Any, param: Tensor, layout: Layout, rounding: str) -> State:
    compact.pop("param_error", None)
    if error_dtype(param.dtype, rounding) is not None:
        made = layout.init_state(param, moments=(), rounding=rounding)["param_error"]
        came = local_of(error).view(-1) if isinstance(error, Tensor) and error.dtype in ERROR_DTYPES.values() else None
        here = local_of(made).view(-1)
        if came is not None and came.numel() == here.numel():
            here.copy_(_as_error(came, here.dtype))
        compact["param_error"] = made
    return compact


def _as_error(error: Tensor, dtype: torch.dtype) -> Tensor:
    """Return error bits in the wanted number: 8 with zeros below, or the upper 8 of 16, as a step would round them."""
    if error.dtype == dtype:
        return error
    if dtype == torch.int16:
        return error.to(dtype) * 256
    return ((error.to(torch.int32) + 128) >> 8).clamp_(max=LARGEST_ERROR_8BIT).to(dtype)
