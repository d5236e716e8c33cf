"""Recomputed blocks give the same bits as kept ones, hold less, and leave no trace."""

import copy
import pickle
import random
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.activations.blocks import find_blocks
from packlight.activations.buffers import MAX_COPIED_ELEMENTS, is_recomputing
from packlight.activations.recompute import recompute
from packlight.planner.timeline import Timeline
from tests.activations.cases import assert_equal, bf16, numbers, train, twins
from tests.cases import CASES, Case, ConvNet, digits

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3

pytestmark = pytest.mark.usefixtures("seed")


def assert_trains_alike(name: str, **how: Any) -> None:
    kept, again = twins(name)
    plain = list(train(kept, num_steps=NUM_STEPS, **how))
    with recompute(again.model):
        recomputed = list(train(again, num_steps=NUM_STEPS, **how))
    assert len(plain) == NUM_STEPS
    for mine, theirs in zip(recomputed, plain, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_buffers_and_random_state_are_bit_equal(name: str) -> None:
    assert_trains_alike(name)


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "convnet", "lora", "flat"])
def test_bit_equal_under_bf16_autocast(name: str) -> None:
    assert_trains_alike(name, context=bf16)


@pytest.mark.parametrize("name", ["gpt", "bert", "convnet", "tied"])
def test_bit_equal_with_gradient_accumulation(name: str) -> None:
    assert_trains_alike(name, num_microbatches=3)


@pytest.mark.parametrize("name", ["bert", "llama", "convnet", "unet", "flat"])
def test_bit_equal_with_evaluation_passes_between_forward_and_backward(name: str) -> None:
    kept, again = twins(name)
    left = []
    for case in (kept, again):
        with recompute(case.model) if case is again else nullcontext():
            torch.manual_seed(0)
            loss = case.value()
            case.model.eval()
            with torch.no_grad():
                evaluated = case.value()
            with torch.inference_mode():
                inferred = case.value()
            case.model.train()
            loss.backward()
            left.append([loss.detach(), evaluated, inferred.clone(), *numbers(case.model)])
    assert_equal(*left)


@pytest.mark.parametrize("name", ["gpt", "bert", "convnet", "flat", "lstm"])
def test_a_second_backward_through_a_retained_graph_is_bit_equal(name: str) -> None:
    kept, again = twins(name)
    left = []
    for case in (kept, again):
        with recompute(case.model) if case is again else nullcontext():
            torch.manual_seed(0)
            loss = case.value()
            loss.backward(retain_graph=True)
            once = numbers(case.model)
            loss.backward()
            left.append([*once, *numbers(case.model)])
    assert_equal(*left)


@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_two_graphs_at_once_and_backward_out_of_order_are_bit_equal(name: str) -> None:
    kept, again = twins(name)
    left = []
    for case in (kept, again):
        with recompute(case.model) if case is again else nullcontext():
            first, second = case.value(), case.value()
            first.backward()
            second.backward()
            left.append([first.detach(), second.detach(), *numbers(case.model)])
    assert_equal(*left)


def test_gradients_with_respect_to_the_input_are_bit_equal() -> None:
    kept, again = twins("convnet")
    left = []
    for case in (kept, again):
        with recompute(case.model) if case is again else nullcontext():
            images = case.batch.clone().requires_grad_()
            case.loss(case.model(images), images).backward()
            left.append([images.grad, *numbers(case.model)])
    assert_equal(*left)


def test_only_the_named_blocks_run_twice() -> None:
    case = CASES["gpt"]()
    runs: list[str] = []
    for block in find_blocks(case.model):
        module = case.model.get_submodule(block.path)
        inner = next(module.children(), None)
        if inner is not None:  # hooks of the block itself stay outside
            inner.register_forward_hook(lambda *_, path=block.path: runs.append(path))
    with recompute(case.model, ["blocks.1", "blocks.3"]):
        case.value().backward()
    assert sorted(runs) == ["blocks.0", *["blocks.1"] * 2, "blocks.2", *["blocks.3"] * 2]


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "convnet"])
def test_hooks_on_a_block_run_once_and_may_change_its_output(name: str) -> None:
    kept, again = twins(name)
    left = []
    for case in (kept, again):
        calls: list[str] = []
        for block in find_blocks(case.model):
            module = case.model.get_submodule(block.path)
            module.register_forward_pre_hook(lambda *_, path=block.path, calls=calls: calls.append(path))
            module.register_forward_hook(lambda _, args, out: out * 1.5 if isinstance(out, Tensor) else None)
        with recompute(case.model) if case is again else nullcontext():
            torch.manual_seed(0)
            loss = case.value()
            loss.backward()
        assert sorted(calls) == sorted(set(calls)), "a hook ran twice"
        left.append([loss.detach(), *numbers(case.model)])
    assert_equal(*left)


