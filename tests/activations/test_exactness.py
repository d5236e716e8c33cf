"""Keep, recompute, offload and bits change no bit of a loss or a gradient, whatever the model and the loop do."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from packlight.activations.engine import Engine
from tests.activations.cases import (
    DISK,
    EXACT,
    MODELS,
    NUM_STEPS,
    MemoryTier,
    assert_equal,
    bf16,
    engine,
    numbers,
    train,
    twins,
)
from tests.cases import Case, ConvNet, GPTBlock, digits

pytestmark = pytest.mark.usefixtures("seed")


def assert_trains_alike(name: str, how: str, **loop: Any) -> None:
    plain, ours = twins(name)
    expected = list(train(plain, **loop))
    with engine(ours.model, how):
        got = list(train(ours, **loop))
    assert len(got) == NUM_STEPS
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(mine, theirs)


def assert_alike(name: str, how: str, step: Callable[[Case], list[Tensor]]) -> None:
    """Compare what one step returns, and the numbers that it leaves."""
    left = []
    for case, active in zip(twins(name), (False, True), strict=True):
        with engine(case.model, how) if active else nullcontext():
            torch.manual_seed(0)
            left.append([*step(case), *numbers(case.model)])
    assert_equal(*left)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_buffers_and_random_state_are_bit_equal(name: str, how: str) -> None:
    assert_trains_alike(name, how)


@pytest.mark.parametrize("draw", [1, 2])
@pytest.mark.parametrize("how", [each for each in EXACT if each != "keep"])
@pytest.mark.parametrize("name", ["tied", "vit", "convnet", "experts"])
def test_other_weights_and_batches_are_bit_equal_too(name: str, how: str, draw: int, seed: int) -> None:
    torch.manual_seed(seed + draw)
    assert_trains_alike(name, how)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize(
    "name",
    [
        *("gpt", "llama", "bert", "convnet", "lora", "vit", "tied", "lstm"),
        pytest.param("experts", marks=pytest.mark.slow),  # many small products, which some CPUs take long for in bf16
    ],
)
def test_bit_equal_under_bf16_autocast(name: str, how: str) -> None:
    if name == "lstm" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no LSTM in bf16 for a CPU without AVX-512")
    assert_trains_alike(name, how, context=bf16)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["gpt", "bert", "convnet", "tied"])
def test_bit_equal_with_gradient_accumulation(name: str, how: str) -> None:
    assert_trains_alike(name, how, num_microbatches=3)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["bert", "convnet"])
def test_bit_equal_under_the_user_s_own_saved_tensor_hooks(name: str, how: str) -> None:
    assert_trains_alike(name, how, context=torch.autograd.graph.save_on_cpu)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["gpt", "bert", "convnet", "lstm", "experts"])
def test_two_backward_passes_through_one_forward_are_bit_equal(name: str, how: str) -> None:
    def step(case: Case) -> list[Tensor]:
        loss = case.value()
        loss.backward(retain_graph=True)
        once = numbers(case.model)
        loss.backward()
        return [loss.detach(), *once]

    assert_alike(name, how, step)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["mlp", "convnet", "moe", "gpt"])
def test_double_backward_is_bit_equal(name: str, how: str) -> None:
    """With attention by matrix products: torch's fused kernels have no second derivative."""

    def step(case: Case) -> list[Tensor]:
        parameters = list(case.model.parameters())
        loss = case.value()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        slope = torch.stack([each.square().sum() for each in first]).sum()
        second = torch.autograd.grad(slope, parameters, retain_graph=True)
        (loss + slope).backward()
        return [*(each.detach() for each in first), *second]

    with sdpa_kernel(SDPBackend.MATH):
        assert_alike(name, how, step)


@pytest.mark.parametrize("how", EXACT)
def test_gradients_with_respect_to_the_input_are_bit_equal_and_twice(how: str) -> None:
    def step(case: Case) -> list[Tensor]:
        images = case.batch.clone().requires_grad_()
        loss = case.loss(case.model(images), images)
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        (again,) = torch.autograd.grad(loss, images, retain_graph=True)
        slope.square().sum().backward()
        assert images.grad is not None
        return [slope.detach(), again, images.grad]

    assert_alike("convnet", how, step)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("name", ["gpt", "bert", "experts"])
def test_microbatches_whose_backward_comes_in_either_order_are_bit_equal(name: str, last_first: bool, how: str) -> None:
    def step(case: Case) -> list[Tensor]:
        losses = [case.value() for _ in range(3)]
        for loss in losses[::-1] if last_first else losses:
            loss.backward()
        return [loss.detach() for loss in losses]

    assert_alike(name, how, step)


@pytest.mark.parametrize("how", ["compress", *DISK])
@pytest.mark.parametrize("name", ["bert", "convnet", "flat"])
def test_evaluation_between_forward_and_backward_is_bit_equal(name: str, how: str) -> None:
    def step(case: Case) -> list[Tensor]:
        loss = case.value()
        case.model.eval()
        with torch.no_grad():
            evaluated = case.value()
        with torch.inference_mode():
            inferred = case.value().clone()
        with_graph = case.value()  # and dropped
        case.model.train()
        loss.backward()
        return [loss.detach(), evaluated, inferred, with_graph.detach()]

    assert_alike(name, how, step)


