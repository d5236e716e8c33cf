"""What a forward starts from, set aside so that the same forward can run again and give the same bits.

`torch.utils.checkpoint` can run a function twice and restores torch's random state; a model's forward changes more: the
statistics of batch norm, Python's and numpy's generators. Here all of it is noted before a forward begins, and put back
before it is repeated. The notes must not raise the peak that they are there to save, so no tensor on the device holds
them: bytes lie in host memory on CUDA, and in a file without a name where the device is the CPU and they are many.

A plain attribute that a forward changes (a counter) is not put back.
"""

import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from packlight.activations.attributes import version_of
from packlight.activations.buffers import MAX_COPIED_ELEMENTS, drawn_state, set_drawn_state
from packlight.planner.loop import Call
from packlight.planner.tensors import flat_tensors

MAX_COPIED_BYTES = 8 * MAX_COPIED_ELEMENTS
"""Buffers in larger storages are not copied, but must not be written to."""

MAX_MEMORY_BYTES = 2**20
"""What is set aside goes to a file where it is larger."""


class Aside:
    """The bytes of a tensor's storage, kept off its device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Copy the storage, without a copy on the device.

        Raises:
            OSError: there is no room in the folder for temporary files.
        """
        self._how = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()
        self._device, self._file = tensor.device, tempfile.SpooledTemporaryFile(MAX_MEMORY_BYTES)
        weakref.finalize(self, self._file.close)
        data = _bytes_of(tensor)
        if tensor.device.type == "cpu":
            self._file.write(data.numpy().data)
        else:
            self._held = data.cpu()

    def back(self) -> torch.Tensor:
        """Return a tensor with the same bytes in a storage of the same layout."""
        dtype, offset, size, stride = self._how
        storage = self._read().to(self._device).untyped_storage()
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, offset, size, stride)

    def put_into(self, tensor: torch.Tensor) -> None:
        """Write the bytes back into the tensor that they came from."""
        _bytes_of(tensor).copy_(self._read())

    def _read(self) -> torch.Tensor:
        if self._device.type != "cpu":
            return self._held
        self._file.seek(0)
        data = bytearray(self._file.read())
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


class Start:
    """What one forward of a model starts from: its arguments, random states and buffers."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        """Note it all; nothing of the model changes."""
        self.call, self._model = call, model
        self.drawn = Drawn()
        self._small: list[tuple[dict[str, Any], str, torch.Tensor, Aside]] = []
        self._large: list[tuple[str, torch.Tensor, int]] = []
        for owner, name, buffer in _buffers(model):
            if buffer.untyped_storage().nbytes() <= MAX_COPIED_BYTES:
                self._small.append((owner, name, buffer, Aside(buffer)))
            else:
                self._large.append((name, buffer, version_of(buffer)))
        read = [*model.parameters(), *flat_tensors((call.args, dict(call.kwargs)))]
        self._read = [(tensor, version_of(tensor)) for tensor in read]
        self._training = [module.training for module in model.modules()]

    def obstacle(self) -> str:
        """Say why the forward cannot be run again with the same bits; nothing where it can."""
        present = {id(buffer) for _, _, buffer in _buffers(self._model)}
        for name, buffer, version in self._large:
            if id(buffer) not in present or version_of(buffer) != version:
                return f"the buffer {name!r} of {buffer.numel()} elements was changed by the forward"
        if any(version_of(tensor) != version for tensor, version in self._read):
            return "an argument of the model or a parameter was written to since the forward began"
        if self._training != [module.training for module in self._model.modules()]:
            return "the model was switched between training and evaluation since the forward began"
        return ""

    def rewind(self) -> None:
        """Put random states and buffers back."""
        self.drawn.put_back()
        for owner, name, buffer, aside in self._small:
            aside.put_into(buffer)
            owner[name] = buffer


class Drawn:
    """The states of the random generators now: torch's on CPU and CUDA, Python's and numpy's."""

    def __init__(self) -> None:
        """Note them, as no tensors: these would be counted."""
        self._cpu = bytes(torch.get_rng_state().numpy())
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._others = drawn_state()

    def put_back(self) -> None:
        """Let every generator go on from there."""
        torch.set_rng_state(torch.frombuffer(bytearray(self._cpu), dtype=torch.uint8))
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        set_drawn_state(self._others)


def _buffers(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device.type != "meta" and buffer.layout == torch.strided:
                yield owner._buffers, name, buffer


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of all bytes of a tensor's storage, uint8 of shape (num_bytes,), with a version of its own."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