class Fault(Exception):
    """What the tests raise."""


def assert_next_step_is_right(kept: Case, again: Case) -> None:
    assert not is_recomputing()
    left = []
    for case in (kept, again):
        case.model.zero_grad()
        torch.manual_seed(7)
        loss = case.value()
        loss.backward()
        left.append([loss.detach(), *numbers(case.model)])
    assert_equal(*left)


@pytest.mark.parametrize("name", ["bert", "convnet", "flat", "llama"])
def test_the_step_after_an_exception_in_forward_is_right(name: str) -> None:
    kept, again = twins(name)
    broken = [list(case.model.modules())[-2].register_forward_pre_hook(fail) for case in (kept, again)]
    with recompute(again.model):
        for case in (kept, again):
            torch.manual_seed(3)
            with pytest.raises(Fault):
                case.value()
        for hook in broken:
            hook.remove()
        assert_equal(list(kept.model.buffers()), list(again.model.buffers()))
        assert_next_step_is_right(kept, again)


def fail(*_: object) -> None:
    raise Fault


@pytest.mark.parametrize("name", ["bert", "convnet", "flat", "llama"])
def test_the_step_after_an_exception_in_backward_is_right(name: str) -> None:
    kept, again = twins(name)
    with recompute(again.model):
        for case in (kept, again):
            torch.manual_seed(3)
            hook = next(at for at in case.model.parameters() if at.requires_grad).register_hook(fail)
            with pytest.raises(Fault):
                case.value().backward()
            hook.remove()
        assert_next_step_is_right(kept, again)


def test_an_exception_in_the_second_run_puts_the_buffers_back() -> None:
    kept, again = twins("convnet")

    def fail_again(*_: object) -> None:
        if is_recomputing():
            raise Fault

    hook = again.model.get_submodule("layer1.0.conv_2").register_forward_hook(fail_again)
    with recompute(again.model):
        for case in (kept, again):
            loss = case.value()
            if case is again:
                before = [(buffer, buffer.clone()) for buffer in again.model.buffers()]
                with pytest.raises(Fault):
                    loss.backward()
                hook.remove()
                for buffer, (same, value) in zip(again.model.buffers(), before, strict=True):
                    assert buffer is same and torch.equal(buffer, value)
        assert_next_step_is_right(kept, again)


def contents(model: nn.Module) -> dict[str, dict[str, object]]:
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def assert_same_contents(model: nn.Module, before: dict[str, dict[str, object]]) -> None:
    after = contents(model)
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        assert list(after[name]) == list(attributes), name
        assert all(after[name][key] is value for key, value in attributes.items()), name


@pytest.mark.parametrize("name", CASES)
def test_remove_leaves_every_module_as_it_was(name: str) -> None:
    case = CASES[name]()
    before = contents(case.model)
    handle = recompute(case.model)
    assert any(after != before[at] for at, after in contents(case.model).items())
    case.value().backward()
    handle.remove()
    assert_same_contents(case.model, before)
    handle.remove()
    assert_same_contents(case.model, before)


def test_a_forward_of_the_instance_is_used_kept_by_copies_and_restored() -> None:
    case = CASES["gpt"]()
    block = case.model.get_submodule("blocks.0")
    block.forward = types.MethodType(doubled_forward, block)
    before = contents(case.model)
    expected = case.value()
    with recompute(case.model):
        assert torch.equal(case.value(), expected)
        assert torch.equal(case.value(copy.deepcopy(case.model)), expected)
    assert_same_contents(case.model, before)


def doubled_forward(self: nn.Module, x: Tensor) -> Tensor:
    doubled: Tensor = 2 * type(self).forward(self, x)
    return doubled


def test_the_context_manager_undoes_itself_also_after_an_exception() -> None:
    model = CASES["gpt"]().model
    before = contents(model)
    with pytest.raises(Fault), recompute(model):
        raise Fault
    assert_same_contents(model, before)


def test_removed_in_the_order_of_application_or_against_it_nothing_is_left() -> None:
    for order in ((0, 1), (1, 0)):
        case = CASES["gpt"]()
        before, expected = contents(case.model), case.value().item()
        handles = [recompute(case.model, ["blocks.0", "blocks.1"]), recompute(case.model, ["blocks.2"])]
        for at in order:
            handles[at].remove()
        assert_same_contents(case.model, before)
        assert case.value().item() == expected


