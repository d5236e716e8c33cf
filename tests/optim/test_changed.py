"""What is remembered between steps does not outlive its reasons: everything may change before the next step."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from packlight.optim import SGD, AdamW

SIZE = (64, 256)


def trained(steps: int = 2, **options: object) -> tuple[torch.nn.Parameter, AdamW]:
    """A parameter after a few steps, small enough that kernels are called without the dispatcher."""
    dtype = torch.bfloat16 if "bf16_rounding" in options else torch.float32
    param = torch.nn.Parameter(torch.randn(SIZE).to(dtype))
    optimizer = AdamW([param], lr=1e-2, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        step(param, optimizer, torch.randn(SIZE).to(dtype))
    return param, optimizer


def step(param: Tensor, optimizer: torch.optim.Optimizer, grad: Tensor) -> None:
    param.grad = grad
    optimizer.step()


def twin(seed: int, **options: object) -> Callable[[], tuple[torch.nn.Parameter, AdamW]]:
    def make() -> tuple[torch.nn.Parameter, AdamW]:
        torch.manual_seed(seed)
        return trained(**options)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8", "fp32"])
@pytest.mark.parametrize(
    "lay",
    [
        lambda grad: grad.t().contiguous().t(),
        lambda grad: torch.stack([grad, grad], 2)[..., 0],
        lambda grad: (-torch.complex(torch.zeros_like(grad), grad)).conj().imag,
    ],
    ids=["transposed", "strided", "negative view"],
)
def test_a_gradient_laid_out_otherwise_is_read_as_what_it_is(
    lay: Callable[[Tensor], Tensor], state_format: str, seed: int
) -> None:
    (one, first), (other, second) = twin(seed, state_format=state_format)(), twin(seed, state_format=state_format)()
    grad = torch.randn(SIZE)
    step(one, first, grad)
    step(other, second, lay(grad))
    assert torch.equal(lay(grad), grad)
    assert torch.equal(one, other)


def test_a_rounding_that_is_changed_after_the_first_step_is_refused_with_everything_as_it_was(seed: int) -> None:
    for before, after in (("nearest", "master32"), ("master24", "master32"), ("master32", "nearest")):
        param, optimizer = trained(bf16_rounding=before)
        old = param.detach().clone()
        optimizer.param_groups[0]["bf16_rounding"] = after
        with pytest.raises(ValueError, match="error bits"):
            step(param, optimizer, torch.randn(SIZE).bfloat16())
        assert torch.equal(param, old)
        assert float(optimizer.state[param]["step"]) == 2


def test_states_that_were_left_on_another_device_are_refused(seed: int) -> None:
    param, optimizer = trained(state_format="4bit")
    state = optimizer.state[param]
    state["exp_avg_codes"] = state["exp_avg_codes"].to("meta")
    with pytest.raises(ValueError, match="on meta came"):
        step(param, optimizer, torch.randn(SIZE))


def test_a_state_without_one_of_its_tensors_is_refused_by_its_name(seed: int) -> None:
    param, optimizer = trained(state_format="4bit")
    name = next(key for key in optimizer.state[param] if key.startswith("exp_avg_sq_") and "codes" not in key)
    del optimizer.state[param][name]
    with pytest.raises(ValueError, match="Remove the parameter's state"):
        step(param, optimizer, torch.randn(SIZE))


def test_a_seed_that_is_changed_changes_the_next_step(seed: int) -> None:
    make = twin(seed, state_format="4bit", bf16_rounding="stochastic")
    (one, first), (other, second), (third_param, third) = make(), make(), make()
    first.param_groups[0]["seed"] = second.param_groups[0]["seed"] = 99
    grad = torch.randn(SIZE).bfloat16()
    step(one, first, grad)
    step(other, second, grad)
    step(third_param, third, grad)
    assert torch.equal(one, other)
    assert not torch.equal(one, third_param)


def test_a_group_that_is_replaced_by_another_dictionary_is_read(seed: int) -> None:
    param, optimizer = trained(state_format="fp32")
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0, "weight_decay": 0.0}
    old = param.detach().clone()
    step(param, optimizer, torch.randn(SIZE))
    assert torch.equal(param, old)


def test_a_group_added_between_steps_is_stepped_and_leaves_the_others_their_noise(seed: int) -> None:
    make = twin(seed, state_format="4bit", bf16_rounding="stochastic")
    (one, first), (other, second) = make(), make()
    added = torch.nn.Parameter(torch.ones(SIZE))
    first.add_param_group({"params": [added]})
    grad = torch.randn(SIZE).bfloat16()
    added.grad = torch.ones(SIZE)
    step(one, first, grad)
    step(other, second, grad)
    assert torch.equal(one, other)
    assert not torch.equal(added, torch.ones(SIZE))


def test_momentum_switched_on_later_starts_from_the_gradient(seed: int) -> None:
    param = torch.nn.Parameter(torch.randn(SIZE))
    twin_param = torch.nn.Parameter(param.detach().clone())
    ours, theirs = SGD([param], lr=0.1, state_format="fp32"), torch.optim.SGD([twin_param], lr=0.1)
    for momentum in (0.0, 0.9, 0.9):
        grad = torch.randn(SIZE)
        for optimizer, each in ((ours, param), (theirs, twin_param)):
            optimizer.param_groups[0]["momentum"] = momentum
            step(each, optimizer, grad)
    torch.testing.assert_close(param, twin_param, rtol=1e-6, atol=1e-6)


def test_gradients_are_freed_between_steps(seed: int) -> None:
    param, optimizer = trained()
    param.grad = torch.randn(SIZE)
    optimizer.step()
    gradient = weakref.ref(param.grad)
    optimizer.zero_grad()
    assert gradient() is None


Change = Callable[[torch.nn.Parameter, AdamW], None]


def _moments_are_replaced(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    optimizer.state[param]["exp_avg_codes"] = optimizer.state[param]["exp_avg_codes"].clone().zero_()


def _moments_are_moved(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    codes = optimizer.state[param]["exp_avg_codes"]
    codes.data = codes.flip(0)


def _steps_are_counted(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    optimizer.state[param]["step"] += 5


def _state_is_forgotten(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    del optimizer.state[param]


def _parameter_is_moved(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    param.data = param.data + 1


def _dtype_is_changed(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    param.data = param.data.bfloat16()


def _a_group_comes(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1})


def _hyper_parameters_are_changed(param: torch.nn.Parameter, optimizer: AdamW) -> None:
    optimizer.param_groups[0].update(lr=0.3, betas=(0.5, 0.5), weight_decay=0.5)


@pytest.mark.parametrize(
    "change",
    [
        *(_moments_are_replaced, _moments_are_moved, _steps_are_counted, _state_is_forgotten),
        *(_parameter_is_moved, _dtype_is_changed, _a_group_comes, _hyper_parameters_are_changed),
    ],
)
def test_a_change_between_steps_is_seen_as_by_an_optimiser_that_remembers_nothing(change: Change, seed: int) -> None:
    make = twin(seed, state_format="4bit", bf16_rounding="nearest")
    (one, first), (other, second) = make(), make()
    for param, optimizer in ((one, first), (other, second)):
        change(param, optimizer)
    second._roster.clear()
    for _ in range(2):
        grad = torch.randn(SIZE).to(one.dtype)
        step(one, first, grad)
        step(other, second, grad.clone())
    assert torch.equal(one, other)
    states = first.state[one], second.state[other]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_parameters_that_take_turns_are_stepped_as_each_alone(seed: int) -> None:
    params = [torch.nn.Parameter(torch.randn(SIZE)) for _ in range(3)]
    alone = [torch.nn.Parameter(param.detach().clone()) for param in params]
    together = AdamW(params, lr=1e-2, state_format="fp32")
    optimizers = [AdamW([param], lr=1e-2, state_format="fp32") for param in alone]
    for active in ([0, 1, 2], [0, 1, 2], [0, 2], [0, 2], [1], [0, 1, 2], [0, 1, 2]):
        for index, (param, twin_param) in enumerate(zip(params, alone, strict=True)):
            param.grad = torch.randn(SIZE) if index in active else None
            twin_param.grad = None if param.grad is None else param.grad.clone()
        together.step()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


def test_a_step_that_failed_leaves_nothing_behind(seed: int) -> None:
    (one, first), (other, second) = twin(seed, state_format="4bit")(), twin(seed, state_format="4bit")()
    one.grad = torch.randn(SIZE).to_sparse()
    with pytest.raises(ValueError, match="sparse=False"):
        first.step()
    grad = torch.randn(SIZE)
    step(one, first, grad)
    step(other, second, grad)
    assert torch.equal(one, other)


@pytest.mark.parametrize("make", [lambda params: AdamW(params), lambda params: SGD(params, momentum=0.9), SGD])
def test_a_default_device_does_not_matter(make: Callable[[object], torch.optim.Optimizer], seed: int) -> None:
    one = torch.nn.Parameter(torch.randn(SIZE))
    other = torch.nn.Parameter(one.detach().clone())
    first, second = make([one]), make([other])
    for _ in range(2):
        grad = torch.randn(SIZE)
        step(other, second, grad)
        with torch.device("meta"):
            step(one, first, grad)
            first.load_state_dict(first.state_dict())
    assert torch.equal(one, other)
    assert all(value.is_cpu for state in first.state.values() for value in state.values())
