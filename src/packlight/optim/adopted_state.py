"""The compact state of an adopted parameter, and what a checkpoint or a plain optimiser sees in its place.

A state dict, a deep copy and a pickle of an optimiser must be such as torch's own code reads. So a compact state knows
how to become exp_avg, exp_avg_sq and step again, and does so wherever somebody else takes hold of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packlight.optim.flat import Flat
from packlight.optim.hosted import ON_HOST
from packlight.optim.layout import Layout
from packlight.optim.state import MOMENTS, State


class CompactState(dict[str, Tensor]):
    """A managed parameter's state; copies and pickles of it are plain dicts in torch's own form.

    Attributes:
        layout: how the state lies.
        device: the parameter's; the state may be in host memory.
    """

    def __init__(self, state: State, param: Tensor, layout: Layout | Flat) -> None:
        super().__init__(state)
        self.layout, self.device = layout, param.device

    def told_format(self) -> str:
        """Return the format's name, with "@host" behind it where the state is in host memory."""
        is_on_host = any(key != "step" and value.device != self.device for key, value in self.items())
        return self.layout.parts[0].state_format + ON_HOST * is_on_host

    def portable(self, device: torch.device | str | None = None) -> State:
        """Return step, exp_avg and exp_avg_sq, the moments in fp32 on `device` (None: the parameter's)."""
        return self.layout.to_portable(self, device=device or self.device)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[State]]:
        """Copy and pickle as a plain dict that torch's own step understands."""
        return dict, (self.portable(),)


def moments_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state in portable form, whoever made it."""
    return state.portable() if isinstance(state, CompactState) else state


def own_state(state: CompactState, param: Tensor, group: Mapping[str, Any]) -> State:
    """Return a state in torch's form: moments in the parameter's dtype, beside it, and `step` too if fused."""
    where = next(value.device for key, value in state.items() if key != "step")  # decoded and rounded there
    portable = state.portable(where).items()
    own = {key: value.to(param.dtype).to(param.device) if key in MOMENTS else value for key, value in portable}
    own["step"] = own["step"].to(param.device if group.get("fused") else "cpu")
    return own


@contextmanager
def without_compact(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Let optimisers have no compact states meanwhile: a copy that is only looked at would decode them all."""
    originals = [(each, each.state) for each in optimizers]
    for optimizer, states in originals:
        others = {param: state for param, state in states.items() if not isinstance(state, CompactState)}
        optimizer.state = defaultdict(dict, others)
    try:
        yield
    finally:
        for optimizer, states in originals:
            optimizer.state = states


def show_portable(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace compact states by fp32 ones on the CPU, so that saving takes no device memory."""
    states = state_dict["state"].items()
    shown = {key: state.portable("cpu") if isinstance(state, CompactState) else state for key, state in states}
    return {**state_dict, "state": shown}
