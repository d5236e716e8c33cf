"""An adopted optimiser goes on as the script left it, with compact states, and in full after remove()."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from packlight.optim import AdamW, adopt, can_adopt
from packlight.optim.state import nbytes, state_bytes


class Model(nn.Module):
    """Two weights that are worth compressing, two biases that stay with torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(70, 80), nn.Linear(80, 70)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.first(inputs).tanh())
        return outputs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share among threads, and the cores are not ours alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loss_of(net: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(16, 70, generator=torch.Generator().manual_seed(step))
    loss: Tensor = net(inputs.to(next(net.parameters()).dtype)).float().square().mean()
    return loss


def train(net: nn.Module, optimizer: "torch.optim.Optimizer | Both", *, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def weights(net: Model) -> dict[Tensor, str]:
    return {net.first.weight: "4bit", net.last.weight: "4bit"}


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


class Both:
    """What an adopted torch.optim.AdamW has to equal bit for bit: packlight's for weights, torch's for biases.

    Both have all parameters, since random bits depend on a parameter's place, and see the gradients of their own.
    """

    def __init__(self, net: Model, lr: float = 1e-3) -> None:
        params = list(net.parameters())
        self.ours = AdamW(params, lr=lr, state_format="4bit")
        self.torchs = torch.optim.AdamW(params, lr=lr, foreach=False)
        self.weights, self.biases = params[::2], params[1::2]

    def zero_grad(self) -> None:
        self.ours.zero_grad()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for optimizer, others in ((self.ours, self.biases), (self.torchs, self.weights)):
            gradients = [param.grad for param in others]
            for param in others:
                param.grad = None
            optimizer.step()
            for param, gradient in zip(others, gradients, strict=True):
                param.grad = gradient
        return loss


def clip(tensors: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(tensors, 1e-3)


@pytest.mark.parametrize("option", ["single", "foreach", "fused"])
def test_adopted_optimiser_steps_as_packlights_own(option: str) -> None:
    theirs, ours = Model(), Model()
    foreach, fused = option == "foreach", option == "fused"
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=foreach, fused=fused)
    with adopt(optimizer, weights(theirs)):
        train(theirs, optimizer, steps=range(5))
    train(ours, Both(ours, lr=1e-2), steps=range(5))
    if option == "single":
        assert same(theirs, ours)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_adam_with_l2_decay_and_maximize_is_adopted_with_its_own_rule() -> None:
    net, plain = Model(), Model()
    options = {"lr": 1e-3, "weight_decay": 0.1, "maximize": True}
    adopted = torch.optim.Adam(net.parameters(), **options)  # type: ignore[arg-type]
    with adopt(adopted, weights(net)):
        train(net, adopted, steps=range(1))
    train(plain, torch.optim.Adam(plain.parameters(), **options), steps=range(1))  # type: ignore[arg-type]
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # the first update knows no rounding


def test_object_class_and_step_stay_what_they_are() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    before = (type(optimizer), optimizer.step.__func__, dict(vars(optimizer)).keys())  # type: ignore[attr-defined]
    adopt(optimizer, weights(net))
    assert before == (type(optimizer), optimizer.step.__func__, dict(vars(optimizer)).keys())  # type: ignore[attr-defined]


def test_states_shrink_and_bytes_are_known_before_the_first_step() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    handle = adopt(optimizer, weights(net))
    expected = 2 * state_bytes((70, 80), torch.float32, "4bit") + 2 * 4 + 8 * (70 + 80)
    assert handle.state_bytes() == expected
    train(net, optimizer, steps=range(1))
    assert handle.state_bytes() == expected == sum(nbytes(state) for state in optimizer.state.values())
    assert "exp_avg_codes" in optimizer.state[net.first.weight]
    assert "exp_avg" in optimizer.state[net.first.bias]


def test_gradients_are_there_after_a_step() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    adopt(optimizer, weights(net))
    loss_of(net, 0).backward()
    before = [param.grad for param in net.parameters()]
    copies = [grad.clone() for grad in before if grad is not None]
    optimizer.step()
    assert [param.grad for param in net.parameters()] == before
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True) if a is not None)


def test_gradients_come_back_when_torchs_step_raises() -> None:
    net = Model()
    embedding = nn.Embedding(5, 70, sparse=True)
    optimizer = torch.optim.AdamW([*net.parameters(), *embedding.parameters()])
    adopt(optimizer, weights(net))
    net(embedding(torch.tensor([1]))).sum().backward()
    grads = [param.grad for param in net.parameters()]
    assert None not in grads
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert [param.grad for param in net.parameters()] == grads
    assert embedding.weight.grad is not None
    embedding.requires_grad_(False)
    embedding.weight.grad = None
    optimizer.step()
    assert [param.grad for param in net.parameters()] == grads


def test_gradients_come_back_when_another_post_hook_raises() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())

    def fail(*_: object) -> None:
        raise ArithmeticError

    hook = optimizer.register_step_post_hook(fail)
    handle = adopt(optimizer, weights(net))
    loss_of(net, 0).backward()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    hook.remove()
    handle.remove()
    assert all(param.grad is not None for param in net.parameters())


def test_hooks_that_came_later_see_and_change_the_gradients_first() -> None:
    net, plain = Model(), Model()
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    adopt(optimizer, weights(net))
    optimizer.register_step_pre_hook(lambda *_: clip(list(net.parameters())))
    own = Both(plain)
    train(net, optimizer, steps=range(3))
    for step in range(3):
        own.zero_grad()
        loss_of(plain, step).backward()
        clip(list(plain.parameters()))
        own.step()
    assert same(net, plain)


