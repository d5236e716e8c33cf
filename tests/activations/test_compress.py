"""What is rounded, what stays exact because of the functions around it, and how far gradients are off at most."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from packlight.activations.compress import Encoded
from packlight.activations.engine import Engine
from packlight.activations.groups import Group, SavedParts, SavedView
from packlight.numerics.groups import GROUP_FORMATS, encode, worst_error
from tests.activations.cases import everywhere

pytestmark = pytest.mark.usefixtures("seed")
by_codec = pytest.mark.parametrize("codec", GROUP_FORMATS)

ROWS, WIDTH = 64, 32
NUM_STEPS = 2  # the second knows the sites of the first
Function = Callable[[Tensor], Tensor]


class Calls(nn.Module):
    """A function of an activation that has the shape of the weight."""

    def __init__(self, function: Function, shape: tuple[int, ...] = (ROWS, WIDTH), *, low: float = -math.inf) -> None:
        super().__init__()
        drawn = torch.randn(shape) if low == -math.inf else low * 4 ** torch.rand(shape)
        self.weight, self.function = nn.Parameter(drawn), function

    def forward(self, ones: Tensor) -> Tensor:
        return self.function(self.weight * ones).sum()


def gradient(model: Calls) -> Tensor:
    model.zero_grad()
    model(torch.ones_like(model.weight)).backward()
    assert model.weight.grad is not None
    return model.weight.grad.clone()


def assert_exact(model: Calls, codec: str) -> None:
    plain = gradient(model)
    with everywhere(model, "compress", codec=codec):
        for _ in range(NUM_STEPS):
            assert torch.equal(gradient(model), plain)


def worst(tensor: Tensor, codec: str) -> Tensor:
    """Return how far the codes of a tensor that fills its storage may be off, for each element."""
    fmt, bound = GROUP_FORMATS[codec], worst_error(GROUP_FORMATS[codec])
    scales = encode(tensor.detach().reshape(-1), fmt)[1].float().abs()
    scale = scales.repeat_interleave(fmt.group_elements or tensor.numel())[: tensor.numel()].view(tensor.shape)
    return torch.maximum(bound.relative * tensor.detach().abs(), bound.steps * scale)


def taken(loss: Tensor) -> list[SavedView | SavedParts]:
    """Return what the engine holds for a graph."""
    found, nodes, seen = [], [loss.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            packed = getattr(getattr(node, name), "data", None) if name.startswith("_raw_saved_") else None
            if isinstance(packed, SavedView | SavedParts):
                found.append(packed)
        nodes += [each for each, _ in node.next_functions]
    return found


def is_rounded(group: Group) -> bool:
    return isinstance(group._held, Encoded) and group._held.is_rounded


# Linear functions


@by_codec
def test_a_linear_layer_s_weight_gradient_is_no_further_off_than_its_input_s_codes(codec: str) -> None:
    model = nn.Sequential(nn.Linear(24, WIDTH), nn.Linear(WIDTH, 16))
    x, above = torch.randn(ROWS, 24), torch.randn(ROWS, 16)
    found = []
    for choice in ("keep", "compress"):
        model.zero_grad()
        with everywhere(model, choice, codec=codec):
            (model(x) * above).sum().backward()
        found.append([each.grad.clone() for each in model.parameters()])  # type: ignore[union-attr]
    plain, ours = found
    error = (ours[2] - plain[2]).abs()
    assert bool((error <= above.abs().t() @ worst(model[0](x), codec) + 1e-4).all())
    assert bool(error.any())
    assert all(torch.equal(ours[at], plain[at]) for at in (0, 1, 3))  # they need no activation


@by_codec
def test_views_of_one_result_are_rounded_once_for_all(codec: str) -> None:
    def function(y: Tensor) -> Tensor:
        left, right = (y * 2).chunk(2, 1)
        return left * right

    model = Calls(function)
    with everywhere(model, "compress", codec=codec):
        views = taken(model(torch.ones_like(model.weight)))
    groups = {each.group for each in views if isinstance(each, SavedView)}
    assert len(views) == 2 and len(groups) == 1 and all(map(is_rounded, groups))


# Functions that compare what they save with what they return


def _scattered(y: Tensor) -> Tensor:
    index = torch.arange(WIDTH).expand(ROWS, WIDTH) % 4
    return torch.zeros(ROWS, 4).scatter_reduce(1, index, y, "amax", include_self=False)


COMPARING: dict[str, Function] = {
    "amax": lambda y: y.amax(-1),
    "amin": lambda y: y.amin(-1),
    "aminmax": lambda y: torch.stack(torch.aminmax(y, dim=-1)),
    "max": lambda y: y.max(),
    "min": lambda y: y.min(),
    "median": lambda y: y.median(),
    "nanmedian": lambda y: y.nanmedian(),
    "norm": lambda y: y.norm(3),
    "largest norm": lambda y: torch.linalg.vector_norm(y, math.inf, dim=-1),
    "matrix norm": lambda y: torch.linalg.matrix_norm(y, math.inf),
    "nuclear norm": lambda y: torch.linalg.matrix_norm(y, "nuc"),
    "dist": lambda y: torch.dist(y[:32], y[32:] * 2),
    "cdist": lambda y: torch.cdist(y[:32], y[32:] * 2),
    "prod": lambda y: (1 + 0.1 * y).prod(-1),
    "cumprod": lambda y: (1 + 0.1 * y).cumprod(-1),
    "logsumexp": lambda y: (30 * y).logsumexp(-1),
    "logsumexp of a mask": lambda y: (30 * y).masked_fill(y < 0, -math.inf).logsumexp(-1),
    "logcumsumexp": lambda y: (30 * y).logcumsumexp(-1),
    "scatter_reduce": _scattered,
}


@by_codec
@pytest.mark.parametrize("name", COMPARING)
def test_what_a_function_compares_with_its_result_stays_exact(name: str, codec: str) -> None:
    assert_exact(Calls(COMPARING[name]), codec)


def _attention(sharpness: float, backend: SDPBackend) -> Function:
    def function(y: Tensor) -> Tensor:
        found: Tensor
        query, key, value = y.view(3, 1, 4, 32, 16)
        with sdpa_kernel(backend):
            found = F.scaled_dot_product_attention(query * sharpness, key * sharpness, value * 2)
        return found * found

    return function


@by_codec
@pytest.mark.parametrize("sharpness", [1.0, 8.0, 64.0])
def test_attention_beside_its_log_sum_exp_stays_exact(sharpness: float, codec: str) -> None:
    assert_exact(Calls(_attention(sharpness, SDPBackend.FLASH_ATTENTION), (3, 1, 4, 32, 16)), codec)


@by_codec
def test_attention_is_exact_in_the_first_step_in_which_it_comes(codec: str) -> None:
    attention, is_on = _attention(8.0, SDPBackend.FLASH_ATTENTION), False
    model = Calls(lambda y: attention(y) if is_on else y * y, (3, 1, 4, 32, 16))
    with everywhere(model, "compress", codec=codec):
        gradient(model)
        is_on = True
        ours = gradient(model)
    assert torch.equal(ours, gradient(model))


@by_codec
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_attention_with_explicit_scores_is_off_by_its_keys_codes_at_most(sharpness: float, codec: str) -> None:
    query, key, value, above = torch.randn(4, 4, 32, 16)
    query, key = query * sharpness, key * sharpness

    def function(y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            found: Tensor = F.scaled_dot_product_attention(y, key, value) * above
        return found

    weights = (query @ key.mT / 4).softmax(-1)
    towards = above @ value.mT
    scores = weights * (towards - (towards * weights).sum(-1, keepdim=True)) / 4
    model = Calls(function, (4, 32, 16))
    model.weight.data.copy_(query)
    plain = gradient(model)
    with everywhere(model, "compress", codec=codec):
        ours = gradient(model)
    bound = scores.abs() @ worst(key, codec) * 1.02  # the scale of another multiple may be rounded further up
    assert bool(((ours - plain).abs() <= bound + 1e-4 * plain.abs().max()).all())


class FlashAttnFunc(torch.autograd.Function):
    """Attention of another library, as far as names and order of saves go."""

    order = "qkol"

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.mT
        saves = {"q": query, "k": key, "o": scores.exp().sum(-1), "l": scores.logsumexp(-1)}
        ctx.save_for_backward(*[saves[name] for name in FlashAttnFunc.order])
        return saves["o"]

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor]:
        saves = dict(zip(FlashAttnFunc.order, ctx.saved_tensors, strict=True))
        weights = (saves["q"] @ saves["k"].mT - saves["l"][..., None]).exp() * (above * saves["o"])[..., None]
        return weights @ saves["k"], weights.mT @ saves["q"]


@by_codec
@pytest.mark.parametrize("order", ["qkol", "qokl", "okql"])
def test_attention_of_other_libraries_stays_exact(order: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashAttnFunc, "order", order)
    attention: Any = FlashAttnFunc.apply
    assert_exact(Calls(lambda y: attention(0.2 * y, 0.3 * y).log(), (4, 32, 16)), codec)


@by_codec
def test_codes_on_their_way_to_a_tier_are_taken_back(codec: str) -> None:
    model = Calls(_attention(8.0, SDPBackend.FLASH_ATTENTION), (3, 1, 4, 32, 16))
    plain = gradient(model)
    with everywhere(model, "compress+offload", codec=codec) as handle:
        for _ in range(NUM_STEPS):
            assert torch.equal(gradient(model), plain)
        assert handle.tier is not None
        handle.tier.flush()
        assert handle.tier.traffic().stored_bytes == 0


@by_codec
def test_attention_in_a_block_that_is_recomputed_around_encoded_sites_is_exact(codec: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing, self.attention = nn.Linear(16, 16), _attention(8.0, SDPBackend.FLASH_ATTENTION)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(self.mixing(x).expand(3, 1, 4, 32, 16))[0]

    blocks, x = [Block(), Block()], torch.randn(4, 32, 16)
    model, bias = nn.Sequential(nn.Linear(16, 16), *blocks), blocks[1].mixing.bias
    (plain,) = torch.autograd.grad(model(x).sum(), bias)
    with Engine(model, {"1": "recompute", "2": "recompute", "*" * 40: "compress"}, codec=codec, min_bytes=0):
        for _ in range(NUM_STEPS):
            (ours,) = torch.autograd.grad(model(x).sum(), bias)
            assert torch.equal(ours, plain)


@by_codec
def test_a_block_is_run_again_from_what_it_was_given_though_that_was_encoded_before(codec: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.weight = (
                nn.Sequential(nn.GELU(), nn.Linear(16, 16), nn.Tanh()),
                nn.Parameter(torch.randn(16)),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            beside = y.square()  # saves the block's input before the block does
            found: Tensor = self.block(y) + 0 * beside
            return found

    model, x = Model(), torch.randn(64, 16)
    plain = torch.autograd.grad(model(x).sum(), model.weight)[0]
    with Engine(model, {"*": "compress", "block": "recompute"}, codec=codec, min_bytes=0):
        for _ in range(NUM_STEPS):
            assert torch.equal(torch.autograd.grad(model(x).sum(), model.weight)[0], plain)


def test_of_what_is_taken_back_nothing_but_the_original_is_held() -> None:
    model = Calls(lambda y: (y * y).logsumexp(-1))
    with everywhere(model, "compress", codec="int8"):
        loss = model(torch.ones_like(model.weight))
        held = {each.group._held for each in taken(loss) if isinstance(each, SavedView)}
        exact = [each for each in held if isinstance(each, Encoded) and not each.is_rounded]
        assert len(held) == 2 and len(exact) == 1 and exact[0].num_bytes == 0
        loss.backward()
        again = {each.group for each in taken(model(torch.ones_like(model.weight))) if isinstance(each, SavedView)}
        assert len(again) == 1 and all(map(is_rounded, again))  # the square's own input


def test_a_write_to_what_was_taken_back_raises_what_autograd_raises() -> None:
    def function(y: Tensor) -> Tensor:
        scores = y * 2
        found = scores.logsumexp(-1)
        scores.mul_(3)
        return found

    model = Calls(function)
    with everywhere(model, "compress", codec="fp8"):
        for _ in range(NUM_STEPS):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradient(model)


def test_a_write_between_two_backward_passes_raises_what_autograd_raises() -> None:
    kept = []

    def function(y: Tensor) -> Tensor:
        kept.append(y * 2)
        return kept[-1].logsumexp(-1)

    model = Calls(function)
    with everywhere(model, "compress", codec="fp8"):
        loss = model(torch.ones_like(model.weight))
        loss.backward(retain_graph=True)
        with torch.no_grad():
            kept[0].mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Functions that divide by what they save

DIVIDING: dict[str, Function] = {
    "log": lambda y: (y.square() + 1e-8).log(),
    "log of softplus": lambda y: F.softplus(8 * y).log(),
    "reciprocal": lambda y: 1 / (y.square() + 1e-6),
    "division": lambda y: y / (y.square() + 1e-6),
    "square root": lambda y: (y.square() + 1e-8) ** 0.5,
    "rsqrt": lambda y: (y.square() + 1e-8).rsqrt(),
    "normalize": lambda y: F.normalize(y, dim=-1)[:, 0],
    "deviation": lambda y: y.std(-1),
}


@by_codec
@pytest.mark.parametrize("name", DIVIDING)
def test_what_is_divided_by_does_not_become_zero(name: str, codec: str) -> None:
    model = Calls(DIVIDING[name])
    with everywhere(model, "compress", codec=codec):
        assert bool(gradient(model).isfinite().all())


@by_codec
def test_the_gradient_of_a_log_is_as_far_off_as_its_denominator_s_codes(codec: str) -> None:
    model = Calls(lambda y: (y * 1).log(), low=1.0)  # from 1 to 4
    plain = gradient(model)
    with everywhere(model, "compress", codec=codec):
        ours = gradient(model)
    y = model.weight.detach()
    bound = worst(y, codec) / (y * (y - worst(y, codec)))
    assert bool(((ours - plain).abs() <= bound * (1 + 1e-5) + 1e-6).all())
    assert not torch.equal(ours, plain)


# Infinities


@by_codec
def test_masked_scores_give_finite_gradients_as_far_off_as_the_codes(codec: str) -> None:
    mask = torch.rand(ROWS, WIDTH) < 0.3
    model = Calls(lambda y: torch.logaddexp(y.masked_fill(mask, -math.inf), 2 * y))
    plain = gradient(model)
    with everywhere(model, "compress", codec=codec):
        ours = gradient(model)
    y = model.weight.detach()
    off = worst(y.masked_fill(mask, -math.inf), codec).nan_to_num(posinf=0) + worst(2 * y, codec)
    assert bool(((ours - plain).abs() <= 3 * off / 4 + 1e-5).all())  # a logistic function's slope is 1/4 at most
    assert bool((ours[mask] == 2).all())


@by_codec
def test_softmax_of_masked_scores_is_exact(codec: str) -> None:
    assert_exact(Calls(lambda y: y.masked_fill(y < -1, -math.inf).softmax(-1).square()), codec)


@by_codec
def test_a_nan_stays_where_it_is(codec: str) -> None:
    model = Calls(lambda y: (y * 1).square())
    model.weight.data[3, 5] = math.nan
    with everywhere(model, "compress", codec=codec):
        isnan = gradient(model).isnan()
    assert bool(isnan[3, 5]) and int(isnan.sum()) == 1


# Storages


@by_codec
@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
def test_bytes_around_a_view_spoil_nothing(codec: str, filling: float) -> None:
    def function(y: Tensor) -> Tensor:
        buffer = torch.full((4 * ROWS, WIDTH), filling)
        buffer[ROWS : 2 * ROWS] = y
        buffer[2 * ROWS : 3 * ROWS] = y * 2
        first, second = buffer[ROWS : 2 * ROWS], buffer[2 * ROWS : 3 * ROWS]
        return first * first + second * first

    assert_exact(Calls(function), codec)


@by_codec
def test_a_buffer_that_was_filled_part_by_part_is_rounded_as_a_whole(codec: str) -> None:
    def function(y: Tensor) -> Tensor:
        buffer = torch.empty(2 * ROWS, WIDTH)
        buffer[:ROWS], buffer[ROWS:] = y, 2 * y
        return buffer.square()

    model = Calls(function)
    plain = gradient(model)
    with everywhere(model, "compress", codec=codec):
        ours = gradient(model)
    y = model.weight.detach()
    first, second = worst(torch.cat((y, 2 * y)), codec).chunk(2)
    assert bool(((ours - plain).abs() <= 2 * first + 4 * second + 1e-5).all())
    assert not torch.equal(ours, plain)


# Softmax


SPREAD: dict[str, Function] = {
    "as it is": lambda weights: weights,
    "cast": lambda weights: weights.to(torch.bfloat16),
    "a view": lambda weights: weights.view(4, -1, 32)[1:],
    "cast and expanded": lambda weights: weights.to(torch.bfloat16)[:, None].expand(4, 2, 8, 32).reshape(8, 8, 32),
}


@by_codec
@pytest.mark.parametrize("name", SPREAD)
def test_softmax_and_its_copies_stay_exact(name: str, codec: str) -> None:
    def function(y: Tensor) -> Tensor:
        scores = torch.linspace(-3, 3, 4 * 8 * 32).sin().view(4, 8, 32).requires_grad_()
        weights = SPREAD[name](scores.softmax(-1, dtype=torch.float32))
        return weights @ y[: len(weights)].to(weights.dtype)  # the gradient of y needs the weights alone

    assert_exact(Calls(function, (8, 32, 16)), codec)


# Tensors of several parts


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Scores(nn.Module):
    """Linear layers, a ReLU, and a function that compares."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x).relu())
        found: Tensor = (F.gelu(y) * y).logsumexp(-1)
        return found