@pytest.mark.parametrize("path", ["blocks.9", "blocks", "", "blocks.0.qkv"])
def test_an_unknown_path_is_refused_with_the_names_of_the_blocks_and_nothing_changes(path: str) -> None:
    model = CASES["gpt"]().model
    before = contents(model)
    with pytest.raises(ValueError, match=r"token, position, blocks\.0, blocks\.1") as error:
        recompute(model, ["blocks.0", path])
    assert repr(path) in str(error.value)
    assert_same_contents(model, before)


@pytest.mark.parametrize("name", ["gpt", "llama", "convnet", "flat"])
def test_a_deep_copy_is_plain_and_computes_the_same(name: str) -> None:
    case = CASES[name]()
    with recompute(case.model):
        copied = copy.deepcopy(case.model)
        case.model.zero_grad()
    results = []
    for model in (case.model, copied):
        torch.manual_seed(0)
        loss = case.value(model)
        seen = second_runs(model, loss)
        results.append([loss.detach(), *numbers(model)])
        if name != "llama":  # its own switch stays on in a copy, as with model.gradient_checkpointing_enable()
            assert seen == 0, "the copy recomputes"
    assert_equal(*results)


def second_runs(model: nn.Module, loss: Tensor) -> int:
    """Run backward and count the modules that run during it."""
    calls: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in model.modules()]
    loss.backward()
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_pickled_models_load_and_train_without_packlight(tmp_path: Path) -> None:
    expected = {}
    for name in ("gpt", "llama", "convnet", "flat"):
        case = CASES[name]()
        with recompute(case.model):
            torch.save(case.model, tmp_path / f"{name}.pt")
            (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(case.model))
        torch.save(case.batch, tmp_path / f"{name}.batch")
        torch.manual_seed(0)
        output = case.output()
        expected[name] = (output if isinstance(output, Tensor) else output.loss).sum().item()
    script = f"""
import pickle, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(ROOT)!r})
for name in {list(expected)}:
    batch = torch.load(f"{tmp_path}/{{name}}.batch")
    for model in (torch.load(f"{tmp_path}/{{name}}.pt", weights_only=False),
                  pickle.load(open(f"{tmp_path}/{{name}}.pickle", "rb"))):
        torch.manual_seed(0)
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        total = (output if isinstance(output, torch.Tensor) else output.loss).sum()
        total.backward()
        print(name, repr(total.item()))
print("packlight" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = [f"{name} {total!r}" for name, total in expected.items() for _ in range(2)]
    assert done.stdout.splitlines() == [*lines, "False"]


@pytest.mark.parametrize("name", CASES)
def test_state_dict_and_names_are_unchanged(name: str) -> None:
    model = CASES[name]().model
    before = list(model.state_dict())
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    with recompute(model):
        assert list(model.state_dict()) == before
        assert dict(model.named_parameters()) == parameters and dict(model.named_modules()) == modules
        model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["gpt", "bert", "llama", "convnet", "unet", "vit", "moe", "flat"])
def test_what_lives_at_the_end_of_forward_falls_with_each_block(name: str) -> None:
    case = CASES[name]()
    kept = forward_bytes(case)
    saving = []
    for block in find_blocks(case.model):
        with recompute(case.model, [block.path]):
            saving.append(kept - forward_bytes(case))
    with recompute(case.model):
        assert forward_bytes(case) <= kept / 2
    assert sum(bytes_less > 0 for bytes_less in saving) >= 2


def forward_bytes(case: Case) -> int:
    line = Timeline(case.batch.device.type if isinstance(case.batch, Tensor) else "cpu")
    for tensor in (*case.model.parameters(), *case.model.buffers()):
        line.leave_out(tensor)
    with line:
        loss = case.value()
        live_bytes = line.live_bytes
    line.close()
    del loss
    return live_bytes


def test_without_gradients_nothing_is_copied_or_checkpointed() -> None:
    case = CASES["convnet"]()
    with recompute(case.model), torch.no_grad():
        assert case.value().grad_fn is None
        assert forward_bytes(case) == 4  # the loss


@pytest.mark.parametrize(("name", "path"), [("gpt", "blocks.1"), ("llama", "model.layers.0"), ("flat", "[0:12]")])
def test_a_block_that_is_recomputed_already_is_refused(name: str, path: str) -> None:
    model = CASES[name]().model
    before = contents(model)
    with recompute(model, [path]):
        with pytest.raises(ValueError, match=r"already; remove\(\)"):
            recompute(model)
    assert_same_contents(model, before)


class Masked(nn.Module):
    """A block with a large constant buffer, as a causal mask of GPT-2 is."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(2 * MAX_COPIED_ELEMENTS))
        self.mask: Tensor
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).relu() * self.mask[:8].clone()
        if self.writes:
            with torch.no_grad():
                self.mask.add_(1)
        return out


