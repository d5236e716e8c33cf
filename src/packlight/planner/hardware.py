"""Rates of a device, and what an operator costs by them.

PyTorch counts floating-point operations and knows no seconds. Where the device is at hand an operator is run alone
(`operators.py`). Else, and where that cannot be, it takes the longer of two times, its arithmetic over the matrix rate
of its precision and its bytes over the memory rate (the roofline model, Williams et al. 2009), and no less than a
launch. The rates are measured in a second, or are those of a named device (`known_hardware.py`); they serve to compare
plans, and the first real step then scales them.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from packlight.activations.compress import CODECS, Encoded
from packlight.activations.engine import Engine
from packlight.activations.recompute import recompute
from packlight.optim.state import group_settings, init_state
from packlight.optim.stepping import update
from packlight.planner.operators import CallCost, Operators
from packlight.step import EngineSeconds

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""In which a device may have different matrix rates; what is none of them (fp64, integers) counts as fp32."""

LOW_BITS = ("8bit", "4bit")
"""The formats that a plan may choose beside the present one, the least lossy first.

"fp8" is not among them: of as many bytes as "8bit", it is slower (`states.json` in benchmarks/results: 4.6 against 1.0
times torch's step on the CPU, 1.8 against 1.0 on a GPU).
"""

HOST_FORMATS = ("fp32", *LOW_BITS)
"""The formats that states in host memory may have."""

HOST_SIDE = 6144
"""Of the square matrix that the host's kernels are measured with: 144 MiB."""

NUM_ENCODED = 8
"""Tensors that are encoded in a row where a codec is measured."""
NUM_BLOCKS, NUM_SAVING = 3, 12
"""Blocks, and modules in each, that save tensors where the engine's own time is measured."""
CHILL_BYTES = 2 * 2**20
"""More than two cores' own caches (0.5 MiB each on the machine where this was found)."""
NUM_CHILLED = 32
"""Parts of so many bytes that are written over in turn: more than the caches that cores share."""
NUM_ROUNDS = 5
"""In which each of the engine's ways is measured anew."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and how long it takes to start an operator.

    Attributes:
        flops_per_second: floating-point operations in a large matrix product, by each of `PRECISIONS`.
        bytes_per_second: bytes read and written by a large copy.
        launch_seconds: least time of an operator.
        update_seconds: the optimiser step with states of a low-bit format, for one parameter element, by format.
        engine: what the engine takes.
        is_queued: whether operators wait in a queue while the host goes on.
        operators: what calls were measured to take; None for a device that is not at hand.
        host_update_seconds: as `update_seconds`, by the host's kernels, by each of `HOST_FORMATS`.
    """

    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    launch_seconds: float
    update_seconds: Mapping[str, float]
    engine: EngineSeconds
    is_queued: bool = False
    operators: Operators | None = None
    host_update_seconds: Mapping[str, float] = field(default_factory=dict)


class MeasuredFlops(dict[str, float]):
    """The matrix rates of a device at hand; all but fp32's are measured when an operator first asks for them.

    On some CPUs a bf16 product takes 50 times as long as one in fp32, so a small one is measured there. TF32 counts as
    what fp32 was measured at, under the script's own settings.
    """

    def __init__(self, device: torch.device, fp32_flops_per_second: float) -> None:
        super().__init__(fp32=fp32_flops_per_second)
        self._device = device

    def __missing__(self, precision: str) -> float:
        """Measure a precision (about a tenth of a second on a CPU that is slow at it)."""
        dtype = _DTYPES.get(precision)
        rate = self["fp32"] if dtype is None else _matrix_flops_per_second(self._device, dtype)
        return self.setdefault(precision, rate)


def _matrix_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    side = 256 if device.type == "cpu" else 4096
    with _disable_current_modes(), torch.inference_mode():
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        return 2 * side**3 / _best_seconds(lambda: matrix @ matrix, device, repeats=2)


