"""packlight's AdamW and Adam behave as torch.optim's around a step."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from packlight.numerics import FORMATS
from packlight.optim import Adam, AdamW
from packlight.optim.state import nbytes
from tests.cases import GPT, NUM_BYTES, ConvNet, windows

# Attention's key biases have a gradient of 0 but for rounding, some 1e-9: it must not become a whole step.
EPS = 1e-6

ROUNDINGS = ["stochastic", "nearest", "master24", "master32"]


def gpt(seed: int = 0) -> GPT:
    """A model whose matrices are large enough for few bits."""
    torch.manual_seed(seed)
    return GPT(width=64, num_layers=1)


def loss_of(net: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    tokens = windows(4, 32)
    logits = net(tokens).float()
    return F.cross_entropy(logits[:, :-1].reshape(-1, NUM_BYTES), tokens[:, 1:].reshape(-1))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"betas": (0.8, 0.95)}], ids=str)
def test_real_training_in_fp32_is_torchs(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = gpt(), gpt()
    own: type[AdamW] = {"AdamW": AdamW, "Adam": Adam}[kind]
    train(ours, own(ours.parameters(), **options, eps=EPS, state_format="fp32"), steps=range(3))
    train(theirs, getattr(torch.optim, kind)(theirs.parameters(), **options, eps=EPS), steps=range(3))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-5)  # a fiftieth of one step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_state_bytes_are_the_same_before_and_after_the_first_step(
    state_format: str, rounding: Any, dtype: torch.dtype, seed: int
) -> None:
    net = gpt().to(dtype)
    optimizer = AdamW(net.named_parameters(), state_format=state_format, bf16_rounding=rounding)
    predicted = optimizer.state_bytes()
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert predicted == optimizer.state_bytes() == sum(map(nbytes, optimizer.state.values()))


def test_frozen_parameter_takes_no_bytes_and_no_steps() -> None:
    net = gpt()
    net.token.requires_grad_(False)
    others = AdamW([param for name, param in net.named_parameters() if name != "token.weight"])
    optimizer = AdamW(net.parameters())
    assert optimizer.state_bytes() == others.state_bytes()
    before = net.token.weight.clone()
    train(net, optimizer, steps=range(2))
    assert torch.equal(net.token.weight, before)
    assert net.token.weight not in optimizer.state
    assert AdamW(net.requires_grad_(False).parameters()).state_bytes() == 0


def test_parameter_without_a_gradient_is_left_alone() -> None:
    net = gpt()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, steps=range(1))
    state, before = copy.deepcopy(optimizer.state[net.head.weight]), net.head.weight.clone()
    loss_of(net, 1).backward()
    net.head.weight.grad = None
    optimizer.step()
    assert torch.equal(net.head.weight, before)
    assert all(torch.equal(optimizer.state[net.head.weight][key], state[key]) for key in state)
    train(net, optimizer, steps=range(2, 3))
    assert float(optimizer.state[net.head.weight]["step"]) == 2
    assert float(optimizer.state[net.token.weight]["step"]) == 3


def test_groups_have_their_own_formats_and_options() -> None:
    net = gpt()
    optimizer = AdamW([{"params": net.token.parameters(), "state_format": "fp8", "betas": (0.5, 0.6)}], lr=1e-2)
    optimizer.add_param_group({"params": list(net.head.parameters()), "lr": 0.5, "bf16_rounding": "nearest"})
    train(net, optimizer, steps=range(2))
    assert "exp_avg_power" in optimizer.state[net.token.weight]
    assert "exp_avg_codes" in optimizer.state[net.head.weight]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.5]
    assert [group["state_formats"] for group in optimizer.param_groups] == [["fp8"], ["4bit"]]


@pytest.mark.parametrize("state_format", ["fp32", "4bit"])
def test_split_over_groups_does_not_matter_but_order_does_to_random_rounding(state_format: str) -> None:
    nets = [gpt() for _ in range(3)]
    whole, split, turned = (list(net.parameters()) for net in nets)
    groups: list[Any] = [whole, [{"params": split[:3]}, {"params": split[3:]}], turned[::-1]]
    for net, params in zip(nets, groups, strict=True):
        train(net, AdamW(params, state_format=state_format), steps=range(3))
    assert same(nets[0], nets[1])
    assert same(nets[0], nets[2]) is (state_format == "fp32")


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_matter(state_format: str, dtype: torch.dtype, threads: None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in [(301, 257), (70_001,), (5,), (40, 3000)]]
    gradients = [[torch.randn(p.shape, generator=generator).to(dtype) for p in start] for _ in range(3)]
    found = []
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        params = [nn.Parameter(param.clone()) for param in start]
        optimizer = AdamW(params, state_format=state_format)
        for step in gradients:
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient.clone()
            optimizer.step()
        found.append([*params, *(tensor for state in optimizer.state.values() for tensor in state.values())])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp32"])
def test_strides_of_parameter_and_gradient_do_not_matter(state_format: str, seed: int) -> None:
    torch.manual_seed(seed)
    nets = [ConvNet(32), ConvNet(32)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = [AdamW(net.parameters(), state_format=state_format) for net in nets]
    for _ in range(2):
        for left, right in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = torch.empty_like(right).copy_(left.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert same(*nets)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "StepLR": lambda one: lr_scheduler.StepLR(one, 2, gamma=0.1),
    "LambdaLR": lambda one: lr_scheduler.LambdaLR(one, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda one: lr_scheduler.OneCycleLR(one, 1e-2, total_steps=8),  # changes betas too
    "warm-up from 0": lambda one: lr_scheduler.LinearLR(one, start_factor=1e-9, total_iters=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scheduler_drives_ours_as_torchs(name: str, as_tensor: bool) -> None:
    ours, theirs = gpt(), gpt()
    rates = []
    for net, kind in ((ours, partial(AdamW, state_format="fp32")), (theirs, torch.optim.AdamW)):
        # A scheduler changes a tensor in place, so that each optimiser needs its own.
        optimizer = kind(net.parameters(), lr=torch.tensor(1e-3) if as_tensor else 1e-3, eps=EPS)
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(5):
            train(net, optimizer, steps=range(step, step + 1))
            scheduler.step()
            rates.append((float(scheduler.get_last_lr()[0]), optimizer.param_groups[0]["betas"]))
    assert rates[:5] == rates[5:]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)  # a hundredth of the largest steps


def test_learning_rate_of_zero_changes_states_only() -> None:
    net = gpt()
    before, optimizer = copy.deepcopy(net), AdamW(net.parameters(), lr=0.0)
    train(net, optimizer, steps=range(2))
    assert same(net, before)
    assert float(optimizer.state[net.head.weight]["exp_avg_scale"].max()) > 0


def test_closure_is_called_once_with_gradients_and_hooks_run_around_the_step() -> None:
    net, events = gpt(), []
    optimizer = AdamW(net.parameters())
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    optimizer.register_step_post_hook(lambda *_: events.append("after"))

    def closure() -> float:
        events.append(f"closure {torch.is_grad_enabled()}")
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(3)]
    assert events == ["before", "closure True", "after"] * 3
    assert losses == sorted(losses, reverse=True)
    assert optimizer.step() is None


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "amsgrad": (lambda: AdamW(gpt().parameters(), amsgrad=True), "amsgrad=False"),  # type: ignore[arg-type]
    "differentiable": (lambda: AdamW(gpt().parameters(), differentiable=True), "differentiable"),  # type: ignore[arg-type]
    "amsgrad of a group": (lambda: AdamW([{"params": gpt().parameters(), "amsgrad": True}]), "amsgrad=False"),
    "complex": (lambda: AdamW([torch.zeros(3, dtype=torch.complex64)]), "complex64"),
    "double": (lambda: Adam([torch.zeros(3, dtype=torch.float64)]), "float64"),
    "unknown format": (lambda: AdamW(gpt().parameters(), state_format="5bit"), "'paper4bit'"),
    "unknown format of a group": (lambda: AdamW([{"params": gpt().parameters(), "state_format": "5bit"}]), "5bit"),
    "no names": (lambda: AdamW(gpt().parameters(), state_format={"w": "fp32"}), "named_parameters"),
    "missing name": (lambda: AdamW(gpt().named_parameters(), state_format={"w": "fp32"}), r"token\.weight"),
    "negative lr": (lambda: AdamW(gpt().parameters(), lr=-1.0), "lr"),
    "lr that is no number": (lambda: AdamW(gpt().parameters(), lr=math.nan), "lr"),
    "lr of two elements": (lambda: AdamW(gpt().parameters(), lr=torch.ones(2)), "one element"),
    "negative decay": (lambda: AdamW(gpt().parameters(), weight_decay=-1.0), "weight_decay"),
    "negative eps": (lambda: AdamW(gpt().parameters(), eps=-1.0), "eps"),
    "beta of 1": (lambda: AdamW(gpt().parameters(), betas=(0.9, 1.0)), "betas"),
    "rounding": (lambda: AdamW(gpt().parameters(), bf16_rounding="x"), "master24"),  # type: ignore[arg-type]
    "format of state_dict": (lambda: AdamW(gpt().parameters()).state_dict(format="x"), "portable"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused(case: str) -> None:
    make, match = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "group",
    [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"amsgrad": True}, {"state_format": "5bit"}, {"bf16_rounding": "x"}],
    ids=str,
)
def test_refused_group_is_not_added(group: dict[str, Any]) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))], **group})
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("sparse_first", [True, False])
def test_sparse_gradient_is_refused_with_everything_as_it_was(sparse_first: bool) -> None:
    embedding, dense = nn.Embedding(100, 70, sparse=True), nn.Linear(70, 70)
    modules = [embedding, dense] if sparse_first else [dense, embedding]
    optimizer = AdamW([{"params": module.parameters()} for module in modules])
    before = copy.deepcopy([list(module.parameters()) for module in modules])
    dense(embedding(torch.tensor([1]))).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state
    after = [list(module.parameters()) for module in modules]
    assert all(
        torch.equal(a, b) for left, right in zip(before, after, strict=True) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_infinity_shows_in_the_parameter_and_stays(state_format: str, bad: float, seed: int) -> None:
    param = nn.Parameter(torch.randn(200, 150))
    optimizer = AdamW([param], state_format=state_format)
    for step in range(4):
        param.grad = torch.randn(200, 150)
        if step == 1:
            param.grad[3, 5] = bad
        optimizer.step()
        assert bool(param[3, 5].isfinite()) is (step == 0)
    spoilt = ~param.detach().isfinite().flatten()
    if state_format in ("4bit", "8bit", "fp8", "fp32"):
        # From the next step on the whole block, and nothing else.
        block = {"fp32": 1, "8bit": 32}.get(state_format, 128)
        at = (3 * 150 + 5) // block * block
        assert bool(spoilt[at : at + block].all())
        assert int(spoilt.sum()) == block


def bf16_walk(
    rounding: Any, *, lr: float, num_steps: int, seed: int, state_format: str = "4bit"
) -> tuple[AdamW, Tensor]:
    """Train one bf16 weight by AdamW on random gradients with a drift; returns the optimiser and the weight."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if rounding == "fp32" else torch.bfloat16
    start = (1 + torch.rand(128, 160, generator=generator)).bfloat16()  # from 1 to 2 all steps of bf16 are 2^-7
    param = nn.Parameter(start.to(dtype))
    options = {} if rounding == "fp32" else {"bf16_rounding": rounding}
    optimizer = AdamW([param], lr=lr, weight_decay=0.0, state_format=state_format, **options)
    for _ in range(num_steps):
        gradient = 1 + torch.randn(128, 160, generator=generator).bfloat16() / 4
        param.grad = gradient.to(dtype)
        optimizer.step()
    return optimizer, param.detach()


