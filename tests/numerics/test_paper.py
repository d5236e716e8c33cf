"""The published formats do the published arithmetic: paper4bit of Li et al., and factored second moments."""

import math

import pytest
import torch
from torch import Tensor

from packlight.numerics import AdamWSettings, MomentFormat, decode, encode, reference, zero_moment
from packlight.numerics.books import DYNAMIC_EXPONENT, CodeBook
from packlight.numerics.formats import DYNAMIC_BLOCKS, FACTORED, LINEAR_BLOCKS, LINEAR_RANK1
from packlight.numerics.reference import Noise
from packlight.numerics.rounding import Rounding
from tests.cases import DEVICES
from tests.numerics.cases import Trained, adamw, block_maxima, gradient

SHAPES = [(769, 103), (4, 5, 6, 97), (5025, 16), (10_003,), (8, 3, 5, 7, 11), (3, 4099)]
#: Largest |decoded - x| / scale of each book: half its widest gap, or what lies beyond its ends.
#: Signed: from -1 to -.8875, and half of .6625 .. .4375, both .1125. Unsigned: 1/16 at 0, which has no code.
ROUNDING_ERROR = {"signed dynamic exponent, 4 bit": 0.1125, "unsigned linear without zero, 4 bit": 1 / 16}
OPTIONS = {
    "adamw": AdamWSettings(1e-2, weight_decay=0.1),
    # A large eps: gradient and weight decay cancel, and what is left is as inexact as they are large.
    "adam": AdamWSettings(1e-2, 0.9, 0.95, 1e-3, weight_decay=0.1, decoupled=False, maximize=True, coefficient=0.125),
}


def scales_of(values: Tensor, moment_format: MomentFormat) -> Tensor:
    """The scale of each element, by the definition, on whole tensors."""
    if moment_format.scale == "block":
        return block_maxima(values, 128)
    axes = range(values.dim())
    maxima = [values.amax([k for k in axes if k != axis], keepdim=True) for axis in axes]
    return torch.stack(torch.broadcast_tensors(*maxima)).amin(0)


def whole_tensor_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step: int, s: AdamWSettings) -> Tensor:
    """The published update on whole tensors; m and v change in place, the new parameter comes back."""
    g = whole_gradient(p, g, s)
    m.copy_(s.beta1 * m + (1 - s.beta1) * g)
    v.copy_(s.beta2 * v + (1 - s.beta2) * g * g)
    return whole_tensor_update(p, m, v, step=step, s=s)


def whole_gradient(p: Tensor, g: Tensor, s: AdamWSettings) -> Tensor:
    g = g * s.coefficient * (-1 if s.maximize else 1)
    return g if s.decoupled else g.add(p, alpha=s.weight_decay)


def whole_tensor_update(p: Tensor, m: Tensor, v: Tensor, *, step: int, s: AdamWSettings) -> Tensor:
    denom = v.sqrt() / math.sqrt(1 - s.beta2**step) + s.eps
    decay = 1 - s.lr * s.weight_decay if s.decoupled else 1
    return p * decay - s.lr / (1 - s.beta1**step) * m / denom


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "moment_format", [DYNAMIC_BLOCKS, LINEAR_BLOCKS, LINEAR_RANK1], ids=["signed", "blocks", "rank1"]
)
def test_decoding_stays_within_the_books_rounding_error(
    shape: tuple[int, ...], moment_format: MomentFormat, seed: int
) -> None:
    if moment_format.scale == "rank1" and len(shape) == 1:
        moment_format = LINEAR_BLOCKS
    assert moment_format.book is not None
    values = torch.randn(shape) * torch.rand(shape) ** 4
    values = values if moment_format.signed else values.square()
    scale = scales_of(values, moment_format)
    error = (decode(encode(values, moment_format)) - values).abs()
    assert bool((error <= ROUNDING_ERROR[moment_format.book.name] * scale * (1 + 1e-6)).all())


def test_rank1_scales_are_the_maxima_of_every_axis(seed: int) -> None:
    values = torch.rand(17, 9, 5, 13)
    moment = encode(values, LINEAR_RANK1)
    scales = [moment.tensors[f"scale_{axis}"] for axis in range(4)]
    assert [tuple(scale.shape) for scale in scales] == [(17,), (9,), (5,), (13,)]
    for axis, scale in enumerate(scales):
        assert torch.equal(scale, values.amax([k for k in range(4) if k != axis]))


def test_zero_rows_and_columns_decode_to_zeros(seed: int) -> None:
    values = torch.rand(70, 130)
    values[3], values[:, 7], values[10:14] = 0, 0, 0
    decoded = decode(encode(values, LINEAR_RANK1))
    assert bool((decoded[3] == 0).all() and (decoded[10:14] == 0).all() and (decoded[:, 7] == 0).all())
    assert bool(decoded.isfinite().all())


def test_zero_over_zero_gets_the_code_of_the_least_magnitude() -> None:
    zeros = torch.zeros(64, 128)
    assert set(encode(zeros, DYNAMIC_BLOCKS).tensors["codes"].tolist()) == {0x77}  # code 7 is 0
    assert set(encode(zeros, LINEAR_RANK1).tensors["codes"].tolist()) == {0x00}  # code 0 is 1/16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, (600, 1024), (3, 100_003), (30, 40_003)])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_in_chunks_is_the_published_step(shape: tuple[int, ...], options: str, device: str, seed: int) -> None:
    settings = OPTIONS[options]
    ours = Trained(torch.randn(shape), "paper4bit")
    for step in (1, 2):
        grad = torch.randn(shape)
        m, v = map(decode, ours.moments)
        exact = whole_tensor_step(ours.param, grad, m, v, step=step, s=settings)
        adamw([ours], [grad], step, settings)
        assert torch.allclose(ours.param, exact, rtol=1e-5, atol=1e-6)
        for values, moment in zip((m, v), ours.moments, strict=True):
            assert moment.format.book is not None
            bound = ROUNDING_ERROR[moment.format.book.name] * scales_of(values, moment.format)
            assert bool(((decode(moment) - values).abs() <= bound * (1 + 1e-4) + 1e-12).all())


