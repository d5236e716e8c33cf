"""The engine takes what it may, moves it once, gives it back as it was, and leaves nothing behind."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.activations import groups, saver
from packlight.activations.blocks import find_blocks
from packlight.activations.buffers import is_recomputing
from packlight.activations.engine import Engine
from packlight.activations.offload import OffloadError, make_tier
from tests.activations.cases import (
    CPU,
    DISK,
    EXACT,
    MODELS,
    InMemory,
    MemoryTier,
    assert_equal,
    engine,
    everywhere,
    numbers,
    twins,
)
from tests.cases import GPT, Case, ConvNet, _next_byte, windows

pytestmark = pytest.mark.usefixtures("seed")


class Calls(nn.Module):
    """A model that is a function of its input and one weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], size: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def moved_bytes(model: nn.Module, *args: Tensor, **others: Any) -> int:
    """Return how many bytes one forward puts on a disk."""
    with everywhere(model, "offload", **others) as handle:
        loss = model(*args).sum()
        assert handle.tier is not None
        handle.tier.flush()
        moved = handle.tier.traffic().bytes_out
        loss.backward()
    return moved


# What is taken


def test_a_storage_that_is_saved_many_times_is_moved_once() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = x * weight  # saves x, which is the caller's, and the weight
        left, right = y.view(2, 32)
        square = y.view(8, 8)
        return torch.stack(
            [(y * y).sum(), (y.exp() * 0).sum(), (left * right).sum(), (square.t() @ square).sum()]
        ).sum()

    assert moved_bytes(Calls(function), torch.randn(64)) == 2 * 64 * 4  # y, and what exp saves


def test_parameters_buffers_and_the_batch_are_never_moved() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16, affine=False)
            self.register_buffer("scale", torch.rand(16))

        def forward(self, x: Tensor, more: dict[str, list[Tensor]]) -> Tensor:
            out: Tensor = self.linear(x) * self.scale + more["by"][0] * self.linear.weight.t()
            return out.mean()  # a number, so that nothing is saved after

    more = {"by": [torch.randn(16, 16)]}
    assert moved_bytes(Model(), torch.randn(16, 16), more) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", ["offload", "compress"])
