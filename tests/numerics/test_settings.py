"""A step's fp32 numbers are the published constants, folded in double precision and rounded once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packlight.numerics import AdamWSettings, SGDSettings

betas = st.floats(0, 0.9999)
steps = st.integers(1, 10**6)
rates = st.floats(1e-8, 10)


def fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


@given(rates, betas, betas, st.floats(0, 1e-3), st.floats(0, 1), steps)
def test_adamw_numbers_fold_the_published_constants(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    numbers = AdamWSettings(lr, beta1, beta2, eps, weight_decay).numbers(step)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    assert (numbers.beta1, numbers.beta2, numbers.l2) == (fp32(beta1), fp32(beta2), 0)
    assert (numbers.gradient_to_m, numbers.decay) == (fp32(1 - beta1), fp32(1 - lr * weight_decay))
    # lr / correction1 * m / (root / sqrt(correction2) + eps) = m / (root * root_to_denom + denom_eps)
    assert numbers.root_to_denom == pytest.approx(correction1 / lr / math.sqrt(correction2), rel=2**-23)
    assert numbers.denom_eps == pytest.approx(eps * correction1 / lr, rel=2**-23, abs=1e-45)
    assert numbers.root_beta2**2 == pytest.approx(beta2, rel=2**-22, abs=1e-45)
    assert numbers.gradient_to_root**2 == pytest.approx(1 - beta2, rel=2**-22)


@given(rates, betas, betas, st.floats(0, 1e-3), st.floats(0, 1), st.floats(0, 100), st.booleans(), st.booleans(), steps)
def test_every_number_is_an_fp32_number(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    coefficient: float,
    maximize: bool,
    decoupled: bool,
    step: int,
) -> None:
    adamw = AdamWSettings(lr, beta1, beta2, eps, weight_decay, maximize, decoupled, coefficient).numbers(step)
    sgd = SGDSettings(lr, beta1, beta2, weight_decay, maximize, decoupled, coefficient).numbers(step)
    assert all(fp32(number) == number for number in (*adamw, *sgd))


def test_the_gradients_coefficient_is_folded_where_weight_decay_is_not_a_part_of_the_gradient() -> None:
    folded = AdamWSettings(1.0, 0.5, 0.75, coefficient=4.0, maximize=True, weight_decay=0.5).numbers(1)
    assert (folded.gradient_to_m, folded.gradient_to_root, folded.coefficient, folded.l2) == (-2.0, -2.0, -4.0, 0.0)
    kept = AdamWSettings(1.0, 0.5, 0.75, coefficient=4.0, maximize=True, weight_decay=0.5, decoupled=False).numbers(1)
    assert (kept.gradient_to_m, kept.gradient_to_root, kept.coefficient, kept.l2) == (0.5, 0.5, -4.0, 0.5)
    assert kept.decay == 1.0


def test_a_learning_rate_of_zero_makes_no_update() -> None:
    numbers = AdamWSettings(0.0, weight_decay=0.1).numbers(1)
    assert (numbers.root_to_denom, numbers.denom_eps, numbers.decay) == (0.0, math.inf, 1.0)


@pytest.mark.parametrize("lr", [1e-30, 1e-38, 1e-40, 5e-324])
def test_a_tiny_learning_rate_makes_no_nan(lr: float) -> None:
    """A root of zero, as that of a gradient of zero, times an infinite factor would be one."""
    for step in (1, 100):
        numbers = AdamWSettings(lr).numbers(step)
        assert not math.isnan(0.0 * numbers.root_to_denom)
        assert not math.isnan(1e-5 / (1e-5 * numbers.root_to_denom + numbers.denom_eps))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_sgd_numbers_fold_the_published_constants(step: int) -> None:
    numbers = SGDSettings(
        0.25, momentum=0.5, dampening=0.125, weight_decay=0.5, maximize=True, coefficient=2.0
    ).numbers(step)
    assert numbers.momentum == (0.0 if step == 1 else 0.5)  # the first step fills the buffer
    assert numbers.gradient_to_m == (1.0 if step == 1 else 0.875)
    assert (numbers.m_to_p, numbers.gradient_to_p, numbers.coefficient, numbers.l2) == (0.25, 0.0, -2.0, 0.5)


def test_nesterovs_momentum_looks_ahead() -> None:
    numbers = SGDSettings(0.25, momentum=0.5, nesterov=True).numbers(2)
    assert (numbers.m_to_p, numbers.gradient_to_p) == (0.125, 0.25)
