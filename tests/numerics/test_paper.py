"""The reference keeps the published arithmetic, in bounded temporaries, for any shape, strides and dtype."""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.numerics import (
    AdamWSettings,
    CodeBook,
    Moment,
    MomentFormat,
    adamw_step,
    decode,
    encode,
    moment_formats,
    reference,
    zero_moment,
)
from packlight.numerics.codes import nearest_codes, pack, unpacked_values
from packlight.numerics.formats import DYNAMIC_EXPONENT, FP32, LINEAR_WITHOUT_ZERO, state_format
from packlight.numerics.reference import CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS
from tests.cases import DEVICES

MIB = 2**20
SIGNED_BLOCKS = MomentFormat(DYNAMIC_EXPONENT, "block")
UNSIGNED_BLOCKS = MomentFormat(LINEAR_WITHOUT_ZERO, "block")
UNSIGNED_RANK1 = MomentFormat(LINEAR_WITHOUT_ZERO, "rank1")
SHAPES = [(769, 103), (4, 5, 6, 97), (5025, 16), (10_003,), (8, 3, 5, 7, 11), (3, 4099)]

# Largest |decoded - x| / scale of each book: half its widest gap, or what lies beyond its ends.
# Signed: from -1 to -.8875, and half of .6625 .. .4375, both .1125. Unsigned: 1/16 at 0, which has no code.
ROUNDING_ERROR = {DYNAMIC_EXPONENT: 0.1125, LINEAR_WITHOUT_ZERO: 1 / 16}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The cores are not ours alone, and threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PeakBytes(TorchDispatchMode):
    """The peak of live bytes of the storages that operations made since entering."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def _freed(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        self.seen.discard(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
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


def moments(shape: tuple[int, ...], name: str = "paper4bit", device: str = "cpu") -> tuple[Moment, Moment]:
    exp_avg, exp_avg_sq = (zero_moment(shape, moment, device=device) for moment in moment_formats(name, shape))
    return exp_avg, exp_avg_sq


def scales_of(values: Tensor, moment_format: MomentFormat) -> Tensor:
    """The scale of each element, by the definition, on whole tensors."""
    if moment_format.scale == "block":
        numel = values.numel()
        padded = values.new_zeros(math.ceil(numel / 128) * 128)
        padded[:numel] = values.reshape(-1).abs()
        return padded.view(-1, 128).amax(1).repeat_interleave(128)[:numel].view(values.shape)
    axes = range(values.dim())
    maxima = [values.amax([k for k in axes if k != axis], keepdim=True) for axis in axes]
    return torch.stack(torch.broadcast_tensors(*maxima)).amin(0)


@pytest.mark.parametrize("book", [DYNAMIC_EXPONENT, LINEAR_WITHOUT_ZERO], ids=lambda book: book.name)
def test_nearest_code_is_bucketize_at_and_around_every_border(book: CodeBook) -> None:
    points = torch.tensor([*book.values, *book.midpoints, *torch.linspace(book.values[0], 1, 100_001).tolist()])
    around = torch.cat([points, points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0))])
    around = around.clamp(-1 if book.values[0] < 0 else 0, 1)
    assert torch.equal(nearest_codes(around, book), torch.bucketize(around, torch.tensor(book.midpoints)).byte())


def test_low_nibble_is_the_even_element() -> None:
    packed = pack(torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8))
    assert packed.tolist() == [0x21, 0x43, 0x05]
    sixteenths = [(i + 1) / 16 for i in (1, 2, 3, 4, 5, 0)]
    assert unpacked_values(packed, LINEAR_WITHOUT_ZERO).tolist() == sixteenths


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moment_format", [SIGNED_BLOCKS, UNSIGNED_BLOCKS, UNSIGNED_RANK1], ids=str)
def test_decoding_stays_within_the_books_rounding_error(
    shape: tuple[int, ...], moment_format: MomentFormat, seed: int
) -> None:
    if moment_format.scale == "rank1" and len(shape) == 1:
        moment_format = UNSIGNED_BLOCKS
    assert moment_format.book is not None
    values = torch.randn(shape) * torch.rand(shape) ** 4
    values = values if moment_format.book is DYNAMIC_EXPONENT else values.square()
    scale = scales_of(values, moment_format)
    error = (decode(encode(values, moment_format)) - values).abs()
    assert bool((error <= ROUNDING_ERROR[moment_format.book] * scale * (1 + 1e-6)).all())


def test_rank1_scales_are_the_maxima_of_every_axis(seed: int) -> None:
    values = torch.rand(17, 9, 5, 13)
    scales = encode(values, UNSIGNED_RANK1).scales
    assert [tuple(scale.shape) for scale in scales] == [(17,), (9,), (5,), (13,)]
    for axis, scale in enumerate(scales):
        assert torch.equal(scale, values.amax([k for k in range(4) if k != axis]))


@pytest.mark.parametrize("moment_format", [SIGNED_BLOCKS, UNSIGNED_RANK1, FP32], ids=str)
def test_zero_rows_columns_and_blocks_decode_to_zeros(moment_format: MomentFormat, seed: int) -> None:
    values = torch.rand(70, 130)
    values[3], values[:, 7], values[10:14] = 0, 0, 0
    decoded = decode(encode(values, moment_format))
    assert bool((decoded[3] == 0).all() and (decoded[10:14] == 0).all())
    assert bool(decoded.isfinite().all())
    if moment_format.scale != "block":
        assert bool((decoded[:, 7] == 0).all())


def test_zero_over_zero_gets_the_code_of_the_least_magnitude() -> None:
    zeros = torch.zeros(64, 128)
    assert set(encode(zeros, SIGNED_BLOCKS).codes.tolist()) == {0x77}  # code 7 is 0
    assert set(encode(zeros, UNSIGNED_RANK1).codes.tolist()) == {0x00}  # code 0 is 1/16


def test_fp32_is_stored_as_it_is(seed: int) -> None:
    values = torch.randn(5, 7)
    assert torch.equal(decode(encode(values, FP32)), values)


def whole_tensor_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step: int, s: AdamWSettings) -> Tensor:
    """The published update on whole tensors; m and v change in place, the new parameter comes back."""
    g = g / s.grad_scale * (-1 if s.maximize else 1)
    g = g if s.decoupled else g.add(p, alpha=s.weight_decay)
    m.copy_(s.beta1 * m + (1 - s.beta1) * g)
    v.copy_(s.beta2 * v + (1 - s.beta2) * g * g)
    denom = v.sqrt() / math.sqrt(1 - s.beta2**step) + s.eps
    decay = 1 - s.lr * s.weight_decay if s.decoupled else 1
    return p * decay - s.lr / (1 - s.beta1**step) * m / denom


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, (600, 1024), (3, 100_003), (30, 40_003)])
@pytest.mark.parametrize(
    "settings",
    [
        AdamWSettings(1e-2, weight_decay=0.1),
        AdamWSettings(1e-2, weight_decay=0.1, decoupled=False, maximize=True, grad_scale=8.0, beta2=0.95),
    ],
    ids=["adamw", "adam"],
)
def test_chunked_step_is_the_published_step(
    shape: tuple[int, ...], settings: AdamWSettings, device: str, seed: int
) -> None:
    param = torch.randn(shape, device=device)
    exp_avg, exp_avg_sq = moments(shape, device=device)
    for step in (1, 2):
        grad = torch.randn(shape, device=device)
        m, v = decode(exp_avg), decode(exp_avg_sq)
        exact = whole_tensor_step(param, grad, m, v, step=step, s=settings)
        adamw_step(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, settings=settings)
        assert torch.allclose(param, exact, rtol=1e-5, atol=1e-6)
        for values, moment in ((m, exp_avg), (v, exp_avg_sq)):
            assert moment.format.book is not None
            bound = ROUNDING_ERROR[moment.format.book] * scales_of(values, moment.format)
            assert bool(((decode(moment) - values).abs() <= bound * (1 + 1e-4) + 1e-12).all())


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("shape", [(), (7,), (64, 64), (769, 1003), (300_001,)])
def test_fp32_step_is_torchs_bit_for_bit(shape: tuple[int, ...], decoupled: bool, seed: int) -> None:
    torch.set_num_threads(2)  # threads cut a tensor at other places than chunks do
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    param = torch.randn(shape)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = kind([theirs], lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    exp_avg, exp_avg_sq = moments(shape, "fp32")
    settings = AdamWSettings(1e-2, weight_decay=0.1, decoupled=decoupled)
    for step in range(1, 11):
        theirs.grad = torch.randn(shape)
        optimizer.step()
        adamw_step(param, theirs.grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, settings=settings)
        assert torch.equal(param, theirs.detach())
    assert torch.equal(exp_avg_sq.codes, optimizer.state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize("rms", [1e-8, 1e-12])
@pytest.mark.parametrize("shape", [(100, 130), (13_000,)])
def test_tiny_gradients_get_right_updates(shape: tuple[int, ...], rms: float, seed: int) -> None:
    updates = {}
    signs = torch.randn(shape).sign()
    for name in ("paper4bit", "fp32"):
        param = torch.zeros(shape)
        exp_avg, exp_avg_sq = moments(shape, name)
        for step in range(1, 21):
            settings = AdamWSettings(1.0, eps=rms / 100)
            adamw_step(param, rms * signs, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, settings=settings)
        updates[name] = param
    # One magnitude everywhere: both moments are at the top of their scale, but the map gives -1 as -.8875.
    assert float((updates["paper4bit"] / updates["fp32"] - 1).abs().max()) < 0.12


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(100, 130), (13_000,), (20, 20)])
def test_nan_or_inf_in_the_gradient_shows_in_the_parameter(shape: tuple[int, ...], poison: float, seed: int) -> None:
    param, grad = torch.randn(shape), torch.randn(shape)
    grad.view(-1)[57] = poison
    exp_avg, exp_avg_sq = moments(shape)
    for step in (1, 2):
        adamw_step(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, settings=AdamWSettings(1e-3))
        assert bool(param.view(-1)[57].isnan())
    codes_beside = decode(exp_avg).view(-1)[256:]
    assert bool(codes_beside.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameter_is_the_rounded_fp32_one(dtype: torch.dtype, seed: int) -> None:
    shape, settings = (130, 70), AdamWSettings(1e-2, weight_decay=0.1)
    param, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact, stored, exact_stored = param.float(), moments(shape), moments(shape)
    adamw_step(param, grad, exp_avg=stored[0], exp_avg_sq=stored[1], step=1, settings=settings)
    adamw_step(exact, grad.float(), exp_avg=exact_stored[0], exp_avg_sq=exact_stored[1], step=1, settings=settings)
    assert torch.equal(param, exact.to(dtype))
    assert torch.equal(stored[1].codes, exact_stored[1].codes)
    assert {scale.dtype for moment in stored for scale in moment.scales} == {torch.float32}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed axes": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str, dtype: torch.dtype, seed: int) -> None:
    shape, settings = (3, 300, 17, 19), AdamWSettings(1e-2)  # more than one chunk
    plain, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    param = LAYOUTS[layout](plain.clone())
    assert not param.is_contiguous()
    results = []
    for p, g in ((plain, grad), (param, LAYOUTS[layout](grad))):
        stored = moments(shape)
        for step in (1, 2):
            adamw_step(p, g, exp_avg=stored[0], exp_avg_sq=stored[1], step=step, settings=settings)
        results.append((p, stored[0].codes, stored[1].codes, *stored[1].scales))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(4096, 4096), (769, 1003), (4, 5, 6, 997), (50257, 64), (100_003,), (33, 2**18 - 1), (2, 2_000_003)],
)
@pytest.mark.parametrize("chunk_elements", [CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS])
def test_temporaries_stay_below_64_mib(
    shape: tuple[int, ...], chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CPU_CHUNK_ELEMENTS", chunk_elements)
    param, grad = torch.zeros(shape), torch.ones(shape[::-1]).permute(*reversed(range(len(shape))))
    exp_avg, exp_avg_sq = moments(shape)
    with PeakBytes() as peak:
        adamw_step(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=1, settings=AdamWSettings(1e-3))
    print(f"temporaries {peak.peak / MIB:.2f} MiB")
    assert 0 < peak.peak < 64 * MIB
    assert peak.live < MIB  # the tables stay, nothing else does


def test_peak_counts_what_is_alive_together() -> None:
    with PeakBytes() as peak:
        kept = torch.zeros(MIB)
        for _ in range(3):
            kept + 1  # freed at once
    assert peak.peak == 8 * MIB


def test_second_moment_with_a_zero_code_blows_up(seed: int) -> None:
    """Why the map has no zero: a small element beside a large one is rounded to it and gets m / eps."""
    with_zero = MomentFormat(CodeBook("with zero", tuple(i / 16 for i in range(16))), "block")
    without_zero = state_format("paper4bit").exp_avg_sq_flat
    shape, largest = (8192,), {}
    for moment_format in (with_zero, without_zero):
        param, exp_avg, exp_avg_sq = (
            torch.zeros(shape),
            zero_moment(shape, FP32),
            zero_moment(shape, moment_format),
        )
        scale = torch.ones(shape)
        scale[::16] = 100.0
        for step in range(1, 6):
            grad = torch.randn(shape) * scale * (1.0 if step < 4 else 0.01)
            settings = AdamWSettings(1e-3)
            adamw_step(param, grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, settings=settings)
        largest[moment_format] = float(param.abs().max())
    assert largest[without_zero] < 5 * 1e-3 * 5
    assert largest[with_zero] > 10 * largest[without_zero]