def test_the_weights_copies_under_autocast_are_never_taken(choice: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
    taken = _taken_sizes(model, torch.randn(4, 16), choice, bf16=True)
    # The batch's copy, GELU's input and the second layer's: none has a weight's 512 elements.
    assert taken == ([4 * 16, 4 * 32, 4 * 32] if choice == "offload" else [4 * 32, 4 * 32])


def test_the_first_activations_of_a_model_are_taken_though_they_come_from_weights_alone() -> None:
    model = nn.Sequential(nn.Embedding(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.GELU())
    # The embeddings, the norm's mean and deviation, the norm's result, GELU's input.
    assert sorted(_taken_sizes(model, torch.randint(8, (10,)), "offload")) == [10, 10, 40, 160, 160]


def _taken_sizes(model: nn.Module, x: Tensor, choice: str, *, bf16: bool = False) -> list[int]:
    """Return the number of elements of each storage that a forward takes."""
    with everywhere(model, choice), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        taken = {each.group: each for each in _packed(model(x)) if isinstance(each, groups.SavedView)}
        return [each.take().untyped_storage().nbytes() // each.dtype.itemsize for each in taken.values()]


def test_tensors_below_the_bound_and_small_parts_of_a_storage_stay() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = x * weight
        return y[:3].exp().sum() + (y[:3] * y[:3]).sum()  # of 64 elements

    assert moved_bytes(Calls(function), torch.randn(64)) == 3 * 4  # exp's result alone
    assert moved_bytes(Calls(function), torch.randn(64), min_bytes=13) == 0


def test_a_storage_without_bytes_stays() -> None:
    first = nn.Linear(8, 8)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 8))
    for choice in ("offload", "compress", "compress+offload"):
        with everywhere(model, choice, codec="fp8_tensor"):
            model(torch.randn(0, 8)).sum().backward()
    assert first.weight.grad is not None and not first.weight.grad.any()


# What comes back


class Strides(torch.autograd.Function):
    """Notes the geometry of what it saves, and of what it gets back."""

    seen: list[tuple[Any, ...]]

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        Strides.seen = [_geometry(tensor) for tensor in tensors]
        ctx.save_for_backward(*tensors)
        return torch.stack([tensor.sum() for tensor in tensors]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        Strides.seen = [*Strides.seen, *[_geometry(tensor) for tensor in ctx.saved_tensors]]
        return tuple(grads[0].expand_as(tensor) for tensor in ctx.saved_tensors)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.tolist()


@pytest.mark.parametrize("choice", ["keep", "offload"])
def test_views_come_back_with_their_own_strides_and_values(choice: str) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = (x * weight).view(8, 8)
        views = [y.t(), y[2:, 3:], y[::2, ::3], y[:1].expand(5, 8), y.as_strided((7, 2), (8, 9)), y.view(2, 2, 16)]
        back = y.flip(0).to(torch.bfloat16)
        return Strides.apply(*views, back[1:], back.t(), torch.view_as_complex(y.view(4, 8, 2)).real)  # type: ignore[no-any-return, no-untyped-call]

    model = Calls(function)
    with everywhere(model, choice):
        model(torch.randn(64)).backward()
    half = len(Strides.seen) // 2
    assert half == 9 and Strides.seen[:half] == Strides.seen[half:]


class WritesToWhatItSaved(torch.autograd.Function):
    """Its backward works in place on what it saved, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = x.detach().mul_(grads[0] * 3)
        return out


@pytest.mark.parametrize("choice", ["keep", "offload"])
def test_a_backward_that_writes_to_what_it_saved_spoils_no_other_save(choice: str) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = x * weight
        return WritesToWhatItSaved.apply(y) + y.square().sum()  # type: ignore[no-any-return, no-untyped-call]

    model, x = Calls(function), torch.randn(64)
    with everywhere(model, choice):
        loss = model(x)
        for num in (1, 2):
            model.weight.grad = None
            try:
                loss.backward(retain_graph=True)
            except RuntimeError as error:
                assert choice == "keep" and "modified by an inplace operation" in str(error)
                return
            torch.testing.assert_close(model.weight.grad, 5 * x.square() * model.weight, msg=f"backward {num}")
    assert choice == "offload"


@pytest.mark.parametrize("choice", ["", "keep", "offload", "compress"])
def test_a_write_after_the_save_raises_what_autograd_raises_or_leaves_the_gradient_right(choice: str) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = x * weight
        z = y.square().sum()  # saves y
        with torch.no_grad():
            y.mul_(7)
        return z

    model, x = Calls(function), torch.randn(64)
    with everywhere(model, choice or "keep", codec="int8") as handle:
        if not choice:
            handle.remove()
        loss = model(x)
        if choice == "compress":
            loss.backward()
            assert model.weight.grad is not None
            got, expected = model.weight.grad, 2 * x.square() * model.weight
            assert (got - expected).norm() < expected.norm() / 50
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# When something goes wrong


class Fails(nn.Module):
    """Raises in forward, or in backward, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.where = nn.Linear(16, 16), ""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).tanh()
        if self.where == "forward":
            raise ArithmeticError("forward")
        if self.where == "backward" and out.requires_grad:
            out.register_hook(self._fail)
        return out

    def _fail(self, grad: Tensor) -> None:
        raise ArithmeticError("backward")


@pytest.mark.parametrize("how", [each for each in EXACT if each != "keep"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_next_step_is_exact_and_nothing_is_left(where: str, how: str) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), Fails()) for _ in range(4)])
    x = torch.randn(8, 16)
    model(x).square().sum().backward()
    expected = numbers(model)
    num_threads = threading.active_count()
    with engine(model, how) as handle:
        for _ in range(2):
            model[2][3].where = where  # type: ignore[index]
            with pytest.raises(ArithmeticError, match=where):
                model(x).square().sum().backward()
            model[2][3].where = ""  # type: ignore[index]
            model.zero_grad()
            gc.collect()
            assert _groups() == 0
            assert _stored_bytes(handle) == 0
            assert not handle._running() and saver.top_hooks() is None
            model(x).square().sum().backward()
            assert_equal(numbers(model), expected)
    assert threading.active_count() <= num_threads


class FullTier(MemoryTier):
    """Has room for some tensors, until it is told that it has room for all."""

    room = 5

    def put(self, flat: Tensor) -> InMemory:
        if self.num_puts == self.room:
            raise OffloadError("full")
        return super().put(flat)


