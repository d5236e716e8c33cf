"""Sites have the same names in each step and in equal layers, and the longest pattern decides."""

import copy
import sys
import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from packlight.activations.engine import Engine
from packlight.activations.sites import CallStack, ModuleCall, ModuleWatch, Rules, Site, matches
from tests.activations.cases import MODELS, MemoryTier, everywhere
from tests.cases import Case

pytestmark = pytest.mark.usefixtures("seed")


def sites_of(case: Case, choices: dict[str, str] | None = None) -> list[list[str]]:
    """Return the names of the sites of each of two steps, in the order of their saves."""
    steps = []
    for _ in range(2):
        with Engine(case.model, choices or {}) as handle:
            case.value().backward()
            steps.append(handle.sites())
    return steps


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_have_the_same_sites(name: str) -> None:
    first, second = sites_of(MODELS[name]())
    assert first == second and len(first) == len(set(first)) > 0


def test_a_second_step_under_one_engine_adds_no_site() -> None:
    case = MODELS["gpt"]()
    with everywhere(case.model, "compress", codec="mask") as handle:
        case.value().backward()
        first = handle.sites()
        case.value().backward()
        assert handle.sites() == first


@pytest.mark.parametrize("name", ["gpt", "moe", "llama"])
def test_equal_layers_have_equal_sites(name: str) -> None:
    (sites, _) = sites_of(MODELS[name]())
    prefix = {"gpt": "blocks", "moe": "layers", "llama": "model.layers"}[name]

    def within(layer: int) -> list[str]:
        start = f"{prefix}.{layer}"
        return [site.removeprefix(start) for site in sites if site.startswith((f"{start}.", f"{start}:"))]

    assert len(within(0)) > 5
    assert within(0) == within(1) == within(2)


@pytest.mark.parametrize("name", ["gpt", "llama", "convnet"])
def test_sites_are_the_same_whether_blocks_are_recomputed_or_not(name: str) -> None:
    case = MODELS[name]()
    with everywhere(case.model, "keep") as handle:
        case.value().backward()
        kept = set(handle.sites())
    block = {"gpt": "blocks.1", "llama": "model.layers.1", "convnet": "layer1.1"}[name]
    with Engine(case.model, {block: "recompute"}) as handle:
        case.value().backward()
        again = set(handle.sites())

    def inside(sites: set[str]) -> set[str]:
        return {site for site in sites if site.startswith((f"{block}.", f"{block}:"))}

    inputs = {site for site in again if site.startswith(f"{block}.(inputs)")}
    assert inputs and inside(kept) == inside(again) - inputs
    assert kept - inside(kept) == again - inside(again)


