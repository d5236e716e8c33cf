"""SGD without momentum gives the reference's bits, many parameters at a time, in bounded temporaries."""

import pytest
import torch

from packlight.numerics import SGDSettings, reference
from packlight.numerics.descent import CHUNK_ELEMENTS, descend
from packlight.numerics.reference import Noise
from packlight.numerics.rounding import Rounding
from tests.numerics.cases import PeakBytes, same

SETTINGS = {
    "plain": SGDSettings(0.1),
    "decay": SGDSettings(0.1, weight_decay=0.01),
    "maximize": SGDSettings(0.1, maximize=True),
    "clipped": SGDSettings(0.3, coefficient=0.7),
    "all": SGDSettings(0.3, weight_decay=0.1, maximize=True, coefficient=0.7),
    "nesterov left over": SGDSettings(0.1, nesterov=True, weight_decay=0.1),
}
SHAPES = [(3, 4), (), (5003,), (0,), (CHUNK_ELEMENTS,), (2, CHUNK_ELEMENTS + 5), (300, 333), (1,), (64, 3, 3, 3)]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_bits_are_the_references(settings: SGDSettings, bad: float | None, seed: int) -> None:
    params, grads = [torch.randn(shape) for shape in SHAPES], [torch.randn(shape) for shape in SHAPES]
    if bad is not None:
        grads[5][1, 7] = bad
    theirs = [param.clone() for param in params]
    numbers = settings.numbers(2)
    descend(list(zip(params, grads, strict=True)), numbers)
    for param, grad in zip(theirs, grads, strict=True):
        how = {"momentum_buffer": None, "noise": Noise(0, False), "rounding": Rounding()}
        reference.sgd_step(param, grad, numbers=numbers, **how)  # type: ignore[arg-type]
    assert all(same(a, b) for a, b in zip(params, theirs, strict=True))


def test_gradients_are_only_read(seed: int) -> None:
    param, grad = torch.randn(500, 300), torch.randn(500, 300)
    before = grad.clone()
    descend([(param, grad)], SETTINGS["all"].numbers(1))
    assert torch.equal(grad, before)


@pytest.mark.parametrize("shapes", [[(2**21,)], [(2048,)] * 200], ids=["one large", "many small"])
def test_temporaries_stay_below_a_mebibyte(shapes: list[tuple[int, ...]]) -> None:
    pairs = [(torch.zeros(shape), torch.ones(shape)) for shape in shapes]
    with PeakBytes() as peak:
        descend(pairs, SETTINGS["all"].numbers(1))
    assert 0 < peak.peak < 2**20