@pytest.mark.parametrize("how", DISK)
def test_after_a_tier_that_was_full_the_next_step_is_exact_and_nothing_is_left(how: str) -> None:
    plain, ours = twins("bert")
    tier = FullTier()
    with engine(ours.model, how, tier=tier) as handle:
        for _ in range(2):
            tier.num_puts, tier.room = 0, 5
            with pytest.raises(OffloadError, match="full"):
                ours.value()
            gc.collect()
            assert _groups() == 0 and not handle._running() and saver.top_hooks() is None and not is_recomputing()
            tier.room = -1
            assert_same_step(plain, ours)


def assert_same_step(plain: Case, ours: Case) -> None:
    for case in (plain, ours):
        case.model.zero_grad()
        torch.manual_seed(3)
        case.value().backward()
    assert_equal(numbers(ours.model), numbers(plain.model))


@pytest.mark.parametrize("how", [each for each in EXACT if "recompute" in each])
@pytest.mark.parametrize("name", ["bert", "convnet"])
def test_after_an_exception_in_a_second_run_the_next_step_is_exact_and_nothing_is_left(name: str, how: str) -> None:
    plain, ours = twins(name)

    def fail_again(*_: object) -> None:
        if is_recomputing():
            raise ArithmeticError("again")

    for case in (plain, ours):  # what forward changes in buffers, it shall have changed in both
        case.value()
    inner = next(iter(ours.model.get_submodule(find_blocks(ours.model)[2].path).children()))
    with engine(ours.model, how) as handle:
        for _ in range(2):
            hook = inner.register_forward_hook(fail_again)
            with pytest.raises(ArithmeticError, match="again"):
                ours.value().backward()
            hook.remove()
            plain.value()
            ours.model.zero_grad()
            gc.collect()
            assert _groups() == 0 and not handle._running() and saver.top_hooks() is None and not is_recomputing()
            assert _stored_bytes(handle) == 0
            assert_same_step(plain, ours)


def _groups() -> int:
    return sum(type(each) is groups.Group for each in gc.get_objects())


def _stored_bytes(handle: Engine) -> int:
    """Wait for what is being written, whose place is taken until then, and return what is stored after it."""
    if handle.tier is None:
        return 0
    handle.tier.flush()
    return handle.tier.traffic().stored_bytes


@pytest.mark.parametrize("how", DISK)
def test_a_graph_that_is_dropped_or_used_up_leaves_no_group_and_no_byte(how: str) -> None:
    case = MODELS["gpt"]()
    with engine(case.model, how) as handle:
        assert handle.tier is not None
        loss = case.value()
        handle.tier.flush()
        assert _groups() > 0 and handle.tier.traffic().stored_bytes > 0
        loss.backward()
        assert _groups() == 0 and handle.tier.traffic().stored_bytes == 0  # at once, without the garbage collector
        loss = case.value()
        del loss
        assert _groups() == 0
        handle.tier.flush()
        assert handle.tier.traffic().stored_bytes == 0


def test_the_engine_keeps_no_tensor_that_was_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with everywhere(model, "compress"):
        model(torch.randn(4, 8)).sum().backward()
        old = weakref.ref(model[0].weight)
        model[0] = nn.Linear(8, 8)
        gc.collect()
        assert old() is None
        assert _taken_now(model) == [4 * 8]  # the second layer's input, and no weight

    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def _taken_now(model: nn.Module) -> list[int]:
    return [each.size.numel() for each in _packed(model(torch.randn(4, 8))) if isinstance(each, groups.SavedView)]