class SelfCheckpointed(nn.Module):
    """A model whose author checkpoints its blocks."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(GPTBlock(32, 2) for _ in range(3))
        self.drop = nn.Dropout(0.2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x).relu())
        for block in self.blocks:
            x = checkpoint(self._run, block, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(x)
        return out

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = self.drop(block(x).relu())
        return out


def _square(output: Tensor, _: object) -> Tensor:
    return output.square().mean()


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_user_s_own_checkpoint_inside_the_model_is_bit_equal(reentrant: bool, how: str) -> None:
    case = Case(SelfCheckpointed(reentrant=reentrant), torch.randn(4, 8, 8), _square)
    _assert_alike_in_place(case, how)


@pytest.mark.parametrize("how", ["compress", *DISK])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_user_s_own_checkpoint_around_the_model_is_bit_equal(reentrant: bool, how: str) -> None:
    convnet = ConvNet(8)
    images, targets = digits(16)

    def around(output: Any, batch: Tensor) -> Tensor:
        logits = checkpoint(convnet, batch.requires_grad_(), use_reentrant=reentrant)
        return F.cross_entropy(logits, targets)

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convnet

        def forward(self, x: Tensor) -> Tensor:
            return x

    _assert_alike_in_place(Case(Nothing(), images, around), how, convnet)


def _assert_alike_in_place(case: Case, how: str, model: nn.Module | None = None) -> None:
    """Compare a step without the engine with one with it, of the same model."""
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    left = []
    for active in (False, True):
        case.model.load_state_dict(before)
        case.model.zero_grad()
        with engine(model or case.model, how) if active else nullcontext():
            torch.manual_seed(0)
            loss = case.value()
            loss.backward()
        left.append([loss.detach(), *numbers(case.model)])
    assert_equal(*left)


class Scaled(torch.autograd.Function):
    """Saves one tensor for backward, and hides another in an attribute of ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.hidden = hidden = x.sin()
        return x * scale + hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grads[0] * (scale + x.cos()), (grads[0] * (x + 0 * ctx.hidden)).sum()


class InPlace(nn.Module):
    """In-place operations that autograd allows, a custom Function, and views of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y.relu_()
        z = self.two(y)
        z += x
        z.mul_(2).sigmoid_()
        a, b = (z.t().contiguous().t() * 1).chunk(2, dim=1)  # transposed, offset
        wide = a.mean(dim=0, keepdim=True).sin().expand(x.shape[0], -1)  # broadcast
        mixed = torch.cat([a * b, wide * b], dim=1)[:, 1:][:, ::3].tanh()
        mixed = F.pad(mixed, (0, 16 - mixed.shape[1])).view_as(x)
        out: Tensor = Scaled.apply(self.three(mixed), self.scale)  # type: ignore[no-untyped-call]
        return out * torch.view_as_real(torch.view_as_complex(out.view(-1, 8, 2)).exp()).reshape(out.shape)


@pytest.mark.parametrize("how", EXACT)
def test_in_place_operations_views_and_custom_functions_are_bit_equal(how: str) -> None:
    model = nn.Sequential(InPlace(), InPlace(), nn.Sequential(InPlace(), nn.Dropout(0.1)))
    _assert_alike_in_place(Case(model, torch.randn(12, 16), _square), how)


@pytest.mark.parametrize("how", EXACT)
def test_a_functional_call_with_other_weights_is_bit_equal(how: str) -> None:
    def step(case: Case) -> list[Tensor]:
        weights = {name: (1.5 * at.detach()).requires_grad_() for name, at in case.model.named_parameters()}
        loss = case.loss(torch.func.functional_call(case.model, weights, (case.batch,)), case.batch)
        return [loss.detach(), *torch.autograd.grad(loss, list(weights.values()))]

    assert_alike("gpt", how, step)


def test_the_user_s_own_hooks_get_what_is_kept_and_nothing_that_is_taken() -> None:
    case = MODELS["gpt"]()
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    counts = []
    for choices in ({}, {"*": "keep"}, {"blocks.*": "offload"}):
        seen.clear()
        tier = MemoryTier()
        with Engine(case.model, choices, tier=tier, min_bytes=0), torch.autograd.graph.saved_tensors_hooks(pack, _same):
            case.value().backward()
        counts.append(len(seen))
    assert counts[0] == counts[1]
    assert 0 < counts[2] < counts[0] - tier.num_puts
    seen.clear()


def _same(tensor: Tensor) -> Tensor:
    return tensor


class HooksInside(nn.Module):
    """A model whose author moves what one layer saves, by torch's own means."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        with torch.autograd.graph.save_on_cpu():
            x = self.two(x).relu()
        out: Tensor = self.three(x)
        return out


@pytest.mark.parametrize("how", ["keep", "compress", "offload", "compress+offload"])
def test_the_user_s_own_hooks_inside_the_model_are_bit_equal(how: str) -> None:
    _assert_alike_in_place(Case(HooksInside(), torch.randn(6, 8), _square), how)
