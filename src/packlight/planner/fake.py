"""Fake tensors in place of real ones: copies of models and optimisers that have shapes and no memory.

torch's `FakeCopyMode` copies what is on a device that this machine has. A model that is planned for may be on the meta
device, and its copy should behave as on the CPU: the same operators, the same kernels. `FakeCopy` does both, and keeps
tied parameters tied and an optimiser's parameters those of the model when the two are copied together.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from packlight.planner.hardware import Rates, operator_seconds
from packlight.planner.timeline import Timeline


class FakeCopy(TorchFunctionMode):
    """Makes `copy.deepcopy` put fake tensors in place of real ones; meta tensors become fake CPU tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.fake(tensor)
            return memo[id(tensor)]
        if func in (torch.Tensor.clone, torch._C.TensorBase.clone):
            return self.fake(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor of the same shape, strides, dtype and (but for meta) device."""
        if isinstance(tensor, FakeTensor) or tensor.device.type != "meta":
            return self._mode.from_tensor(tensor, static_shapes=True)
        with self._mode, torch.no_grad():
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return made.requires_grad_(tensor.requires_grad)


class FakeLine(Timeline):
    """A timeline of fake storages that also adds up the operators' seconds.

    What autograd does on it (a release, the first wish for a block's saves) is an event of its own, so that of two
    that fall between the same birth and death it stays known which came first.
    """

    def __init__(self, device_type: str, rates: Rates) -> None:
        super().__init__(device_type)
        self.rates, self.seconds = rates, 0.0
        self._num_ticks = 0

    def now(self) -> int:
        """Return the present position on the line, ticks counted."""
        return len(self.events) + self._num_ticks

    def tick(self) -> int:
        """Put an event onto the line at which no storage is born or dies, and return its position."""
        self._num_ticks += 1
        return self.now() - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.explicit_phase == "optimizer":
            return 1.0 if args[0].dtype.is_floating_point else 1  # an optimiser reads its own step count
        return super().__torch_dispatch__(func, types, args, kwargs)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what an operator made, and add its seconds."""
        super().observe(func, args, kwargs, out)
        self.seconds += operator_seconds(self.rates, func, args, kwargs, out)
