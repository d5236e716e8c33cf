"""Page-aligned host memory, pinned where a GPU copies from and to it, of the very size that was asked for.

torch's `pin_memory` rounds up to a power of two and gives nothing back (pytorch#134051); memory that O_DIRECT takes
must start at a page. The idea: map anonymous pages, bind them to the GPU's NUMA node before anything touches them,
and register them with CUDA. The mapping is shared, not private: after a fork the GPU and this process would otherwise
see different copies of a page that either process writes.

```
1 map  ->  2 bind to the GPU's node  ->  3 register (touches every page)  ->  ... copies ...
5 unmap, when the last tensor over the pages is gone  <-  4 unregister, after the copies
```
"""

import ctypes
import mmap
import os
import platform
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packlight.activations.extents import round_up
from packlight.activations.tier import OffloadError

PAGE_BYTES = 4096
REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable, driver_types.h: pinned for every CUDA context."""
PREFERRED = 1
"""MPOL_PREFERRED, linux/mempolicy.h: from this node while it has memory, else from another."""
MBIND = {"x86_64": 237, "aarch64": 235}
"""The number of the system call mbind, asm/unistd_64.h and asm-generic/unistd.h."""


class Pages:
    """Page-aligned bytes; pinned if made for a CUDA device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Map, bind and register.

        Args:
            num_bytes: rounded up to whole pages.
            device: whose copies will use the pages.

        Raises:
            OffloadError: there is no memory for it.
        """
        self._device = device
        self._registration: weakref.finalize[..., Pages] | None = None
        self.num_bytes = self.taken_bytes = round_up(num_bytes, PAGE_BYTES)
        """What can be used, and what the host has less: more, where torch had to pin."""
        self.gives_back = True
        """Whether `close` frees the memory; torch's pinned memory stays in a cache."""
        self.numa_node: int | None = None
        """The node that the pages were asked from, None where none is known or asking is forbidden."""
        try:
            pages = mmap.mmap(-1, self.num_bytes)  # step 1
        except OSError as error:
            raise OffloadError(
                f"the host has no {self.num_bytes} bytes for offloaded tensors ({error}); give the tier a smaller "
                'budget, or use tier="disk"'
            ) from error
        self.tensor: Tensor = torch.frombuffer(pages, dtype=torch.uint8)
        """uint8, [num_bytes], the memory."""
        if device.type == "cuda":
            self._pin()

    def view(self, start: int, num_bytes: int) -> memoryview:
        """Return bytes of the memory for reading and writing; the caller lets go of it before `close()`."""
        return self.tensor[start : start + num_bytes].numpy().data

    def close(self) -> None:
        """Unregister; the copies must have ended. Calling it again does nothing.

        Raises:
            OffloadError: CUDA refused.
        """
        self.tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._registration is not None:
            self._registration()

    def _pin(self) -> None:
        node = _node_of(self._device)
        if node is not None and _bind(self.tensor.data_ptr(), self.num_bytes, node):  # step 2
            self.numa_node = node
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()
            code = int(cudart.cudaHostRegister(self.tensor.data_ptr(), self.num_bytes, REGISTER_PORTABLE))  # step 3
        if not code:
            self._registration = weakref.finalize(self, _unregister, self.tensor, self._device, os.getpid())
            self._registration.atexit = False  # copies may still run then; the end of the process unregisters
        else:
            _forget_last_error(self._device)
            self._pin_with_torch(code)

    def _pin_with_torch(self, code: int) -> None:
        warnings.warn(
            f"cudaHostRegister refused {self.num_bytes} bytes (error {code}); torch's pin_memory is used instead, "
            "which rounds up to a power of two and gives nothing back",
            stacklevel=2,
        )
        self.gives_back = False
        self.taken_bytes = 1 << (self.num_bytes - 1).bit_length()
        try:
            self.tensor = torch.empty(self.num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise OffloadError(
                f"the host has no {self.num_bytes} bytes of pinned memory ({error}); give the tier a smaller budget, "
                'raise the limit of locked memory (ulimit -l), or use tier="disk"'
            ) from error


def _unregister(pages: Tensor, device: torch.device, pid: int) -> None:
    """Step 4; it also runs when the pages are collected."""
    if pid != os.getpid():  # a forked child has no part in the registration
        return
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostUnregister(pages.data_ptr()))
    if code:
        raise OffloadError(f"cudaHostUnregister returned error {code}; restart the process to free the memory")


def _forget_last_error(device: torch.device) -> None:
    """CUDA keeps a failed call's error for whoever asks next: a kernel's launch check takes it off."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)


def _node_of(device: torch.device) -> int | None:
    """Return the NUMA node next to a GPU, or None where the system does not tell."""
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        at = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        node = int(Path("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0/numa_node".format(*at)).read_text("ascii"))
    except (AttributeError, OSError, ValueError):  # an older torch, no /sys
        return None
    return node if node >= 0 else None


def _bind(address: int, num_bytes: int, node: int) -> bool:
    """Ask for pages of a NUMA node; it is a hint, and containers often forbid it."""
    number = MBIND.get(platform.machine())
    if number is None:
        return False
    mask = (ctypes.c_ulong * (node // 64 + 1))()
    mask[node // 64] = 1 << node % 64
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    long, unsigned = ctypes.c_long, ctypes.c_ulong  # plain numbers would be passed as 32 bits
    where = (ctypes.c_void_p(address), unsigned(num_bytes))
    # The kernel reads one bit less of the mask than it is told.
    return int(call(long(number), *where, long(PREFERRED), mask, unsigned(64 * len(mask) + 1), unsigned(0))) == 0