def test_stochastic_rounding_follows_fp32_training_on_average_where_nearest_stalls(seed: int) -> None:
    lr, num_steps = 1e-4, 64  # a step of 1e-4 is a fortieth of half of bf16's 2^-7
    fp32 = bf16_walk("fp32", lr=lr, num_steps=num_steps, seed=seed)[1]
    start = bf16_walk("fp32", lr=0.0, num_steps=1, seed=seed)[1]
    nearest = bf16_walk("nearest", lr=lr, num_steps=num_steps, seed=seed)[1]
    stochastic = bf16_walk("stochastic", lr=lr, num_steps=num_steps, seed=seed)[1].float()
    assert torch.equal(nearest.float(), start)
    assert float((fp32 - start).mean()) == pytest.approx(-lr * num_steps, rel=0.1)
    # One rounding has a variance of u (1 - u) 2^-14 at u = lr / 2^-7, and no bias but the 2^-16 of its bits: the
    # mean over n elements stays within five standard deviations.
    spread = 2.0**-7 * math.sqrt(num_steps * (lr * 2**7) / fp32.numel())
    bias = num_steps * 2.0**-23
    assert abs(float((stochastic - fp32).mean())) <= 5 * spread + bias


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8", "fp32"])
def test_master32_is_fp32_training_bit_for_bit(state_format: str, seed: int) -> None:
    fp32 = bf16_walk("fp32", lr=1e-3, num_steps=20, seed=seed, state_format=state_format)[1]
    optimizer, param = bf16_walk("master32", lr=1e-3, num_steps=20, seed=seed, state_format=state_format)
    (state,) = optimizer.state.values()
    bits = param.view(torch.int16).to(torch.int32) << 16
    assert torch.equal((bits + state["param_error"].view(128, 160).to(torch.int32)).view(torch.float32), fp32)
    ties = (fp32.view(torch.int32) & 0xFFFF) == 0x8000  # halfway: away from zero here, to even in PyTorch
    assert torch.equal(param[~ties], fp32.bfloat16()[~ties])


def test_master24_stays_within_its_bound_of_fp32_training(seed: int) -> None:
    num_steps = 20
    fp32 = bf16_walk("fp32", lr=1e-3, num_steps=num_steps, seed=seed, state_format="fp32")[1]
    optimizer, param = bf16_walk("master24", lr=1e-3, num_steps=num_steps, seed=seed, state_format="fp32")
    (state,) = optimizer.state.values()
    bits = (param.view(torch.int16).to(torch.int32) << 16) + (state["param_error"].view(128, 160).to(torch.int32) << 8)
    # Each step rounds to 16 significant bits: half of 2^-15 for numbers from 1 to 2, a whole one at the clamp.
    assert float((bits.view(torch.float32) - fp32).abs().max()) <= num_steps * 2.0**-15
    assert float((param.float() - fp32).abs().max()) <= 2.0**-8 + num_steps * 2.0**-15
    assert state["param_error"].dtype == torch.int8
