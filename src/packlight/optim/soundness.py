"""What a damaged or foreign checkpoint shows before anything of it is used.

Numbers that are not finite, and second moments, scales or step counts below zero; states of parameters that no group
has; and parameters in another order, which their names tell.

torch.load does not look at checksums, so a file with a flipped bit is read without an error, and a NaN in a scale
makes its block's parameters NaN at the next step. Looking at every scale and every fp32 moment costs one pass over
the state's bytes; codes stand for finite numbers whatever they are, but for E4M3's NaN.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from packlight.optim.piece import local_of

_E4M3_NAN = 0x7F
# The last are bitsandbytes' first moment, and the values of its codes.
_SIGNED = ("exp_avg", "momentum_buffer", "state1", "qmap1")


def check_sound(state: Mapping[str, Any], what: str) -> None:
    """Raise where a state has a number that no step leaves.

    Args:
        state: compact or portable, also another library's; entries that are not tensors are not looked at.
        what: whose state it is, for the message.

    Raises:
        ValueError: a number is NaN or infinite, or a scale, a second moment or a step count is below zero.
    """
    for key, value in state.items():
        if isinstance(value, Mapping):
            check_sound(value, what)
        elif isinstance(value, Tensor) and type(local_of(value)) is Tensor and value.numel():
            _check_tensor(key, local_of(value), what)
    is_expanded = any(key.endswith("_power") for key in state)
    for key, value in state.items():
        if is_expanded and key.endswith("_codes") and bool(((local_of(value) & _E4M3_NAN) == _E4M3_NAN).any()):
            raise ValueError(f"{what} came with {key} that stand for NaN, finite numbers were wanted. {_HINT}")


def check_loaded(loaded: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a state dict is damaged, or has its parameters in another order.

    Args:
        loaded: an optimiser's state dict, with as many groups and parameters as the optimiser.
        groups: the optimiser's param groups.

    Raises:
        ValueError: as `check_sound`; or states belong to no parameter, or names are at other places than here.
    """
    saved = loaded["param_groups"]
    strangers = loaded["state"].keys() - set(chain.from_iterable(group["params"] for group in saved))
    if strangers:
        raise ValueError(f"states of {sorted(map(str, strangers))} came, which no param group lists. {_HINT}")
    theirs, ours = ([name for each in one for name in each.get("param_names", ())] for one in (saved, groups))
    places = {name: place for place, name in enumerate(ours)}
    moved = [name for place, name in enumerate(theirs) if places.get(name, place) != place]
    if moved and len(theirs) == len(ours):
        raise ValueError(
            f"parameter {moved[0]!r} came at place {theirs.index(moved[0])}, and is at {places[moved[0]]} here "
            f"({len(moved)} like it): states go by place. Build the optimiser with the parameters in the saved order."
        )
    for index, state in loaded["state"].items():
        check_sound(state or {}, f"the state of parameter {index}")


_HINT = "The checkpoint is damaged, or the run had diverged: take an earlier one."


def _check_tensor(key: str, tensor: Tensor, what: str) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (float(each) for each in torch.aminmax(tensor.detach()))
    if not (low > float("-inf") and high < float("inf")):  # NaN is neither
        raise ValueError(f"{what} came with {key} from {low} to {high}, finite numbers were wanted. {_HINT}")
    if low < 0 and key.rpartition(".")[2] not in _SIGNED:
        raise ValueError(f"{what} came with {key} down to {low}, no number below zero was wanted. {_HINT}")
