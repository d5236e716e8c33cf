"""States in host memory: a parameter of a GPU is updated by the CPU's kernels, where its state is.

To bring a state to the GPU and back for each step takes 16 bytes an element over the link with fp32 moments. The
gradient and the parameter are smaller than that, and the CPU has kernels: so the state stays, and these travel. Two
slots of pinned memory are enough to keep the link and the kernels busy at once:

    side stream   1 out   1 out   .        3 back  1 out   3 back  1 out ...
    CPU           .       2 step  .        2 step  .       2 step        ...
    compute                                                              ... 4 waits for the last way back

One stream does both ways (`activations/copies.py`), so what comes into a slot stands behind what leaves it. A parameter
travels whole, and a slot is as large as the largest one and its gradient. The CPU's kernels give the bits of the GPU's;
fp32 moments, which torch's own step has on the GPU, get those of packlight's kernel.

Source: Ren et al., "ZeRO-Offload: Democratizing Billion-Scale Model Training", USENIX ATC 2021 (arXiv 2101.06840),
section 3 (what stays where) and 5.1 (the CPU's step beside the copies).
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight.activations.copies import Copier, Copy, make_copier
from packlight.activations.extents import round_up
from packlight.activations.pages import PAGE_BYTES, Pages
from packlight.optim.state import group_settings
from packlight.optim.stepping import Entry, Scalars, run

ON_HOST = "@host"
"""What follows a format's name where the states are in host memory."""

NUM_SLOTS = 2
ALIGNMENT = 64
"""Of a gradient and a parameter in a slot, in bytes: a line of the processor's cache."""


def placed(state_format: str) -> tuple[str, bool]:
    """Take a state format's name apart.

    Args:
        state_format: "4bit" or "4bit@host".

    Returns:
        The format's own name, and whether the states are in host memory.

    >>> placed("4bit@host")
    ('4bit', True)
    """
    return state_format.removesuffix(ON_HOST), state_format.endswith(ON_HOST)


def staging_bytes(params: Iterable[Tensor]) -> int:
    """Return the host memory through which parameters and their gradients pass.

    Args:
        params: all that have their states on the host, of one device.

    Returns:
        The bytes of the slots, in whole pages.
    """
    sizes = [_slot_bytes(param, param) for param in params]
    return min(NUM_SLOTS, len(sizes)) * max(sizes, default=0)


class HostStep:
    """Updates parameters whose states are in host memory.

    Attributes:
        params: all of them.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = frozenset(params)
        self._couriers: dict[torch.device, Courier] = {}

    @property
    def num_bytes(self) -> int:
        """Host memory that is held for copies; none before the first update."""
        return sum(courier.num_bytes for courier in self._couriers.values())

    def run(self, entries: Sequence[Entry], group: Mapping[str, Any], scalars: Scalars) -> None:
        """Do one step on parameters of one group; compute that is queued afterwards finds them updated.

        Args:
            entries: the parameters, each once; their states are on the CPU.
            group: their param group.
            scalars: what scales or forbids the step; read here, so this waits for the device.

        Raises:
            OffloadError: the host has no memory for the slots; then nothing has changed.
        """
        if not entries:
            return
        found_inf, coefficient = scalars.found_inf, scalars.coefficient
        if found_inf is not None and float(found_inf) != 0:
            return
        here = Scalars(None if coefficient is None else float(coefficient))
        settings = replace(group_settings(group), lr=float(group["lr"]))

        def update(entry: Entry) -> None:
            run([entry], settings, here, lr=settings.lr)

        by_device: dict[torch.device, list[Entry]] = {}
        for entry in entries:  # of now: a model may have been moved
            by_device.setdefault(entry.param.device, []).append(entry)
        for device, on_it in by_device.items():
            self._courier(device).step(on_it, update)

    def add(self, params: Iterable[Tensor]) -> None:
        """Take in more parameters; slots are made anew then, since one may be larger."""
        if more := frozenset(params) - self.params:
            self.close()
            self.params |= more

    def close(self) -> None:
        """Give the memory back, after the copies."""
        while self._couriers:
            self._couriers.popitem()[1].close()

    def _courier(self, device: torch.device) -> "Courier":
        if device not in self._couriers:
            params = [param for param in self.params if param.device == device]
            self._couriers[device] = Courier(params, make_copier(device))
        return self._couriers[device]


class _Brought(NamedTuple):
    """An entry whose parameter and gradient are in a slot, or on their way there."""

    entry: Entry
    param: Tensor
    grad: Tensor
    pages: Pages
    arrives: Copy


class Courier:
    """Brings parameters and gradients of a device to the host, and the parameters back.

    Args:
        params: all of them, on one device.
        copier: what copies.
    """

    def __init__(self, params: Sequence[Tensor], copier: Copier) -> None:
        self._device, self._num_slots = params[0].device, min(NUM_SLOTS, len(params))
        self._slot_bytes = max(_slot_bytes(param, param) for param in params)
        self._copier, self._slots = copier, list[Pages]()
        self._shut = weakref.finalize(self, _shut, copier, self._slots, os.getpid())
        self._shut.atexit = False  # the end of the process gives everything back

    @property
    def num_bytes(self) -> int:
        """Bytes of the slots."""
        return sum(pages.taken_bytes for pages in self._slots)

    def step(self, entries: Sequence[Entry], update: Callable[[Entry], None]) -> None:
        """Call `update` for each entry with parameter and gradient on the host, and return the parameter."""
        self._make_room(entries)
        waiting, begun = iter(entries), list[Copy]()
        coming = deque(self._fetch(entry, pages) for pages, entry in zip(self._slots, waiting, strict=False))
        try:
            while coming:
                brought = coming.popleft()
                brought.arrives.wait()
                update(brought.entry._replace(param=brought.param, grad=brought.grad))  # step 2
                begun = [self._copier.copy(brought.entry.param, brought.param)]  # step 3, behind all before it
                following = next(waiting, None)
                if following is not None:
                    coming.append(self._fetch(following, brought.pages))
        finally:
            for each in (*begun, *(brought.arrives for brought in coming)):
                each.order()  # step 4; gradients that were to be read may be freed then

    def close(self) -> None:
        """Give the slots up."""
        self._copier.wait()
        while self._slots:
            self._slots.pop().close()

    def _make_room(self, entries: Sequence[Entry]) -> None:
        most = max(_slot_bytes(entry.grad, entry.param) for entry in entries)
        if most > self._slot_bytes:  # a gradient in more bits than its parameter
            self.close()
            self._slot_bytes = most
        while len(self._slots) < self._num_slots:
            self._slots.append(Pages(self._slot_bytes, self._device))

    def _fetch(self, entry: Entry, pages: Pages) -> _Brought:
        grad = _at(pages, 0, entry.grad)
        param = _at(pages, round_up(entry.grad.nbytes, ALIGNMENT), entry.param)
        self._copier.copy(grad, entry.grad)  # step 1
        return _Brought(entry, param, grad, pages, self._copier.copy(param, entry.param))


def _shut(copier: Copier, slots: list[Pages], pid: int) -> None:
    """Give slots up behind the last copy; it also runs when the courier is collected."""
    if pid == os.getpid():  # a forked child may not call CUDA
        copier.wait()
        while slots:
            slots.pop().close()


def _at(pages: Pages, start: int, like: Tensor) -> Tensor:
    """Return a contiguous tensor of another's shape and dtype in a slot."""
    return pages.tensor[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _slot_bytes(grad: Tensor, param: Tensor) -> int:
    return max(PAGE_BYTES, round_up(round_up(grad.nbytes, ALIGNMENT) + param.nbytes, PAGE_BYTES))