@pytest.mark.parametrize("rms", [1e-8, 1e-12])
@pytest.mark.parametrize("shape", [(100, 130), (13_000,)])
def test_tiny_gradients_get_right_updates(shape: tuple[int, ...], rms: float, seed: int) -> None:
    signs = torch.randn(shape).sign()
    coarse, exact = Trained(torch.zeros(shape), "paper4bit"), Trained(torch.zeros(shape), "fp32")
    for step in range(1, 21):
        adamw([coarse], [rms * signs], step, AdamWSettings(1.0, eps=rms / 100))
        adamw([exact], [rms * signs], step, AdamWSettings(1.0, eps=rms / 100))
    # One magnitude everywhere: both moments are at the top of their scale, but the map gives -1 as -.8875.
    assert float((coarse.param / exact.param - 1).abs().max()) < 0.12


def test_a_second_moment_with_a_zero_code_blows_up(seed: int) -> None:
    """Why no map has a zero: a small element beside a large one is rounded to it and gets m / eps."""
    with_zero = MomentFormat("book", "block", book=CodeBook("with zero", (*(i / 16 for i in range(15)), 1.0)))
    shape, largest = (8192,), {}
    for moment_format in (with_zero, LINEAR_BLOCKS):
        ours = Trained(torch.zeros(shape), "fp32")
        exp_avg, exp_avg_sq = ours.moments[0], zero_moment(shape, moment_format)
        scale = torch.ones(shape)
        scale[::16] = 100.0
        for step in range(1, 6):
            grad = torch.randn(shape) * scale * (1.0 if step < 4 else 0.01)
            numbers, noise = AdamWSettings(1e-3).numbers(step), Noise(1, False)
            moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            reference.adamw_step(ours.param, grad, **moments, numbers=numbers, noise=noise, rounding=Rounding())
        largest[moment_format] = float(ours.param.abs().max())
    assert largest[LINEAR_BLOCKS] < 5 * 1e-3 * 5
    assert largest[with_zero] > 10 * largest[LINEAR_BLOCKS]


# Factored second moments


def factored(values: Tensor) -> Tensor:
    """The rank-1 matrix with the same row and column means, over the last two axes."""
    row, column = values.double().mean(-1, keepdim=True), values.double().mean(-2, keepdim=True)
    return row * column / row.mean(-2, keepdim=True)


@pytest.mark.parametrize("shape", [(769, 103), (4, 5, 60, 97), (5025, 2), (30, 40_003), (8200, 1)])
def test_a_factored_moment_is_the_product_of_its_means(shape: tuple[int, ...], seed: int) -> None:
    values = torch.rand(shape)
    moment = encode(values, FACTORED)
    torch.testing.assert_close(moment.tensors["row"], values.mean(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(moment.tensors["col"], values.mean(-2), rtol=1e-4, atol=0)
    torch.testing.assert_close(decode(moment).double(), factored(values), rtol=3e-4, atol=0)


@pytest.mark.parametrize("shape", [(769, 103), (4, 5, 60, 97), (30, 40_003)])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_factored_step_is_the_published_one(shape: tuple[int, ...], options: str, seed: int) -> None:
    """The means of an exact second moment are the decayed means of the squares: nothing is rounded in between."""
    settings, exact_v = OPTIONS[options], torch.zeros(shape, dtype=torch.float64)
    ours = Trained(torch.randn(shape), "factored")
    for step in (1, 2, 3):
        before, grad, m = ours.param.clone(), gradient(shape) + 0.01, decode(ours.moments[0])
        g = whole_gradient(ours.param, grad, settings)
        exact_v.copy_(settings.beta2 * exact_v + (1 - settings.beta2) * g.double().square())
        m = settings.beta1 * m + (1 - settings.beta1) * g
        exact = whole_tensor_update(ours.param, m, factored(exact_v).float(), step=step, s=settings)
        adamw([ours], [grad], step, settings)
        # Sums of up to 40,003 squares, each addition off by 2^-24 of the sum; a parameter rounds twice on either side.
        # The update is bounded without the weight decay, which may cancel it.
        decayed = before * (1 - settings.lr * settings.weight_decay) if settings.decoupled else before
        bound = 40_003 * 2**-24 * (exact - decayed).abs() + 2**-22 * before.abs() + 1e-6
        assert bool(((ours.param - exact).abs() <= bound).all())
        error = (decode(ours.moments[0]) - m).abs() / block_maxima(m, 128)
        assert float(error.max()) <= ROUNDING_ERROR[DYNAMIC_EXPONENT.name] * (1 + 1e-4)


def test_a_zero_matrix_among_others_stays_zero(seed: int) -> None:
    values = torch.rand(3, 60, 70)
    values[1] = 0
    decoded = decode(encode(values, FACTORED))
    assert bool((decoded[1] == 0).all() and (decoded[[0, 2]] > 0).all())
