"""The buffers of a recomputed block: its second run starts from the values of the first, and changes nothing.

Running statistics of batch norm are written in forward, so a block that runs twice would move them twice, and a
second run would start from other values than the first. `torch.utils.checkpoint` restores torch's random state and
autocast only. Here buffers, parameters that stood in place (`torch.func.functional_call`), tensors in plain attributes
(`attributes.py`) and the states of Python's and numpy's generators are put back for the second run, and the present
ones after it.
"""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from packlight.activations.attributes import Attributes, Change, take_back

MAX_COPIED_ELEMENTS = 2**16
"""Buffers up to this size are copied at every call of a recomputed block."""

_state = threading.local()
_Slot = tuple[dict[str, torch.Tensor | None], tuple[int, str], torch.Tensor]


def is_recomputing() -> bool:
    """Tell whether this thread is running a block's forward for the second time."""
    return getattr(_state, "depth", 0) > 0


def drawn_state() -> tuple[Any, ...]:
    """Return the state of the random generators that are not torch's: Python's own, and numpy's where it is loaded."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy else None


def set_drawn_state(state: tuple[Any, ...]) -> None:
    """Put those generators into a state that `drawn_state` returned."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


class Buffers:
    """The buffers of a block, so that its second run starts from the values of the first and changes nothing.

    A change cannot be told from a buffer's version: batch norm's kernels write running statistics without raising
    it. So small buffers are always copied; a large one (a mask, a table) is compared by value at the first call.

    ```
    1 first run    note each buffer's tensor and version; copy the small ones and those known to change
    2 after it     at the first call, compare the large ones; later, a version that rose for the first time is an error
    3 second run   the noted values are put in place, on copies
    4 after it     the present tensors are put back
    ```
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._changing: set[tuple[int, str]] | None = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of the first and of the second run, for `checkpoint`."""
        noted: dict[tuple[int, str], torch.Tensor] = {}
        return self._first_run(noted), _SecondRun(self, noted, drawn_state())

    def slots(self) -> Iterator[_Slot]:
        """Yield every buffer with the dictionary that it stands in and a key of its own."""
        owners = (owner for module in self._modules for owner in module.modules())
        for position, owner in enumerate(owners):
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    yield owner._buffers, (position, name), buffer

    def parameters(self) -> list[Any]:
        """Return every parameter likewise; `torch.func.functional_call` puts others in place for one call.

        A unit of `fully_shard` puts gathered ones in the place of its DTensors by itself, before the second run too.
        """
        owners = (owner for module in self._modules for owner in module.modules())
        return [
            (owner._parameters, (position, name), parameter)
            for position, owner in enumerate(owners)
            for name, parameter in owner._parameters.items()
            if parameter is not None and not _is_sharded_by_unit(owner)
        ]

    def attributes(self) -> Attributes:
        """Return what tensors the modules hold in plain attributes."""
        return Attributes(owner for module in self._modules for owner in module.modules())

    @contextmanager
    def _first_run(self, noted: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
        before = {key: (buffer, buffer._version) for _, key, buffer in self.slots()}  # step 1
        with torch.no_grad():
            for key, (buffer, _) in before.items():
                if self._changing is None or key in self._changing or buffer.numel() <= MAX_COPIED_ELEMENTS:
                    noted[key] = buffer.clone()
        yield
        if self._changing is None:  # step 2
            self._changing = {key for _, key, buffer in self.slots() if key in noted and _differs(buffer, noted[key])}
            versions = {key: version for key, (_, version) in before.items()}
            self._changing |= {key for _, key, buffer in self.slots() if buffer._version > versions.get(key, 0)}
        for _, key, buffer in self.slots():
            tensor, version = before.get(key, (buffer, buffer._version))
            if key not in noted and (buffer is not tensor or buffer._version != version):
                raise RuntimeError(
                    f"buffer {key[1]!r} of {buffer.numel()} elements changed in forward for the first time, after "
                    "earlier calls had left it alone; its block cannot be recomputed, so keep that block"
                )
        for key in [key for key in noted if key not in self._changing]:
            if noted[key].numel() > MAX_COPIED_ELEMENTS:
                del noted[key]

    def swap_in(self, noted: dict[tuple[int, str], torch.Tensor]) -> list[_Slot]:
        """Put copies of the noted values in place (step 3), and return what stood there."""
        present = [slot for slot in self.slots() if slot[1] in noted]
        with torch.no_grad():
            for owner, key, _ in present:
                owner[key[1]] = noted[key].clone()
        return present


def _is_sharded_by_unit(owner: nn.Module) -> bool:
    """Tell whether `fully_shard` manages a module's parameters."""
    return bool(getattr(owner, "_is_fsdp_managed_module", False))


def _differs(buffer: torch.Tensor, before: torch.Tensor) -> bool:
    """Tell whether a large buffer has another value than before; small ones need no answer, fake ones have no value."""
    if buffer.numel() <= MAX_COPIED_ELEMENTS or isinstance(buffer, FakeTensor):
        return False
    return buffer.shape != before.shape or not torch.equal(buffer, before)


class _SecondRun:
    """The context of a second run; it can be entered once for each backward through the block."""

    def __init__(self, buffers: Buffers, noted: dict[tuple[int, str], torch.Tensor], drawn: tuple[Any, ...]) -> None:
        self._buffers, self._noted, self._drawn = buffers, noted, drawn
        self._parameters, self._attributes = buffers.parameters(), buffers.attributes()
        self._present: list[tuple[list[_Slot], list[Change], tuple[Any, ...]]] = []

    def __enter__(self) -> None:
        self._attributes.check()
        present = [(at, key, at[key[1]]) for at, key, noted in self._parameters if at[key[1]] is not noted]
        for owner, key, parameter in self._parameters:
            owner[key[1]] = parameter
        slots = [*self._buffers.swap_in(self._noted), *present]
        self._present.append((slots, self._attributes.put_back(), drawn_state()))
        set_drawn_state(self._drawn)  # torch's own is checkpoint's care
        _state.depth = getattr(_state, "depth", 0) + 1

    def __exit__(self, *exc_info: object) -> None:
        _state.depth -= 1
        slots, changes, drawn = self._present.pop()
        set_drawn_state(drawn)
        take_back(changes)
        for owner, key, buffer in slots:  # step 4
            owner[key[1]] = buffer
