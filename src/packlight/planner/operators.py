"""What operators take on a device at hand, found by running each of them alone.

A roofline knows an operator's bytes and operations, and neither its kernel nor the memory that the kernel takes and
gives back inside one call: a softmax's gradient takes a copy of it on a GPU, a convolution whatever its algorithm
wants, and on a CPU a strided copy runs at a tenth of the memory's rate. Layers repeat, so a step has few distinct
calls. The idea: each of these is run a few times on operands of the same shapes and strides, while the step that it
belongs to is traced on fake tensors; its operands are there for no longer than that.

```
1 left out    what is no call of torch's own, reads values, draws its shape from them, works on lists of parameters,
              takes the lengths of groups, or asserts
2 bounded     what would take long by its rate or fill the memory, and everything once all runs have taken long enough
3 operands    floating-point numbers of ordinary size, integers that index into anything, spread over it
4 run         once to compile, then in a row; on a GPU once more beside the allocator's count
```

What is not run counts by its rates; `hardware.py` decides.
"""

import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from packlight.control_groups import host_memory, read_group

MOST_SHARE = 0.25
"""Operands and results may take this share of the memory that is free."""
MOST_SECONDS = 1.0
"""What would take longer by its rates is not run."""
MOST_SECONDS_IN_ALL = 30.0
"""When so long was spent on a device, nothing more is run."""
LONG_SECONDS = 0.05
"""What takes so long is not repeated."""
SHORT_SECONDS = 1e-4
"""Beside what is as short, the wait for a GPU's end counts."""
NUM_RUNS = 3
# Step 1, beside what tags tell. An assert that fails on a GPU ends the process's use of it.
_NAMES_WITH_LENGTHS = ("_grouped_mm", "_scaled_grouped_mm", "_embedding_bag", "segment_reduce", "_nested")
_NAMES_OF_LISTS = ("_foreach", "_fused_ada", "_fused_sgd")
_NAMES_OF_ASSERTS = ("_assert", "_functional_assert")
_NAMES_OF_MEMORY = ("empty", "new_empty", "set_", "resize")
_NAMES_LEFT_OUT = (*_NAMES_WITH_LENGTHS, *_NAMES_OF_LISTS, *_NAMES_OF_ASSERTS, *_NAMES_OF_MEMORY)
# Their fake tensors say that the generator's state, seed and offset, is on the GPU; the kernels read it on the host.
_STATE_ON_HOST = ("_scaled_dot_product_efficient_attention_backward", "_efficient_attention_backward")


class CallCost(NamedTuple):
    """What one call takes.

    Attributes:
        seconds: from its start to the next one's.
        scratch_bytes: taken from a GPU's allocator inside the call, at most, beside its results; 0 on the CPU, where
            nothing counts them.
        is_measured: whether it was run, or counts by the device's rates.
    """

    seconds: float
    scratch_bytes: int = 0
    is_measured: bool = True