def _packed(out: Tensor) -> list[Any]:
    """Return what autograd holds for the graph of a result."""
    found, nodes, seen = [], [out.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
            raws: list[Any] = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
            found += [raw.data for raw in raws if not isinstance(raw, list | tuple)]
    return found[::-1]


# Beside others


@pytest.mark.parametrize("first_leaves_first", [False, True])
def test_two_engines_on_one_model_are_exact_and_leave_in_either_order(first_leaves_first: bool) -> None:
    plain, ours = twins("gpt")
    before = _contents(ours.model)
    plain.value().backward()
    one, two = MemoryTier(), MemoryTier()
    handles = [
        Engine(ours.model, {"blocks.0": "offload", "blocks.1": "recompute"}, tier=one, min_bytes=0),
        Engine(ours.model, {"blocks.2": "offload", "blocks.3": "recompute"}, tier=two, min_bytes=0),
    ]
    ours.value().backward()
    assert_equal(numbers(ours.model), numbers(plain.model))
    assert one.num_puts and two.num_puts
    first, second = handles if first_leaves_first else handles[::-1]
    num_puts = one.num_puts, two.num_puts
    first.remove()
    ours.model.zero_grad()
    ours.value().backward()
    assert_equal(numbers(ours.model), numbers(plain.model))
    assert (one.num_puts > num_puts[0]) != (two.num_puts > num_puts[1])
    second.remove()
    second.remove()
    assert _contents(ours.model) == before


def test_an_engine_on_a_part_and_one_on_the_whole_are_exact() -> None:
    plain, ours = twins("gpt")
    plain.value().backward()
    one, two = MemoryTier(), MemoryTier()
    part = ours.model.get_submodule("blocks.1")
    with (
        Engine(part, {"*": "offload"}, tier=one, min_bytes=0),
        Engine(ours.model, {"*": "offload", "blocks.1": "recompute"}, tier=two, min_bytes=0),
    ):
        ours.value().backward()
    assert_equal(numbers(ours.model), numbers(plain.model))
    assert two.num_puts


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["gpt", "llama", "flat", "convnet"])
def test_remove_restores_the_model_and_may_be_called_again(name: str, how: str) -> None:
    case = MODELS[name]()
    before = _contents(case.model)
    handle = engine(case.model, how)
    case.value().backward()
    handle.remove()
    assert _contents(case.model) == before
    handle.remove()
    assert _contents(case.model) == before