@pytest.mark.filterwarnings("ignore:.*(barrier|device_id|destroy).*")
@by_codec
def test_a_dtensor_is_encoded_as_its_part_would_be(codec: str, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    plain, x = Scores(), torch.randn(ROWS, 16)
    ours = distribute_module(copy.deepcopy(plain), mesh)
    found: list[list[Any]] = []
    counts = []
    for model, batch in ((plain, x), (ours, distribute_tensor(x, mesh, [Replicate()]))):
        with everywhere(model, "compress", codec=codec):
            loss = model(batch).sum()
            counts.append(len(taken(loss)))
            assert all(isinstance(each, SavedParts) == (model is ours) for each in taken(loss))
            loss.backward()
        found.append([each.grad for each in model.parameters()])
    assert counts[0] == counts[1] > 0
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert torch.equal(mine.to_local(), theirs)


def test_choices_beside_compress_take_nothing_back() -> None:
    model = Calls(lambda y: (y * 2).logsumexp(-1))
    plain = gradient(model)
    with Engine(model, {"*": "keep"}, min_bytes=0):
        assert torch.equal(gradient(model), plain)
    with everywhere(model, "offload") as handle:
        assert torch.equal(gradient(model), plain)
        assert handle.tier is not None
        handle.tier.flush()
        assert handle.tier.traffic().bytes_out == (ROWS * WIDTH + ROWS) * 4
