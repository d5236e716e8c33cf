"""What operators take on a device at hand, found by running each of them alone.

A roofline knows an operator's bytes and operations, and neither its kernel nor the memory that the kernel takes and
gives back inside one call: a softmax's gradient takes a copy of it on a GPU, a convolution whatever its algorithm
wants, and on a CPU a strided copy runs at a tenth of the memory's rate. Layers repeat, so a step has few distinct
calls. The idea: each of these is run a few times on operands of the same shapes and strides, while the step that it
belongs to is traced on fake tensors; its operands are there for no longer than that.

Integers are all 0, which is an index into anything. What reads values, draws its shape from them, or works on lists of
parameters is left to the roofline, and so is what raises.
"""

import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

MOST_SHARE = 0.25
"""Operands may take this share of the memory that is free."""
LONG_SECONDS = 0.05
"""What takes so long is not repeated."""
SHORT_SECONDS = 1e-4
"""Beside what is as short, the wait for a GPU's end counts."""
NUM_RUNS = 3
_NAMES_LEFT_OUT = ("_foreach", "_fused_ada", "_fused_sgd", "empty", "new_empty", "set_", "resize", "_to_copy_sparse")


# Their fake tensors say that the generator's state, seed and offset, is on the GPU; the kernels read it on the host.
_STATE_ON_HOST = ("_scaled_dot_product_efficient_attention_backward", "_efficient_attention_backward")


class Measured(NamedTuple):
    """What one call takes.

    Attributes:
        seconds: from its start to the next one's.
        scratch_bytes: taken from a GPU's allocator inside the call, at most, beside its results; 0 on the CPU, where
            nothing counts them.
    """

    seconds: float
    scratch_bytes: int


class Operators:
    """Measures calls of operators on one device; each distinct one once."""

    def __init__(self, device: torch.device) -> None:
        """Measure nothing yet."""
        self._device = device
        self._known: dict[Hashable, Measured | None] = {}

    def measured(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Measured | None:
        """Return what a call takes, run on operands of its own.

        Args:
            func: an operator, such as torch.ops.aten.mm.default.
            args: its arguments; of tensors, which may be fake, only the geometry counts.
            kwargs: its keyword arguments.

        Returns:
            What it takes; None where that cannot be found out.
        """
        if func.namespace != "aten" or func.overloadpacket.__name__.startswith(_NAMES_LEFT_OUT):
            return None
        leaves, spec = tree_flatten((args, kwargs))
        if torch.Tag.data_dependent_output in func.tags or _draws_shape(func, leaves):
            return None
        try:
            key = func, str(spec), tuple(map(self._key, leaves))
            if key not in self._known:
                self._known[key] = None  # what raises is not tried again
                self._known[key] = self._measure(func, args, kwargs)
            return self._known[key]
        except Exception:  # an operator may refuse in any way: the caller has another way to cost it
            return None

    def _key(self, leaf: Any) -> Hashable:
        if not isinstance(leaf, torch.Tensor):
            hash(leaf)
            return type(leaf), leaf
        if leaf.dim() == 0 and leaf.device.type == "cpu":
            return "number", leaf.dtype
        if leaf.device.type != self._device.type or leaf.layout != torch.strided or leaf.is_quantized:
            raise ValueError(f"no operand of its own can be made for one on {leaf.device}")
        return leaf.shape, leaf.stride(), leaf.dtype

    def _measure(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Measured | None:
        operands = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if 2 * sum(map(_extent_bytes, operands)) > MOST_SHARE * free_bytes(self._device):
            return None
        devices = [self._device] if self._device.type == "cuda" else []
        with _disable_current_modes(), torch.inference_mode(), torch.random.fork_rng(devices):
            on_host = func.overloadpacket.__name__ in _STATE_ON_HOST
            make = partial(self._operand, state_on_host=on_host)
            args, kwargs = tree_map_only(torch.Tensor, make, (args, kwargs))
            run = lambda: func(*args, **kwargs)  # noqa: E731
            if self._device.type == "cuda":
                return Measured(self._device_seconds(run), self._scratch_bytes(run))
            return Measured(_host_seconds(run), 0)

    def _operand(self, like: torch.Tensor, *, state_on_host: bool) -> torch.Tensor:
        on_host = like.device.type == "cpu" or (state_on_host and like.dim() == 0)
        num_elements = _extent_bytes(like) // like.element_size()
        whole = torch.zeros(num_elements, dtype=like.dtype, device="cpu" if on_host else self._device)
        if like.is_floating_point():
            # Random bits take a GPU more power than equal ones, and so more time; on a CPU drawing them takes long.
            whole.fill_(0.5) if self._device.type == "cpu" else whole.uniform_(0.1, 0.9)
        return whole.as_strided(like.shape, like.stride())

    def _device_seconds(self, run: Callable[[], Any]) -> float:
        """Time runs in a row, as a step queues them, after one that may compile a kernel; many where they are short."""
        run()
        seconds = self._row_seconds(run, NUM_RUNS)
        return seconds if seconds > SHORT_SECONDS else self._row_seconds(run, 10 * NUM_RUNS)

    def _row_seconds(self, run: Callable[[], Any], num_runs: int) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(num_runs):
            run()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / num_runs

    def _scratch_bytes(self, run: Callable[[], Any]) -> int:
        """Run once more, and see what the allocator gave out meanwhile."""
        torch.cuda.reset_peak_memory_stats(self._device)
        out = run()
        scratch_bytes = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        del out
        return scratch_bytes


def _host_seconds(run: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(NUM_RUNS + 1):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if best > LONG_SECONDS:
            break
    return best


def _draws_shape(func: Any, leaves: list[Any]) -> bool:
    """Tell whether the result's shape hangs on values, as that of an index by a mask does."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    masks = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8))
    return func is not torch.ops.aten.index.Tensor or next(masks, None) is not None


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def free_bytes(device: torch.device) -> int:
    """Return how much memory a device has free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
