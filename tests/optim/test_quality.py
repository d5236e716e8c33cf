"""Low-bit states take nearly fp32's update and reach fp32's loss, on real text; a zero in exp_avg_sq's map does not.

The measure and the task are those of benchmarks/quality.py, with a smaller model.
"""

import functools
import math
from collections.abc import Iterator

import pytest
import torch

from benchmarks.quality_tasks import ByteModel, Task, byte_loss, held_out_byte_loss, library_bytes, train
from benchmarks.quality_update import ZERO_MAP, Stream, figures, gradients, optimizer_of
from packlight.numerics import FORMATS

# Largest relative error of Adam's update after 100 steps at beta2 .999, with exp_avg and with exp_avg_sq in the format
# and the other one exact. One rounding of exp_avg is off by at most 2^-b of its block's largest (4 bits: about .1; 7
# and a sign: .004; E4M3 before expansion: .06), and with beta1 .9 the errors of ten steps are left, at random up to
# 1 / sqrt(1 - .81) = 2.3 of one. A second moment remembers all of the 100 roundings, but its square root halves them.
UPDATE_ERROR = {
    "4bit": (0.26, 0.21),
    "8bit": (0.02, 0.03),
    "fp8": (0.05, 0.05),
    "paper4bit": (0.40, 0.36),
    "factored": (0.40, 0.36),
}
# A second moment that only ever rounds to nearest, or whose scales wander, drifts for as long as beta2 remembers.
# After 1,000 steps of the same gradients: the largest error of the update, and how far its length may be off.
LONG_ERROR, LONG_GAIN = 0.25, 0.05
# Largest change of the held-out loss; other seeds change fp32's own by about as much.
LOSS_CHANGE = 0.02
PUBLISHED = ("factored", "paper4bit")
"""Formats that are here to be compared with."""

SMALL_MODEL = functools.partial(ByteModel, num_layers=1, length=32)
TASK = Task("small", SMALL_MODEL, byte_loss, held_out_byte_loss, num_steps=120, lr=4e-3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share among threads, and the cores are not ours alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def no_tensors_kept() -> Iterator[None]:
    """What the cache of this file keeps alive would count as used memory in later tests."""
    yield
    stream.cache_clear()
    library_bytes.cache_clear()


@functools.cache
def stream(first: int) -> Stream:
    torch.manual_seed(0)
    return gradients(SMALL_MODEL(), first=first)


@functools.cache
def loss(state_format: str, num_steps: int) -> float:
    return train(
        TASK,
        lambda model, lr: optimizer_of(model.named_parameters(), state_format, lr=lr),
        seed=0,
        steps=num_steps,
    )


def test_every_format_has_a_bound() -> None:
    assert UPDATE_ERROR.keys() == FORMATS.keys() - {"fp32"}


@pytest.mark.parametrize("first", [0, 100])
def test_the_measure_finds_no_error_in_fp32(first: int) -> None:
    found = figures(stream(first), "fp32", warm=first > 0)
    assert max(figure.error for figure in found.values()) < 1e-4


@pytest.mark.parametrize("state_format", UPDATE_ERROR)
def test_update_stays_within_the_error_of_its_format(state_format: str) -> None:
    found = figures(stream(0), state_format)
    exp_avg_error, exp_avg_sq_error = UPDATE_ERROR[state_format]
    assert found["exp_avg"].error <= exp_avg_error
    assert found["exp_avg_sq"].error <= exp_avg_sq_error
    assert found["both"].error <= 1.2 * math.hypot(exp_avg_error, exp_avg_sq_error)


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8"])
def test_a_second_moment_does_not_drift_over_a_thousand_steps(state_format: str) -> None:
    layer = stream(100).only("blocks.0.up")
    found = figures(layer, state_format, warm=True, rounds=10)["exp_avg_sq"]
    assert found.error <= LONG_ERROR
    assert found.gain == pytest.approx(1, abs=LONG_GAIN)


@pytest.mark.parametrize(
    "state_format", [pytest.param(name, marks=[pytest.mark.slow] * (name in PUBLISHED)) for name in UPDATE_ERROR]
)
def test_training_reaches_the_loss_of_fp32(state_format: str) -> None:
    assert loss(state_format, TASK.num_steps) == pytest.approx(loss("fp32", TASK.num_steps), rel=LOSS_CHANGE)


def test_a_map_with_zero_for_exp_avg_sq_breaks_the_update() -> None:
    assert figures(stream(0), ZERO_MAP)["exp_avg_sq"].error > 10


def test_a_map_with_zero_for_exp_avg_sq_breaks_training() -> None:
    assert not loss(ZERO_MAP, 50) < 1.2 * loss("fp32", 50)