@functools.cache
def measure(device_type: str) -> Rates:
    """Measure the rates of a device (two seconds, once in a process; on a GPU in 300 MiB)."""
    device = torch.device(device_type)
    side, num_encoded = (1024, 2**19) if device.type == "cpu" else (4096, 2**22)
    with _disable_current_modes(), torch.inference_mode():
        matrix = torch.ones(side, side, dtype=torch.float32, device=device)
        flops_seconds = _best_seconds(lambda: matrix @ matrix, device)
        block = torch.ones(2**24, dtype=torch.float32, device=device)
        target = torch.empty_like(block)
        copy_seconds = _best_seconds(lambda: target.copy_(block), device)
        launch_seconds = _launch_seconds(device)
        update_seconds = {name: _update_seconds(device, side, state_format=name) for name in LOW_BITS}
        codec_seconds = {codec: _codec_seconds(codec, block.split(num_encoded)) for codec in CODECS}
        engine = _engine_seconds(device, codec_seconds)
    return Rates(
        MeasuredFlops(device, 2 * side**3 / flops_seconds),
        2 * block.nbytes / copy_seconds,
        launch_seconds,
        update_seconds,
        engine,
        is_queued=device.type != "cpu",
        operators=Operators(device),
        host_update_seconds=HostUpdates(),
    )


class HostUpdates(dict[str, float]):
    """What the CPU's kernels take, with all threads that torch has; measured when a format is first asked for."""

    def __missing__(self, state_format: str) -> float:
        """Measure a format (a fraction of a second, half a GiB): so much that nothing of it is left in a cache."""
        seconds = _update_seconds(torch.device("cpu"), HOST_SIDE, state_format=state_format)
        return self.setdefault(state_format, seconds)


def _launch_seconds(device: torch.device) -> float:
    """Measure the least time of an operator: of many in a row, as a step queues them."""
    scalar, num_launches = torch.ones(1, dtype=torch.float32, device=device), 64

    def launch() -> None:
        for _ in range(num_launches):
            scalar.add_(1)

    return _best_seconds(launch, device) / num_launches


def _codec_seconds(codec: str, parts: Sequence[torch.Tensor]) -> float:
    """Measure an encoding and its decoding, in seconds for one element."""
    inputs = [parts[at % len(parts)] for at in range(NUM_ENCODED)]

    def run() -> None:  # as a step encodes many tensors before it decodes one, so that memory comes fresh
        encoded = [Encoded(values, codec) for values in inputs]
        decoded = [each.get() for each in encoded]
        del encoded, decoded

    return _best_seconds(run, parts[0].device, repeats=3) / NUM_ENCODED / parts[0].numel()


class Chill:
    """Writes over a little more of a large tensor each time, so that nothing else stays in a core's caches.

    A step's operators stream their operands through the caches, so the engine's own code and data are read from memory
    again for each tensor that is saved. Measured beside small operators they take half the time. A GPU's operators
    leave the host's caches as they are.

    Args:
        device: the operators'.
    """

    def __init__(self, device: torch.device) -> None:
        num_parts = NUM_CHILLED if device.type == "cpu" else 0
        whole = torch.zeros(num_parts, CHILL_BYTES, dtype=torch.uint8, device="cpu")
        self._parts = itertools.cycle(whole.unbind())

    def __call__(self) -> None:
        """Write over the next part."""
        part = next(self._parts, None)
        if part is not None:
            part.add_(1)


class _Chilled(torch.autograd.Function):
    """Returns what came, in forward and in backward, with cold caches."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, chill: Chill) -> torch.Tensor:
        ctx.chill = chill
        chill()
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        ctx.chill()
        return gradients[0], None


class _Saves(torch.nn.Module):
    """Saves two tensors; a layer of T5's saves a little more than two for each module."""

    def __init__(self, chill: Chill) -> None:
        super().__init__()
        self._chill = chill

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for function in (torch.sigmoid, torch.exp):
            values = function(_Chilled.apply(values, self._chill))  # type: ignore[no-untyped-call]
        return values


def _engine_seconds(device: torch.device, codec_seconds: Mapping[str, float]) -> EngineSeconds:
    """Measure what the engine takes for a tensor of any size: its hooks, the group, and starting the kernels."""
    with torch.inference_mode(False):
        chill = Chill(device)
    model = torch.nn.Sequential(
        *[torch.nn.Sequential(*[_Saves(chill) for _ in range(NUM_SAVING)]) for _ in range(NUM_BLOCKS)]
    )
    num_saves = 2 * NUM_SAVING * NUM_BLOCKS
    blocks = [str(at) for at in range(NUM_BLOCKS)]
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain": nullcontext,
        "kept": lambda: Engine(model, {"none": "compress"}, codec="int8"),
        "encoded": lambda: Engine(model, {"*": "compress"}, codec="int8"),
        "again": lambda: recompute(model, blocks),
    }
    best = dict.fromkeys(("forward", *ways), float("inf"))
    with torch.inference_mode(False), torch.enable_grad():
        values = torch.ones(2**13, dtype=torch.float32, device=device, requires_grad=True)

        def note(name: str, function: Callable[[], Any]) -> None:
            best[name] = min(best[name], _best_seconds(function, device, repeats=2))

        for _ in range(NUM_ROUNDS):  # their differences are small beside what else a machine may do meanwhile
            note("forward", lambda: model(values))
            for name, way in ways.items():
                with way():
                    note(name, lambda: model(values).sum().backward())
    return _engine_of(best, num_saves, values.numel() * codec_seconds["int8"], codec_seconds)