class Operators:
    """Measures calls of operators on one device; each distinct one once."""

    def __init__(self, device: torch.device) -> None:
        """Measure nothing yet."""
        self._device = device
        self._known: dict[Hashable, CallCost | None] = {}
        self._spent_seconds = 0.0

    def measured(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any = None, *, by_rates: float = 0.0
    ) -> CallCost | None:
        """Return what a call takes, run on operands of its own.

        Args:
            func: an operator, such as torch.ops.aten.mm.default.
            args: its arguments; of tensors, which may be fake, only the geometry counts.
            kwargs: its keyword arguments.
            out: its results; of tensors only the geometry counts.
            by_rates: the seconds that it takes by the device's rates.

        Returns:
            What it takes; None where that is not found out.

        Raises:
            RuntimeError: a kernel has failed for good, so that the device cannot be used any more.
        """
        if func.namespace != "aten" or func.is_view or func.overloadpacket.__name__.startswith(_NAMES_LEFT_OUT):
            return None
        leaves, spec = tree_flatten((args, kwargs))
        if torch.Tag.data_dependent_output in func.tags or _draws_shape(func, leaves):
            return None
        try:
            key = func, str(spec), tuple(map(self._key, leaves)), _settings()
        except (TypeError, ValueError):  # of no hash, or not of this device alone
            return None
        if key not in self._known:
            tensors = [each for each in (*leaves, *tree_flatten(out)[0]) if isinstance(each, torch.Tensor)]
            if self._is_too_much(sum(map(_extent_bytes, tensors)), by_rates):
                return None  # another time there may be room
            self._known[key] = self._try(func, args, kwargs)
        return self._known[key]

    def _is_too_much(self, num_bytes: int, by_rates: float) -> bool:
        """Step 2."""
        if by_rates > MOST_SECONDS or self._spent_seconds > MOST_SECONDS_IN_ALL:
            return True
        return num_bytes > MOST_SHARE * free_bytes(self._device)

    def _key(self, leaf: Any) -> Hashable:
        if not isinstance(leaf, torch.Tensor):
            hash(leaf)
            if isinstance(leaf, torch.Generator):
                raise ValueError("its numbers are the caller's")
            return type(leaf), leaf
        if leaf.dim() == 0 and leaf.device.type == "cpu":
            return "number", leaf.dtype
        if leaf.device.type != self._device.type or leaf.layout != torch.strided or leaf.is_quantized:
            raise ValueError(f"no operand of its own can be made for one on {leaf.device}")
        return leaf.shape, leaf.stride(), leaf.dtype

    def _try(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallCost | None:
        start = time.perf_counter()
        try:
            return self._measure(func, args, kwargs)
        except Exception as error:  # an operator may refuse in any way
            broken: type[Exception] | tuple[()] = getattr(torch, "AcceleratorError", ())
            if isinstance(error, broken) and not isinstance(error, torch.OutOfMemoryError):
                raise RuntimeError(f"{func} failed on operands of its own and broke {self._device}: {error}") from error
            return None
        finally:
            self._spent_seconds += time.perf_counter() - start

    def _measure(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallCost:
        devices = [self._device] if self._device.type == "cuda" else []
        with _disable_current_modes(), torch.inference_mode(), torch.random.fork_rng(devices):
            on_host = func.overloadpacket.__name__ in _STATE_ON_HOST
            make = partial(self._operand, state_on_host=on_host, bound=_index_bound(args, kwargs))
            args, kwargs = tree_map_only(torch.Tensor, make, (args, kwargs))
            run = lambda: func(*args, **kwargs)  # noqa: E731
            if self._device.type == "cuda":
                return CallCost(self._device_seconds(run), self._scratch_bytes(run))
            return CallCost(_host_seconds(run))

    def _operand(self, like: torch.Tensor, *, state_on_host: bool, bound: int) -> torch.Tensor:
        """Step 3."""
        on_host = like.device.type == "cpu" or (state_on_host and like.dim() == 0)
        num_elements = _extent_bytes(like) // like.element_size()
        whole = torch.zeros(num_elements, dtype=like.dtype, device="cpu" if on_host else self._device)
        if like.is_floating_point():
            # Random bits take a GPU more power than equal ones, and so more time; on a CPU drawing them takes long.
            whole.fill_(0.5) if self._device.type == "cpu" else whole.uniform_(0.1, 0.9)
        elif like.dtype in (torch.int32, torch.int64) and like.dim():
            torch.arange(num_elements, dtype=like.dtype, device=whole.device, out=whole).remainder_(bound)
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


def _settings() -> Hashable:
    """Return what decides which kernel an operator takes, beside its operands."""
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )


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


def _index_bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return a number below which an integer indexes into every dimension that there is, in tensors and in numbers."""
    sizes: list[int] = []
    for leaf in tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, torch.Tensor):
            sizes += leaf.shape
        elif type(leaf) is int and leaf > 1:  # the number of rows of a gradient that is to be made, a list of sizes
            sizes.append(leaf)
    return max(1, min(sizes, default=1))


def _extent_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def free_bytes(device: torch.device) -> int:
    """Return how much memory a device has free; of a CPU's, what the process's control group leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available, group = host_memory()["MemAvailable"], read_group()
    if group.memory_bytes is None:
        return available
    return min(available, max(0, group.memory_bytes - (group.used_bytes or 0)))
