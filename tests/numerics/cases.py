"""What the tests of low-bit numbers share: one parameter with its stored moments, and one call for each engine."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.numerics import AdamWSettings, Moment, SGDSettings, cpu, moment_formats, reference, zero_moment
from packlight.numerics.call import Slot
from packlight.numerics.noise import key_at, seed_at, seed_of
from packlight.numerics.reference import Noise
from packlight.numerics.rounding import ERROR_DTYPES, Rounding, RoundingName

#: Formats that the compiled step does itself, and those that exist to compare with.
COMPILED = ("fp32", "4bit", "8bit", "fp8")
PUBLISHED = ("paper4bit", "factored")
#: Each has a short last block; rows fit blocks, straddle them, are shorter than they, or there are none.
SHAPES = ((256, 384), (100, 333), (130, 129, 3), (5003,), (4161,))

Engine = Literal["cpu", "reference"]
#: Bits of every kind of NaN and infinity that hardware makes: x86's own NaN is negative, NVIDIA's has all bits set.
NONFINITE = {
    "nan": 0x7FC00000,
    "nan of x86": -0x400000,
    "nan of nvidia": 0x7FFFFFFF,
    "nan with all bits": -1,
    "inf": 0x7F800000,
    "-inf": -0x800000,
}


def from_bits(bits: int | Tensor) -> Tensor:
    """The fp32 numbers of these bits."""
    return torch.as_tensor(bits, dtype=torch.int32).view(torch.float32)


@dataclass
class Trained:
    """A parameter that an engine steps, with its moments and error bits."""

    param: Tensor
    name: str = "4bit"
    rounding: RoundingName = "nearest"
    seed: int = 1
    index: int = 0
    origin: int = 0
    num_moments: int = 2
    moments: tuple[Moment, ...] = field(init=False)
    how: Rounding = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(self.param.shape)
        formats = moment_formats(self.name, shape)[: self.num_moments]
        self.moments = tuple(zero_moment(shape, each) for each in formats)
        dtype = ERROR_DTYPES.get(self.rounding)
        error = None if dtype is None else torch.zeros(self.param.numel(), dtype=dtype)
        self.how = Rounding(self.rounding, error)

    def key(self, step: int) -> int:
        return key_at(seed_at(seed_of(self.seed, self.index), self.origin), step)

    def slot(self, grad: Tensor, step: int) -> Slot:
        return Slot(self.param, grad, self.moments, self.how, self.key(step))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        moments = {
            f"moment {index} {suffix}": tensor
            for index, moment in enumerate(self.moments)
            for suffix, tensor in moment.tensors.items()
        }
        errors = {} if self.how.error is None else {"error": self.how.error}
        return {"param": self.param, **moments, **errors}


def adamw(
    trained: Sequence[Trained],
    grads: Sequence[Tensor],
    step: int,
    settings: AdamWSettings,
    *,
    engine: Engine = "reference",
    stochastic: bool = False,
) -> None:
    """Do one step of AdamW on all of them."""
    numbers = settings.numbers(step)
    if engine == "cpu":
        slots = [each.slot(grad, step) for each, grad in zip(trained, grads, strict=True)]
        cpu.adamw_step(lambda: slots, numbers, plan=cpu.plan_of_slots(slots), stochastic=stochastic)
        return
    for each, grad in zip(trained, grads, strict=True):
        exp_avg, exp_avg_sq = each.moments
        noise = Noise(each.key(step), stochastic)
        moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        reference.adamw_step(each.param, grad, **moments, numbers=numbers, noise=noise, rounding=each.how)


def sgd(
    trained: Sequence[Trained],
    grads: Sequence[Tensor],
    step: int,
    settings: SGDSettings,
    *,
    engine: Engine = "reference",
) -> None:
    """Do one step of SGD on all of them."""
    numbers = settings.numbers(step)
    if engine == "cpu":
        slots = [each.slot(grad, step) for each, grad in zip(trained, grads, strict=True)]
        cpu.sgd_step(lambda: slots, numbers, plan=cpu.plan_of_slots(slots))
        return
    for each, grad in zip(trained, grads, strict=True):
        buffer = each.moments[0] if each.moments else None
        noise = Noise(each.key(step), False)
        reference.sgd_step(each.param, grad, momentum_buffer=buffer, numbers=numbers, noise=noise, rounding=each.how)


def gradient(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A gradient whose rows and columns differ by some hundred, as those of real layers do."""
    if not shape:
        return torch.randn(shape).to(dtype)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1))
    return (torch.randn(shape) * rows * torch.rand(shape[-1]) * 10 ** (-2 * torch.rand(()))).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    return a.dtype == b.dtype and torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])


def differing(ours: Trained, theirs: Trained) -> list[str]:
    """What differs between two, by name and number of elements."""
    pairs = zip(ours.tensors().items(), theirs.tensors().values(), strict=True)
    return [f"{name}: {int((a != b).sum())} of {a.numel()}" for (name, a), b in pairs if not same(a, b)]


def block_maxima(values: Tensor, size: int) -> Tensor:
    """For each element of a tensor, the largest magnitude in its block."""
    numel = values.numel()
    padded = values.new_zeros(math.ceil(numel / size) * size)
    padded[:numel] = values.reshape(-1).abs()
    return padded.view(-1, size).amax(1).repeat_interleave(size)[:numel].view(values.shape)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch, and so the compiled step, use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PeakBytes(TorchDispatchMode):
    """The peak of live bytes of the storages that operations made since entering, and what they were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.seen: set[int] = set()
        self.operations: list[str] = []

    def _freed(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        self.seen.discard(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen and not _is_view(tensor, args):
                    self.seen.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out


def _is_view(tensor: Tensor, args: Any) -> bool:
    pointers = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
    return tensor.untyped_storage().data_ptr() in pointers