@pytest.mark.parametrize("writes", [False, True])
def test_large_buffers_are_right_whether_they_change_or_not(writes: bool) -> None:
    kept = nn.Sequential(*[nn.Sequential(Masked(writes=writes), nn.Linear(8, 8)) for _ in range(2)])
    again = copy.deepcopy(kept)
    x = torch.randn(4, 8)
    with recompute(again, ["0", "1"]):
        for _ in range(NUM_STEPS):
            for model in (kept, again):
                model.zero_grad()
                model(x).square().sum().backward()
            assert_equal(numbers(again), numbers(kept))


def test_a_large_buffer_that_starts_to_change_later_is_an_error_not_a_wrong_gradient() -> None:
    model = nn.Sequential(*[nn.Sequential(Masked(), nn.Linear(8, 8)) for _ in range(2)])
    x = torch.randn(4, 8)
    with recompute(model, ["0", "1"]):
        model(x).sum().backward()
        for block in model:
            block[0].writes = True  # type: ignore[index]
        with pytest.raises(RuntimeError, match=r"'mask'.*keep that block"):
            model(x).sum().backward()


class InPlaceAfter(nn.Module):
    """A model that overwrites a block's input after the block has used it; autograd did not need it."""

    def __init__(self, *, keyword: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Shift(), Shift()])
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out: Tensor = layer(x=x) if self.keyword else layer(x)
            with torch.no_grad():
                x.detach().mul_(3)  # raises the version that x shares
            x = out
        return x


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear((x + self.bias).relu())
        return out


@pytest.mark.parametrize("keyword", [False, True])
def test_an_input_overwritten_after_its_block_is_an_error_not_a_wrong_gradient(keyword: bool) -> None:
    model = InPlaceAfter(keyword=keyword)
    model(torch.randn(4, 8)).sum().backward()  # without recompute it works
    with recompute(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(4, 8)).sum().backward()


class Attends(nn.Module):
    """A block with tensors in a tuple and by keyword, as rotary embeddings and masks come."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, positions: tuple[Tensor, Tensor], *, scale: Tensor | None = None
    ) -> tuple[Tensor, int]:
        out = self.out(self.linear(x).sigmoid() * positions[0] + positions[1])
        return (out if scale is None else out * scale), 1


class AttendsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(8, 16)
        self.layers = nn.ModuleList([Attends(), Attends()])

    def forward(self, x: Tensor) -> Tensor:
        positions = self.make(x).chunk(2, dim=-1)
        for layer in self.layers:
            x, _ = layer(x, positions, scale=positions[0].tanh())
        return x


def test_gradients_flow_into_tensors_in_tuples_and_keywords() -> None:
    kept = AttendsTwice()
    again = copy.deepcopy(kept)
    x = torch.randn(4, 8)
    kept(x).square().sum().backward()
    with recompute(again):
        again(x).square().sum().backward()
    assert_equal(numbers(again), numbers(kept))


def test_layers_that_already_checkpoint_themselves_are_bit_equal_too() -> None:
    kept, again = twins("llama")
    for case in (kept, again):
        case.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    plain = list(train(kept))
    with recompute(again.model):
        for mine, theirs in zip(train(again), plain, strict=True):
            assert_equal(mine, theirs)


class Skipped(nn.Module):
    """A layer that Python's generator scales (stochastic depth, as some models draw it)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.out(self.linear(x).relu()) * random.random()
        return out


def test_layers_that_draw_from_python_s_generator_are_bit_equal() -> None:
    kept = nn.Sequential(Skipped(), Skipped(), Skipped())
    again = copy.deepcopy(kept)
    x = torch.randn(4, 8)
    left = []
    for model in (kept, again):
        with recompute(model) if model is again else nullcontext():
            random.seed(5)
            model(x).square().sum().backward()
            left.append([*numbers(model), torch.tensor(random.random(), dtype=torch.float64)])
    assert_equal(*left)


def test_under_the_user_s_own_saved_tensor_hooks_gradients_are_bit_equal() -> None:
    kept, again = twins("gpt")
    left = []
    for case in (kept, again):
        with recompute(case.model) if case is again else nullcontext(), torch.autograd.graph.save_on_cpu():
            loss = case.value()
            loss.backward()
        left.append([loss.detach(), *numbers(case.model)])
    assert_equal(*left)


def test_blocks_change_from_training_to_evaluation_and_back() -> None:
    kept, again = ConvNet(), ConvNet()
    again.load_state_dict(kept.state_dict())
    images, targets = digits(32)
    with recompute(again):
        for training in (True, False, True):
            for model in (kept, again):
                model.train(training).zero_grad()
                nn.functional.cross_entropy(model(images), targets).backward()
            assert_equal(numbers(again), numbers(kept))
