"""States in host memory: a parameter of a GPU is updated by the CPU's kernels, where its state is.

To bring a state to the GPU and back for each step takes 16 bytes an element over the link with fp32 moments. The
gradient and the parameter are smaller than that, and the CPU has kernels: so the state stays, and these travel. Two
slots of pinned memory are enough to keep the link and the kernels busy at once:

    side stream   out 1   out 2   .       back 1   out 3   back 2   out 4 ...
    CPU           .       step 1  .       step 2   .       step 3         ...

A parameter travels whole, so a slot is as large as the largest parameter and its gradient. The CPU's kernels give the
bits of the GPU's; fp32 moments, which torch's own step has on the GPU, get those of packlight's kernel.

Source: Ren et al., "ZeRO-Offload: Democratizing Billion-Scale Model Training", USENIX ATC 2021 (arXiv 2101.06840),
section 3 (what stays where) and 5.1 (the CPU's step beside the copies).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    sizes = [_slot_bytes(param.nbytes, param.nbytes) for param in params]
    return min(NUM_SLOTS, len(sizes)) * max(sizes, default=0)


class HostStep:
    """Updates parameters whose states are in host memory.

    Attributes:
        params: all of them.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = frozenset(params)
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in self.params:
            by_device.setdefault(param.device, []).append(param)
        self._couriers = {device: _Courier(device, on_it) for device, on_it in by_device.items()}

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
            OffloadError: the host has no memory for the slots.
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

        for device, courier in self._couriers.items():
            courier.step([entry for entry in entries if entry.param.device == device], update)

    def close(self) -> None:
        """Give the memory back, after the copies."""
        for courier in self._couriers.values():
            courier.close()


class _Brought(NamedTuple):
    """An entry whose parameter and gradient are in a slot, or on their way there."""

    entry: Entry
    param: Tensor
    grad: Tensor
    pages: Pages
    arrived: torch.cuda.Event | None


class _Courier:
    """Brings parameters and gradients of a device to the host, and the parameters back."""

    def __init__(self, device: torch.device, params: Sequence[Tensor]) -> None:
        self._device, self._num_slots = device, min(NUM_SLOTS, len(params))
        self._slot_bytes = max(_slot_bytes(param.nbytes, param.nbytes) for param in params)
        self._slots: list[Pages] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the slots."""
        return sum(pages.taken_bytes for pages in self._slots)

    def step(self, entries: Sequence[Entry], update: Callable[[Entry], None]) -> None:
        """Call `update` for each entry with parameter and gradient on the host, and return the parameter."""
        with self._beside_compute():
            self._make_room(entries)
            waiting = iter(entries)
            coming = deque(self._fetch(entry, pages) for pages, entry in zip(self._slots, waiting, strict=False))
            while coming:
                brought = coming.popleft()
                if brought.arrived is not None:
                    brought.arrived.synchronize()
                update(brought.entry._replace(param=brought.param, grad=brought.grad))
                with self._on_stream():
                    brought.entry.param.copy_(brought.param, non_blocking=True)
                following = next(waiting, None)
                if following is not None:
                    coming.append(self._fetch(following, brought.pages))

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        while self._slots:
            self._slots.pop().close()

    def _make_room(self, entries: Sequence[Entry]) -> None:
        most = max((_slot_bytes(entry.grad.nbytes, entry.param.nbytes) for entry in entries), default=0)
        if most > self._slot_bytes:  # a gradient in more bits than its parameter
            self.close()
            self._slot_bytes = most
        while entries and len(self._slots) < self._num_slots:
            self._slots.append(Pages(self._slot_bytes, self._device))

    def _fetch(self, entry: Entry, pages: Pages) -> _Brought:
        grad = _at(pages, 0, entry.grad)
        param = _at(pages, round_up(entry.grad.nbytes, ALIGNMENT), entry.param)
        with self._on_stream():
            grad.copy_(entry.grad, non_blocking=True)
            param.copy_(entry.param, non_blocking=True)
            arrived = None if self._stream is None else self._stream.record_event()
        return _Brought(entry, param, grad, pages, arrived)

    @contextmanager
    def _beside_compute(self) -> Iterator[None]:
        """Let copies come after what was queued before, and what is queued later after the copies."""
        if self._stream is None:
            yield
            return
        compute = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(compute)
        try:
            yield
        finally:
            compute.wait_stream(self._stream)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _at(pages: Pages, start: int, like: Tensor) -> Tensor:
    """Return a contiguous tensor of another's shape and dtype in a slot."""
    return pages.tensor[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _slot_bytes(grad_bytes: int, param_bytes: int) -> int:
    return round_up(round_up(grad_bytes, ALIGNMENT) + param_bytes, PAGE_BYTES)