def _engine_of(
    best: Mapping[str, float], num_saves: int, tensor_seconds: float, codec_seconds: Mapping[str, float]
) -> EngineSeconds:
    """Tell apart what each way took."""
    return EngineSeconds(
        codec_seconds=codec_seconds,
        call_seconds=max(0.0, (best["encoded"] - best["kept"]) / num_saves - tensor_seconds),
        save_seconds=max(0.0, (best["kept"] - best["plain"]) / num_saves),
        again_seconds=max(0.0, (best["again"] - best["plain"] - best["forward"]) / num_saves),
    )


def _update_seconds(device: torch.device, side: int, *, state_format: str) -> float:
    """Measure the AdamW step of a square matrix, in seconds for one element."""
    parameter = torch.ones(side, side, dtype=torch.float32, device=device)
    gradient = torch.ones_like(parameter)
    state = init_state(parameter, state_format)
    settings = group_settings({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False})
    run = functools.partial(update, parameter, gradient, state, state_format=state_format, settings=settings)
    return _best_seconds(run, device, repeats=3) / parameter.numel()


def _best_seconds(function: Callable[[], Any], device: torch.device, *, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def operator_cost(rates: Rates, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> CallCost:
    """Predict what an operator takes: as measured, else the longer of arithmetic and memory traffic.

    Args:
        rates: of the device.
        func: the operator.
        args: its arguments.
        kwargs: its keyword arguments.
        out: its results.

    Returns:
        Its seconds, of a launch at least, and on a GPU at hand its scratch memory.
    """
    if func.is_view:
        return CallCost(0.0)
    num_bytes = sum(_tensor_bytes(value) for value in (*args, *kwargs.values(), out))
    flops = _flops(func, args, kwargs, out)
    flops_seconds = flops / rates.flops_per_second[_precision(func, args)] if flops else 0.0
    by_rates = max(flops_seconds, num_bytes / rates.bytes_per_second, rates.launch_seconds)
    if rates.operators is not None:
        measured = rates.operators.measured(func, args, kwargs, out, by_rates=by_rates)
        if measured is not None:
            return measured._replace(seconds=max(measured.seconds, rates.launch_seconds))
    return CallCost(by_rates, is_measured=False)


def _precision(func: Any, args: tuple[Any, ...]) -> str:
    """Tell in which of `PRECISIONS` a product is computed: its first operand's, and TF32 where the script allows it."""
    dtype = next((at.dtype for at in args if isinstance(at, torch.Tensor) and at.is_floating_point()), None)
    if dtype is not torch.float32:
        return _NAMES.get(dtype, "fp32")  # type: ignore[arg-type]
    is_convolution = "conv" in func.overloadpacket.__name__
    backends: Any = torch.backends
    setting = backends.cudnn.conv if is_convolution else backends.cuda.matmul
    return "tf32" if setting.fp32_precision == "tf32" else "fp32"


def _tensor_bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_tensor_bytes(item) for item in value) if isinstance(value, tuple | list) else 0


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    packet = func.overloadpacket
    if packet.__name__.startswith("_scaled_dot_product"):
        is_backward = packet.__name__.endswith("_backward")
        query, key, value = args[1:4] if is_backward else args[:3]
        # Backward computes the scores again, and two products for each of forward's two.
        return _attention_flops(query, key, value) * (2.5 if is_backward else 1.0)
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    """Count two products; torch 2.11's own count refuses keys of fewer heads. Each (batch, heads, length, width)."""
    batch, num_heads, length, width = query.shape
    return 2.0 * batch * num_heads * length * key.shape[-2] * (width + value.shape[-1])