def test_closure_is_called_once_with_gradients_and_its_loss_comes_back() -> None:
    net, plain = Model(), Model()
    optimizer, own = torch.optim.AdamW(net.parameters(), foreach=False), Both(plain)
    adopt(optimizer, weights(net))
    calls = []

    def closure(model: Model, one: torch.optim.Optimizer | Both) -> float:
        calls.append(torch.is_grad_enabled())
        one.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    for _ in range(2):
        assert optimizer.step(lambda: closure(net, optimizer)) == own.step(lambda: closure(plain, own))
    assert optimizer.step(closure=lambda: closure(net, optimizer)) == closure(plain, own)
    assert calls == [True] * 6


def test_closure_that_raises_changes_nothing() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    adopt(optimizer, weights(net))
    loss_of(net, 0).backward()
    before = copy.deepcopy(net)

    def fail() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fail)
    assert same(net, before)
    assert all(param.grad is not None for param in net.parameters())


def test_accumulated_gradients_are_used_once_each() -> None:
    net, plain = Model(), Model()
    optimizer, own = torch.optim.AdamW(net.parameters(), foreach=False), Both(plain)
    adopt(optimizer, weights(net))
    for model, one in ((net, optimizer), (plain, own)):
        for step in range(6):
            (loss_of(model, step) / 3).backward()
            if step % 3 == 2:
                one.step()
                one.zero_grad()
    assert same(net, plain)


def test_parameter_without_a_gradient_is_left_alone() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    adopt(optimizer, weights(net))
    before = net.last.weight.detach().clone()
    net.first(torch.ones(70)).sum().backward()
    optimizer.step()
    assert torch.equal(net.last.weight, before)
    assert net.last.weight not in optimizer.state


@pytest.mark.parametrize("before", [True, False], ids=["scheduler first", "adopt first"])
def test_scheduler_gives_the_same_rates(before: bool) -> None:
    net, plain = Model(), Model()
    optimizer, reference = (
        torch.optim.AdamW(net.parameters(), lr=1e-2),
        torch.optim.AdamW(plain.parameters(), lr=1e-2),
    )
    if not before:
        adopt(optimizer, weights(net))
    rates = []
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(one, 1e-2, total_steps=8) for one in (optimizer, reference)]
    if before:
        adopt(optimizer, weights(net))
    for step in range(8):
        train(net, optimizer, steps=range(step, step + 1))
        train(plain, reference, steps=range(step, step + 1))
        rates.append([scheduler.get_last_lr() for scheduler in schedulers])
        for scheduler in schedulers if step < 7 else ():
            scheduler.step()
    assert all(ours == theirs for ours, theirs in rates)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_unscales_and_skips_infinities(fused: bool, unscale: bool) -> None:
    net, plain = Model(), Model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    adopt(optimizer, weights(net))
    own = Both(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        if step == 1:
            assert net.last.weight.grad is not None
            net.last.weight.grad[3, 3] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            train(plain, own, steps=range(step, step + 1))
    assert float(optimizer.state[net.last.weight]["step"]) == 3
    assert scaler.get_scale() == 512.0
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class Derived(torch.optim.AdamW):
    """Not exactly torch's."""


REFUSED: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], str]] = {
    "derived class": (Derived, "Derived"),
    "other class": (torch.optim.SGD, "SGD"),
    "amsgrad": (lambda params: torch.optim.AdamW(params, amsgrad=True), "amsgrad"),
    "capturable": (lambda params: torch.optim.AdamW(params, capturable=True), "capturable"),
    "differentiable": (lambda params: torch.optim.AdamW(params, differentiable=True), "differentiable"),
    "complex": (
        lambda params: torch.optim.AdamW([*params, torch.zeros(3, dtype=torch.complex64)]),
        "complex",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adopted_is_refused_with_the_reason(case: str) -> None:
    make, reason = REFUSED[case]
    optimizer = make(list(Model().parameters()))
    assert reason in (can_adopt(optimizer) or "")
    with pytest.raises(ValueError, match=reason):
        adopt(optimizer, {})


def test_second_adoption_foreign_parameter_unknown_format_and_dtype_are_refused() -> None:
    net, other = Model(), Model()
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ValueError, match=r"shape \(80, 70\)"):
        adopt(optimizer, weights(other))
    with pytest.raises(ValueError, match="'paper4bit'"):
        adopt(optimizer, {net.first.weight: "5bit"})
    double = Model().double()
    with pytest.raises(ValueError, match="float64"):
        adopt(torch.optim.AdamW(double.parameters()), weights(double))
    assert can_adopt(optimizer) is None
    adopt(optimizer, weights(net))
    with pytest.raises(ValueError, match="already"):
        adopt(optimizer, weights(net))


def test_fp32_formats_leave_torchs_step_bit_for_bit() -> None:
    net, plain = Model(), Model()
    optimizer, reference = torch.optim.AdamW(net.parameters()), torch.optim.AdamW(plain.parameters())
    adopt(optimizer, dict.fromkeys(net.parameters(), "fp32"))
    train(net, optimizer, steps=range(5))
    train(plain, reference, steps=range(5))
    assert same(net, plain)