def _contents(model: nn.Module) -> list[dict[str, object]]:
    """What stands in each module's dictionary, with the hooks; tensors by identity."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
        for module in model.modules()
    ]


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("how", ["compress", *DISK])
@pytest.mark.parametrize("copied", [_copied, _pickled, _saved])
def test_a_copy_of_a_model_is_plain_and_trains_equally(copied: Callable[[nn.Module], nn.Module], how: str) -> None:
    case = MODELS["gpt"]()
    with engine(case.model, how):
        again = Case(copied(case.model), case.batch, case.loss)
        case.value().backward()
        again.value().backward()
        assert_equal(numbers(again.model), numbers(case.model))
        out = again.value()
        assert not any(isinstance(each, groups.SavedView) for each in _packed(out))
        assert b"packlight" not in pickle.dumps(again.model) and b"packlight" not in pickle.dumps(case.model)


def test_a_transform_of_torch_func_raises_a_clear_error() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).sum()  # type: ignore[no-any-return]

    weights: dict[str, Tensor] = dict(model.named_parameters())
    with everywhere(model, "compress"), pytest.raises(RuntimeError, match=r"torch\.func.*remove\(\)"):
        torch.func.grad(loss)(weights)
    assert torch.func.grad(loss)(weights)["weight"].shape == (4, 4)


def test_forwards_in_two_threads_do_not_meet() -> None:
    plain, ours = twins("convnet")
    plain.model.eval(), ours.model.eval()
    expected = [torch.autograd.grad(plain.value(), list(plain.model.parameters()))] * 2
    got: list[Any] = []

    def work() -> None:
        got.append(torch.autograd.grad(ours.value(), list(ours.model.parameters())))

    with everywhere(ours.model, "offload"):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, theirs in zip(got, expected, strict=True):
        assert_equal(list(mine), list(theirs))


# Sharded parameters


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def _column_and_row(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})


def _fully_sharded(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore:.*(barrier|device_id|destroy).*")
@pytest.mark.parametrize("how", ["recompute", "offload", "compress", DISK[1]])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sharded", [_column_and_row, _fully_sharded])
def test_sharded_parameters_are_exact_and_never_moved(
    sharded: Callable[[nn.Module, Any], None], bf16: bool, how: str, mesh: Any
) -> None:
    plain = Case(GPT(), windows(3, 10), _next_byte)  # 30 rows: no activation is as large as a weight
    ours = Case(copy.deepcopy(plain.model), plain.batch, plain.loss)
    for case in (plain, ours):
        sharded(case.model, mesh)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = plain.value()
    loss.backward()
    weights = {each.numel() for each in plain.model.parameters() if each.dim() == 2}
    with engine(ours.model, how):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = ours.value()
        taken = [each for each in _packed(loss) if isinstance(each, groups.SavedView | groups.SavedParts)]
        assert not weights & {each.size.numel() for each in taken}
        has_parts = any(isinstance(each, groups.SavedParts) for each in taken)
        assert has_parts == (sharded is _column_and_row and how in DISK)
        loss.backward()
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(_local(mine.grad), _local(theirs.grad))


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": {"*": "encode"}}, r"'\*' is 'encode'; wanted one of keep, recompute, offload"),
        ({"choices": {"*": "offload"}}, r"'\*' is 'offload', but no tier came"),
        ({"choices": {"*": "compress+offload"}}, "no tier came"),
        ({"choices": {"*": "compress"}, "codec": "fp4"}, "'fp4' came, one of fp8, fp8_tensor, int8, int4, mask"),
        ({"choices": {"stem.0": "recompute"}}, "'stem.0' is to be recomputed and is no block; the blocks are stem"),
    ],
)
def test_wrong_arguments_say_what_came_and_what_was_wanted(arguments: dict[str, Any], message: str) -> None:
    model = ConvNet()
    before = _contents(model)
    with pytest.raises(ValueError, match=message):
        Engine(model, **arguments)
    assert _contents(model) == before


def test_a_block_that_is_recomputed_already_is_refused_and_the_model_left_as_it_was() -> None:
    model = ConvNet()
    path = find_blocks(model)[0].path
    with engine(model, "recompute"):
        before = _contents(model)
        with pytest.raises(ValueError, match=r"recomputed already; remove\(\)"):
            Engine(model, {path: "recompute"})
        assert _contents(model) == before


# The order of use


def test_prefetch_goes_by_the_order_of_the_step_before() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        parts = [(x * weight * at).sin() for at in range(1, 5)]  # each saves the input of its sine
        return (parts[1] + (parts[3] + (parts[0] + parts[2]))).sum()

    model, x = Calls(function), torch.randn(64)
    tier = MemoryTier()
    steps = []
    with Engine(model, {"*": "offload"}, tier=tier, min_bytes=0):
        for _ in range(3):
            tier.num_puts = 0
            tier.events.clear()
            model(x).backward()
            steps.append(list(tier.events))
    order = [name for what, name in steps[0] if what == "get"]
    num = len(order)
    assert num == len(set(order)) == tier.num_puts == 4
    for events in steps[1:]:
        assert [name for what, name in events if what == "get"] == order
        for at, name in enumerate(order):
            begin = events.index(("get", order[at - 1])) if at else events.index(("put", str(num - 1)))
            before = events[begin : events.index(("get", name))]
            assert [each for what, each in before if what == "prefetch"] == order[at + 1 :]


def test_the_first_step_fetches_nothing_ahead() -> None:
    """It does not know the order yet, and a wrong guess would take memory that nobody has counted."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    model, tier = nn.Sequential(*layers), MemoryTier()
    with Engine(model, {"*": "offload"}, tier=tier, min_bytes=0):
        model(torch.randn(2, 8)).sum().backward()
    assert tier.num_puts > 1 and all(what != "prefetch" for what, _ in tier.events)


def test_the_tier_is_closed_with_the_engine_and_a_late_backward_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with Engine(model, {"*": "offload"}, tier=make_tier("disk", device=CPU), min_bytes=0):
        loss = model(torch.randn(2, 8)).sum()
    with pytest.raises(RuntimeError, match="closed"):
        loss.backward()


def test_gelu_s_choice_is_the_module_s_that_calls_it() -> None:
    """A function has no module of its own: what it saves is named after the one that runs."""
    model = nn.Sequential(nn.Linear(8, 8), Calls(lambda x, weight: F.gelu(x * weight), 8))
    tier = MemoryTier()
    with Engine(model, {"1": "offload"}, tier=tier, min_bytes=0):
        model(torch.randn(4, 8)).sum().backward()
    assert tier.num_puts == 2  # the first layer's result, and GELU's input
