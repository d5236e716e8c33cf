"""Fake tensors in place of real ones: copies of models and optimisers that have shapes and no memory.

torch's `FakeCopyMode` copies what is on a device that this machine has. A model that is planned for may be on the meta
device, and its copy should behave as on the CPU: the same operators, the same kernels. `FakeCopy` does both, and keeps
tied parameters tied and an optimiser's parameters those of the model when the two are copied together.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from packlight.planner.answers import Answers
from packlight.planner.hardware import Rates, operator_cost
from packlight.planner.known import KnownValues
from packlight.planner.reads import Reads
from packlight.planner.timeline import Timeline
from packlight.step import EngineSeconds

LARGE_SHARE = 0.2
"""Of a step's predicted time: as much that was not measured is said."""


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

    def memo(
        self, parameters: Iterable[nn.Parameter], whole: Mapping[int, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[int, Any]:
        """Return what `copy.deepcopy` is to put in the place of parameters of which only a share is here."""
        return {id(each): self._whole(each, *whole[id(each)]) for each in parameters if id(each) in whole}

    def _whole(self, parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        with self._mode, torch.no_grad():
            made = torch.empty(shape, dtype=dtype, device="cpu" if parameter.is_meta else parameter.device)
        return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _plainly(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _loss_in_large_storage(func: Any, value: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a loss whose kernel reduces in place: the scalar keeps the storage of all its elements' losses."""
    out = func(value, target, *args, **kwargs)
    if out.dim():
        return out
    num_elements = torch.broadcast_shapes(value.shape, target.shape).numel()
    return torch.empty(num_elements, dtype=out.dtype, device=out.device).as_strided((), ())


def _statistics_in_fp32(func: Any, value: torch.Tensor, *args: Any) -> Any:
    """Run a norm whose kernel on the CPU keeps fp32 statistics where values are bf16 and weights fp32."""
    out = func(value, *args)
    mixed = any(isinstance(at, torch.Tensor) and at.dtype != value.dtype for at in args)
    return (out[0], *[at.float() for at in out[1:]]) if mixed and value.device.type == "cpu" else out


def _group_norm_backward(func: Any, gradient: torch.Tensor, value: torch.Tensor, *args: Any) -> Any:
    """Run the backward of such a norm; the kernel's gradient has the value's dtype."""
    out = func(gradient, value, *args)
    return (None if out[0] is None else out[0].to(value.dtype), *out[1:])


def _lstm_with_workspace(func: Any, value: torch.Tensor, *args: Any) -> Any:
    """Run one layer of an LSTM on the CPU; the kernel for fake tensors leaves its workspace empty."""
    out = func(value, *args)
    hidden_size, is_training = args[9], args[-1]
    if not is_training:
        return out
    num_steps, batch_size, input_size = value.shape
    num_bytes = lstm_workspace_bytes(num_steps, batch_size, input_size, hidden_size, dtype=value.dtype)
    return (*out[:3], torch.empty(num_bytes, dtype=torch.uint8, device=value.device))


def _lstm_backward(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the backward of such a layer; the kernel for fake tensors returns one gradient for both biases."""
    out = func(*args, **kwargs)
    return (*out[:4], torch.empty_like(out[4]), *out[5:])


def lstm_workspace_bytes(
    num_steps: int, batch_size: int, input_size: int, hidden_size: int, *, dtype: torch.dtype = torch.float32
) -> int:
    """Return what oneDNN keeps of one LSTM layer in one direction for backward.

    Gates, states and their gradients, each of them on pages of its own; gradients and the cell's state are fp32, and
    rows are padded but for the cell's.
    Source: oneDNN 3.12, src/cpu/rnn/rnn_utils.hpp (`set_offsets`, `get_good_ld`).
    """
    size, num_rows = dtype.itemsize, 2 * (num_steps + 1) * batch_size
    parts = [num_steps * batch_size * _padded_bytes(width, size) for width in (4 * hidden_size, hidden_size)]
    parts += [num_rows * _padded_bytes(max(input_size, hidden_size), each) for each in (size, 4, 4)]
    parts += [num_rows * hidden_size * each for each in (size, 4)]
    return sum(-(-num_bytes // 4096) * 4096 for num_bytes in parts)


def _padded_bytes(width: int, size: int) -> int:
    """Round a row up to cache lines, and add one where rows would fall into the same cache sets."""
    in_line = 64 // size
    rounded = -(-width // in_line) * in_line
    return (rounded + in_line if rounded % 256 == 0 else rounded) * size


def _grouped_mm(func: Any, left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a product of groups; its version for fake tensors takes bf16 alone, the kernels take fp32 and fp16 too."""
    if left.dtype == torch.bfloat16:
        return func(left, right, *args, **kwargs)
    out = func(left.bfloat16(), right.bfloat16(), *args, **kwargs)
    in_row = 16 // left.element_size()  # rows begin at 16 bytes
    width = -(-out.shape[-1] // in_row) * in_row
    stride = (out.shape[-2] * width, width, 1)[-out.dim() :]
    return torch.empty_strided(out.shape, stride, dtype=left.dtype, device=left.device)


_aten = torch.ops.aten
_NORMS = (_aten.native_layer_norm, _aten.native_batch_norm, _aten.native_group_norm)
_LOSSES = (_aten.mse_loss, _aten.smooth_l1_loss, _aten.binary_cross_entropy, _aten.soft_margin_loss)
_AS_ALLOCATED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((loss.default for loss in _LOSSES), _loss_in_large_storage),
    **dict.fromkeys((norm.default for norm in _NORMS), _statistics_in_fp32),
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.mkldnn_rnn_layer.default: _lstm_with_workspace,
    _aten.mkldnn_rnn_layer_backward.default: _lstm_backward,
    _aten._grouped_mm.default: _grouped_mm,
}
"""Operators of which the kernel allocates something else than its version for fake tensors says (torch 2.13)."""


class FakeLine(Timeline):
    """A timeline of fake storages that also adds up the operators' seconds.

    What autograd does on it (a release, the first wish for a block's saves) is an event of its own, so that of two
    that fall between the same birth and death it stays known which came first.
    """

    def __init__(self, device_type: str, rates: Rates, *, allocator: str = "", answers: Answers | None = None) -> None:
        super().__init__(device_type, allocator=allocator)
        self.rates, self.seconds = rates, 0.0
        self.seconds_by_rates: dict[str, float] = {}
        self._queued_seconds = 0.0
        self.known = KnownValues(answers)
        self.reads = Reads(self)
        self._num_ticks = 0

    def now(self) -> int:
        """Return the present position on the line, ticks counted."""
        return len(self.events) + self._num_ticks

    def tick(self) -> int:
        """Put an event onto the line at which no storage is born or dies, and return its position."""
        self._num_ticks += 1
        return self.now() - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator as it will run on real tensors, and follow its value where that is known."""
        if func.namespace == "prim":  # a question about a device or a layout
            return func(*args, **(kwargs or {}))
        if func is _aten._local_scalar_dense.default and self.explicit_phase == "optimizer":
            return 1.0 if args[0].dtype.is_floating_point else 1  # an optimiser reads its own step count
        known = self.known.answer(func, args, kwargs or {})
        if known is not None and not isinstance(known, torch.Tensor | tuple | list):
            return known
        if known is not None:
            out = tree_map_only(torch.Tensor, functools.partial(torch.empty_like, device=args[0].device), known)
        else:
            run: Callable[..., Any] = _AS_ALLOCATED.get(func, _plainly)
            out = run(func, *self.known.with_places(func, args), **(kwargs or {}))
        self.known.follow(func, args, kwargs or {}, out, answer=known)
        if not self._paused:
            self.observe(func, args, kwargs or {}, out)
        return out

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what an operator made, and add its seconds."""
        super().observe(func, args, kwargs, out)
        self.reads.note(args, kwargs)
        cost = operator_cost(self.rates, func, args, kwargs, out)
        self.seconds += cost.seconds
        self._queued_seconds += max(0.0, cost.seconds - self.rates.launch_seconds)
        if not cost.is_measured:
            name = func.overloadpacket.__name__
            self.seconds_by_rates[name] = self.seconds_by_rates.get(name, 0.0) + cost.seconds
        if cost.scratch_bytes:
            self.add(torch.empty(cost.scratch_bytes, dtype=torch.uint8, device=self.device_type))

    def engine_seconds(self, num_saves: int) -> EngineSeconds:
        """Return what the engine takes beside the operators so far, in which so many tensors were saved.

        Operators that wait in a queue give the host time to spare, in which it saves tensors for nothing. That an
        operator costs the host no more than a launch is an assumption, by which the time to spare is the most there is.
        """
        engine = self.rates.engine
        spare_seconds = self._queued_seconds / num_saves if self.rates.is_queued and num_saves else 0.0
        left = [max(0.0, seconds - spare_seconds) for seconds in (engine.save_seconds, engine.again_seconds)]
        return replace(engine, save_seconds=left[0], again_seconds=left[1])

    def by_rates(self) -> list[str]:
        """Say what could not be run alone on the device at hand, where it is much of the step."""
        found = sorted(self.seconds_by_rates.items(), key=lambda each: -each[1])
        share = sum(seconds for _, seconds in found) / self.seconds if self.seconds else 0.0
        if share < LARGE_SHARE:
            return []
        names = ", ".join(name for name, _ in found[:3])
        return [f"{share:.0%} of the step's predicted time counts by rates and was not measured ({names})"]
