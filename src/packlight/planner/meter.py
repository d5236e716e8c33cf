"""Bytes on a device while something runs: now, and the most since they were last asked for.

On CUDA the allocator knows. On the CPU a dispatch mode follows storages, as it does when steps are measured
(`timeline.py`); what was there before is not counted.
"""

from typing import Protocol, Self

import torch

from packlight.planner.tensors import existing_tensors
from packlight.planner.timeline import Timeline


class Meter(Protocol):
    """Tells the bytes on a device."""

    def level(self) -> int:
        """Return the bytes now, and begin a new maximum."""

    def most(self) -> int:
        """Return the maximum since."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class _OnCpu:
    """Counts storages, as steps are measured."""

    def __init__(self) -> None:
        self._line = Timeline("cpu")
        for tensor in existing_tensors("cpu"):
            for each in (tensor, tensor.grad if tensor.is_leaf else None):  # Python has not seen each gradient
                if each is not None:
                    self._line.leave_out(each)

    def level(self) -> int:
        """See `Meter`."""
        self._line.highest_bytes()
        return self._line.live_bytes

    def most(self) -> int:
        return max(self._line.highest_bytes(), self._line.live_bytes)

    def __enter__(self) -> Self:
        self._line.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._line.__exit__(*exc_info)  # type: ignore[no-untyped-call]
        self._line.close()


class _OnCuda:
    """Asks the allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def level(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None: ...


def meter(device: torch.device) -> Meter:
    """Return what tells a device's bytes."""
    return _OnCuda(device) if device.type == "cuda" else _OnCpu()