class Shared(nn.Module):
    """One layer that is called three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(self.first(x)))
        return out


def test_calls_of_a_shared_module_are_numbered_and_bear_its_first_name() -> None:
    (sites, again) = sites_of(Case(Shared(), torch.randn(2, 8), lambda out, _: out.sum()))
    assert sites == again
    by_module = Counter(site.partition(":")[0] for site in sites)
    assert set(by_module) == {f"first.{layer}{call}" for layer in (0, 1) for call in ("", "@1", "@2")}


@pytest.mark.parametrize(("pattern", "num"), [("first.1", 3), ("first.1:0", 1), ("first.1@2:*", 1), ("first.1@*", 2)])
def test_a_choice_can_be_made_for_one_call(pattern: str, num: int) -> None:
    plain = Shared()
    ours, tier = copy.deepcopy(plain), MemoryTier()
    x = torch.randn(2, 8)
    plain(x).sum().backward()
    with Engine(ours, {pattern: "offload"}, tier=tier, min_bytes=0):
        ours(x).sum().backward()
    assert tier.num_puts == num
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)


class Recursive(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        out: Tensor = self.linear(x).tanh()
        return self(out, depth - 1) * out if depth else out


def test_a_module_that_calls_itself_gets_a_name_for_each_call() -> None:
    model = nn.Sequential(Recursive(), nn.Tanh())
    sites, again = sites_of(Case(model, torch.randn(2, 8), lambda out, _: out.sum()))
    assert sites == again
    assert {site.partition(":")[0] for site in sites} == {
        *("0.linear", "0.linear@1", "0.linear@2", "0", "0@1", "0@2", "1"),
    }


def test_a_model_that_calls_itself_is_exact() -> None:
    plain = Recursive()
    ours = copy.deepcopy(plain)
    x = torch.randn(2, 8)
    plain(x).sum().backward()
    with everywhere(ours, "offload"):
        ours(x).sum().backward()
    assert plain.linear.weight.grad is not None and ours.linear.weight.grad is not None
    assert torch.equal(plain.linear.weight.grad, ours.linear.weight.grad)


def test_a_call_that_ends_by_an_exception_ends_the_calls_inside() -> None:
    stack = CallStack()
    for path in ("a", "a.b", "a.b.c"):
        stack.enter(path)
    stack.leave("a.b")  # c did not say that it ended
    assert [call.module for call in stack.calls] == ["", "a"]
    stack.leave("other")  # never entered
    assert [call.module for call in stack.calls] == ["", "a"]
    stack.enter("a.b")
    rules = Rules({}, default="keep")
    assert [str(rules.next_save(stack.calls[-1])[0]) for _ in range(2)] == ["a.b@1:0", "a.b@1:1"]


def test_a_call_whose_exception_the_model_catches_ends_at_once() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raises, self.weight = Raises(), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            try:
                out: Tensor = self.raises(x)
            except ArithmeticError:
                out = (x * self.weight).sin()
            return out

    model = nn.Sequential(Catches())
    with everywhere(model, "keep") as handle:
        model(torch.randn(4)).sum().backward()
        assert set(handle.sites()) == {"0:0", "0:1"}  # and none of 0.raises


def test_threads_that_share_rules_get_each_site_once() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for _ in range(20):
        rules = Rules({"*": "keep"}, default="keep")

        def run(rules: Rules = rules) -> None:
            call = ModuleCall("a", 0)
            for _ in range(30):
                rules.next_save(call)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rules.sites() == [Site("a", 0, save) for save in range(30)]
    sys.setswitchinterval(interval)


def test_outside_of_a_forward_modules_note_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    stack = CallStack()
    watch = ModuleWatch(model, lambda: None)
    model(torch.randn(1, 4))
    assert stack.numbers == {} and len(model[0]._forward_hooks) == len(model[0]._forward_pre_hooks) == 1
    watch.remove()
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_evaluation_without_gradients_runs_the_kernels_that_it_would_run_without_hooks() -> None:
    case = MODELS["bert"]()
    with everywhere(case.model, "keep"):
        case.value().backward()
        assert any(module._forward_hooks for module in _encoder_modules(case.model))
        with torch.no_grad():
            case.value()
        assert not any(module._forward_hooks for module in _encoder_modules(case.model))
        case.value().backward()
        assert any(module._forward_hooks for module in _encoder_modules(case.model))


def _encoder_modules(model: nn.Module) -> list[nn.Module]:
    layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    assert layers
    return [module for layer in layers for module in layer.modules()]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.0", Site("layers.0.mlp.up", 0, 1), True),
        ("layers.0", Site("layers.0", 3, 1), True),
        ("layers.0", Site("layers.01.mlp", 0, 1), False),
        ("layers.*.mlp", Site("layers.7.mlp.up", 2, 0), True),
        ("layers.*.up:0", Site("layers.7.mlp.up", 0, 0), True),
        ("layers.*.up:0", Site("layers.7.mlp.up", 0, 1), False),
        ("layers.*.up:0", Site("layers.7.mlp.up", 1, 0), False),
        ("layers.*.up@1:0", Site("layers.7.mlp.up", 1, 0), True),
        ("*", Site("", 0, 0), True),
        ("", Site("", 0, 0), False),
        (":0", Site("", 0, 0), True),
        ("LAYERS.0", Site("layers.0", 0, 0), False),
    ],
)
def test_a_pattern_stands_for_a_site_or_for_a_module_around_it(pattern: str, name: Site, expected: bool) -> None:
    assert matches(pattern, name) == expected


def choice(rules: Rules, module: str, *, call: int = 0, save: int = 0, block: str = "") -> str:
    running = ModuleCall(module, call)
    saves = [rules.next_save(running, block) for _ in range(save + 1)]
    assert [site for site, _ in saves] == [Site(module, call, at) for at in range(save + 1)]
    return saves[-1][1]


def test_the_longest_pattern_decides_and_later_ones_among_equals() -> None:
    rules = Rules({"layers.0.up:1": "c", "*": "a", "layers.*": "b", "layers.?": "d"}, default="e")
    assert choice(rules, "head") == "a"
    assert choice(rules, "layers.3") == "d"
    assert choice(rules, "layers.0.up", save=1) == "c"
    assert choice(rules, "layers.0.up", call=1, save=1) == "d"
    assert choice(Rules({}, default="e"), "head") == "e"


def test_within_a_recomputed_block_only_longer_patterns_count() -> None:
    rules = Rules({"*": "offload", "layers.0.up": "keep", "layers": "compress"}, default="keep")
    assert choice(rules, "layers.0.up", block="layers.0") == "keep"
    assert choice(rules, "layers.0.down", block="layers.0") == "recompute"
    assert choice(rules, "layers.0.down") == "compress"
