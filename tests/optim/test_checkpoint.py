"""Checkpoints: resuming is not having stopped, and states go to and from other formats and torch's optimisers."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.numerics import FORMATS
from packlight.optim import SGD, Adam, AdamW
from packlight.optim.state import nbytes
from tests.cases import GPT, NUM_BYTES, windows

# Attention's key biases have a gradient of 0 but for rounding, some 1e-9: it must not become a whole step.
EPS = {"AdamW": {"eps": 1e-6}, "Adam": {"eps": 1e-6}, "SGD": {}}

ROUNDINGS = ["stochastic", "nearest", "master24", "master32"]
OURS: dict[str, Callable[..., Any]] = {
    "AdamW": AdamW,
    "Adam": Adam,
    "SGD": lambda params, **options: SGD(params, **{"momentum": 0.9, **options}),
}
THEIRS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": lambda params, **options: torch.optim.SGD(params, **{"momentum": 0.9, **options}),
}

# What loading may change, of the tensor's largest magnitude. First moments: half the widest gap between values
# (NF4 -1 to -.696; softsign 1/127 and a bf16 scale; E4M3 2^-4; the dynamic exponent's .775 to 1).
FIRST = {
    "fp32": 0.0,
    "4bit": 0.1520,
    "8bit": 1 / 127 + 2.0**-7,
    "fp8": 2.0**-4,
    "paper4bit": 0.1126,
    "factored": 0.1126,
}
# Roots of second moments: a level (the least value is lifted to the first) of 16 or 256; E4M3's 2^-4, in the root
# half of it, and its least value; the linear book's level of 1/16 is a root of 1/4. Factored ones keep sums only.
SECOND_ROOT = {"fp32": 1e-6, "4bit": 1 / 16 + 1e-3, "8bit": 1 / 256 + 2.0**-7, "fp8": 2.0**-4, "paper4bit": 0.25}


def gpt(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(width=96, num_layers=1).to(dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        tokens = windows(4, 32)
        optimizer.zero_grad()
        logits = net(tokens).float()[:, :-1]
        F.cross_entropy(logits.reshape(-1, NUM_BYTES), tokens[:, 1:].reshape(-1)).backward()
        optimizer.step()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def same_states(left: Any, right: Any) -> bool:
    pairs = zip(left.state_dict()["state"].values(), right.state_dict()["state"].values(), strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def resumed(net: nn.Module, dtype: torch.dtype) -> GPT:
    other = gpt(dtype)
    other.load_state_dict(net.state_dict())
    return other


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("rounding", ["float32", *ROUNDINGS])
def test_resuming_is_not_having_stopped(kind: str, state_format: str, rounding: str) -> None:
    dtype = torch.float32 if rounding == "float32" else torch.bfloat16
    options = {"state_format": state_format} | ({} if rounding == "float32" else {"bf16_rounding": rounding})
    net = gpt(dtype)
    first = OURS[kind](net.named_parameters(), lr=1e-2, seed=7, **options)
    train(net, first, steps=range(3))
    other = resumed(net, dtype)
    second = OURS[kind](other.named_parameters(), lr=5.0, **options)
    second.load_state_dict(through_file(first.state_dict()))
    assert same_states(first, second)
    train(net, first, steps=range(3, 5))
    train(other, second, steps=range(3, 5))
    assert same(net, other)
    assert same_states(first, second)
    assert second.state_bytes() == first.state_bytes() == sum(map(nbytes, second.state.values()))


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("saved", FORMATS)
def test_any_format_loads_into_any_other_within_its_rounding(saved: str, wanted: str) -> None:
    net = gpt()
    first = AdamW(net.parameters(), lr=1e-2, state_format=saved)
    train(net, first, steps=range(3))
    second = AdamW(net.parameters(), state_format=wanted)
    second.load_state_dict(first.state_dict())
    assert second.state_bytes() == AdamW(net.parameters(), state_format=wanted).state_bytes()
    assert second.param_groups[0]["lr"] == 1e-2
    before, after = (each.state_dict(format="portable")["state"] for each in (first, second))
    for index, state in before.items():
        assert float(after[index]["step"]) == 3
        exact, found = state["exp_avg"], after[index]["exp_avg"]
        bound = 0.0 if saved == wanted else FIRST[wanted] + 1e-6
        assert float((found - exact).abs().max()) <= bound * float(exact.abs().max())
        if wanted != "factored":
            exact, found = state["exp_avg_sq"].sqrt(), after[index]["exp_avg_sq"].sqrt()
            error = (found - exact).abs()
            if wanted == "fp8":  # a zero becomes the least code, which the power of its block makes large
                error = torch.where(exact == 0, 0, error)
            bound = 0.0 if saved == wanted else SECOND_ROOT[wanted]
            assert float(error.max()) <= bound * float(exact.abs().max())
    train(net, second, steps=range(3, 5))


@pytest.mark.parametrize("wanted", ROUNDINGS)
@pytest.mark.parametrize("saved", ROUNDINGS)
def test_any_rounding_of_parameters_loads_into_any_other(saved: Any, wanted: Any) -> None:
    net = gpt(torch.bfloat16)
    first = AdamW(net.parameters(), bf16_rounding=saved)
    train(net, first, steps=range(2))
    other = resumed(net, torch.bfloat16)
    second = AdamW(other.parameters(), bf16_rounding=wanted)
    second.load_state_dict(through_file(first.state_dict()))
    # Whichever of the two roundings goes on, its error bits are there.
    goes_on = second.param_groups[0]["bf16_rounding"]
    expected = AdamW(other.parameters(), bf16_rounding=goes_on).state_bytes()
    assert second.state_bytes() == expected
    train(other, second, steps=range(2, 4))
    assert second.state_bytes() == expected
    assert all(bool(param.isfinite().all()) for param in other.parameters())
    if saved == wanted:
        train(net, first, steps=range(2, 4))
        assert same(net, other)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("state_format", FORMATS)
def test_portable_state_dict_is_torchs(kind: str, state_format: str) -> None:
    net = gpt()
    first = OURS[kind](net.parameters(), lr=1e-2, weight_decay=0.1, state_format=state_format, **EPS[kind])
    train(net, first, steps=range(3))
    portable = through_file(first.state_dict(format="portable"))
    other = resumed(net, torch.float32)
    theirs = THEIRS[kind](other.parameters())
    theirs.load_state_dict(portable)
    assert {key for group in theirs.param_groups for key in group} == set(
        THEIRS[kind](gpt().parameters()).param_groups[0]
    )
    assert {value.dtype for state in portable["state"].values() for value in state.values()} == {torch.float32}
    again = OURS[kind](net.parameters(), state_format="fp32")
    again.load_state_dict(theirs.state_dict())
    train(net, again, steps=range(3, 6))
    train(other, theirs, steps=range(3, 6))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert float((a - b).detach().norm()) <= 1e-3 * float(b.detach().norm())


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("state_format", FORMATS)
def test_torchs_state_dict_goes_on_in_ours(kind: str, state_format: str) -> None:
    net = gpt()
    theirs = THEIRS[kind](net.parameters(), lr=1e-2)
    train(net, theirs, steps=range(3))
    ours = OURS[kind](net.parameters(), state_format=state_format)
    expected_bytes = ours.state_bytes()
    ours.load_state_dict(through_file(theirs.state_dict()))
    assert ours.state_bytes() == expected_bytes == sum(map(nbytes, ours.state.values()))
    assert ours.param_groups[0]["lr"] == 1e-2
    assert set(ours.param_groups[0]) == set(OURS[kind](net.parameters()).param_groups[0])
    exact = theirs.state_dict()["state"]
    for index, state in ours.state_dict(format="portable")["state"].items():
        for name in {"exp_avg", "momentum_buffer"} & state.keys():
            bound = (FIRST[state_format] + 1e-6) * float(exact[index][name].abs().max())
            assert float((state[name] - exact[index][name]).abs().max()) <= bound
    train(net, ours, steps=range(3, 5))


def test_torchs_sgd_without_momentum_goes_on_in_ours() -> None:
    net = gpt()
    theirs = torch.optim.SGD(net.parameters(), lr=0.25)
    train(net, theirs, steps=range(2))
    ours = SGD(net.parameters(), momentum=0.9)
    ours.load_state_dict(through_file(theirs.state_dict()))
    assert (ours.param_groups[0]["momentum"], ours.param_groups[0]["lr"]) == (0.0, 0.25)
    train(net, ours, steps=range(2, 3))


@pytest.mark.parametrize("source", ["ours", "portable", "torch"])
def test_adams_decay_does_not_change_its_kind_by_loading_and_a_warning_says_so(source: str) -> None:
    for own, other, theirs in ((AdamW, Adam, torch.optim.Adam), (Adam, AdamW, torch.optim.AdamW)):
        left, right = gpt(), gpt()
        optimizer = own(left.parameters())
        kind: Any = theirs if source == "torch" else other
        form = {"format": "portable"} if source == "portable" else {}
        saved = kind(left.parameters(), weight_decay=0.5).state_dict(**form)
        with pytest.warns(UserWarning, match=f"Load it into packlight.{other.__name__}, or set weight_decay"):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0].get("decoupled_weight_decay", own.decoupled) is own.decoupled
        train(left, optimizer, steps=range(2))
        train(right, own(right.parameters(), weight_decay=0.5), steps=range(2))
        assert same(left, right)


@pytest.mark.parametrize("source", ["ours", "torch"])
def test_without_decay_or_with_the_same_kind_loading_is_silent(source: str) -> None:
    ours: tuple[Any, Any] = (AdamW, Adam)
    adamw, adam = ours if source == "ours" else (torch.optim.AdamW, torch.optim.Adam)
    net = gpt()
    AdamW(net.parameters()).load_state_dict(adam(net.parameters()).state_dict())
    Adam(net.parameters()).load_state_dict(adamw(net.parameters(), weight_decay=0.0).state_dict())
    AdamW(net.parameters()).load_state_dict(adamw(net.parameters(), weight_decay=0.5).state_dict())
    Adam(net.parameters()).load_state_dict(adam(net.parameters(), weight_decay=0.5).state_dict())


@pytest.mark.parametrize(("before", "after"), [("master32", "master24"), ("master24", "master32")])
def test_error_bits_are_kept_in_the_other_number_of_them(before: Any, after: Any, seed: int) -> None:
    net = gpt(torch.bfloat16)
    first = AdamW(net.parameters(), bf16_rounding=before)
    train(net, first, steps=range(3))
    second = AdamW(net.parameters(), bf16_rounding=after)
    second.load_state_dict(through_file(first.state_dict()))
    for param in net.parameters():
        old, new = (one.state[param]["param_error"] for one in (first, second))
        parts = [each.to(torch.int32) * (256 if each.dtype == torch.int8 else 1) for each in (old, new)]
        # 8 bits are rounded to nearest, but for the largest, which is cut off.
        assert int((parts[0] - parts[1]).abs().max()) <= (0 if after == "master32" else 255)
        assert float((parts[0] - parts[1]).abs().float().mean()) <= 90  # 64 on average
        assert int(new.count_nonzero()) > 0


def _foreign(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    net = gpt()
    optimizer = make(net.parameters())
    train(net, optimizer, steps=range(1))
    return optimizer.state_dict()


def _without_last_parameter() -> dict[str, Any]:
    state_dict = _foreign(AdamW)
    state_dict["param_groups"][0]["params"].pop()
    return state_dict


REFUSED: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "AdamW: amsgrad": ("AdamW", lambda: _foreign(lambda params: torch.optim.AdamW(params, amsgrad=True))),
    "AdamW: torch's SGD": ("AdamW", lambda: _foreign(lambda params: torch.optim.SGD(params, momentum=0.9))),
    "AdamW: torch's RMSprop": ("AdamW", lambda: _foreign(torch.optim.RMSprop)),
    "AdamW: Adamax": ("AdamW", lambda: _foreign(torch.optim.Adamax)),
    "AdamW: our SGD": ("AdamW", lambda: _foreign(lambda params: SGD(params, momentum=0.9))),
    "AdamW: our SGD without momentum": ("AdamW", lambda: _foreign(SGD)),
    "SGD: torch's AdamW": ("SGD", lambda: _foreign(torch.optim.AdamW)),
    "SGD: our AdamW": ("SGD", lambda: _foreign(AdamW)),
    "SGD: our unused AdamW": ("SGD", lambda: AdamW(gpt().parameters()).state_dict()),
    "AdamW: fewer parameters": ("AdamW", _without_last_parameter),
    "AdamW: other shapes": (
        "AdamW",
        lambda: {**_foreign(AdamW), "state": {0: _foreign(AdamW)["state"][1]}},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_optimisers_states_are_refused_with_everything_as_it_was(case: str) -> None:
    kind, make = REFUSED[case]
    net = gpt()
    optimizer = OURS[kind](net.parameters(), lr=0.125)
    train(net, optimizer, steps=range(1))
    groups, states = copy.deepcopy(optimizer.state_dict()["param_groups"]), copy.deepcopy(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(make())
    assert optimizer.state_dict()["param_groups"] == groups
    assert same_states(optimizer, states)
    train(net, optimizer, steps=range(1, 2))


def test_loaded_state_shares_nothing_with_what_was_loaded() -> None:
    net, other = gpt(), gpt()
    first, second = AdamW(net.parameters()), AdamW(other.parameters())
    train(net, first, steps=range(1))
    saved = copy.deepcopy(first)
    second.load_state_dict(first.state_dict())
    train(other, second, steps=range(2))
    assert same_states(first, saved)


def test_loading_replaces_all_states() -> None:
    net = gpt()
    optimizer, fresh = AdamW(net.parameters()), AdamW(net.parameters())
    train(net, optimizer, steps=range(1))
    optimizer.load_state_dict(fresh.state_dict())
    assert not optimizer.state


def test_what_a_users_hook_makes_of_a_state_dict_is_loaded() -> None:
    net = gpt()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, steps=range(1))

    def change(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.75} for group in state_dict["param_groups"]]
        states = {index: {**state, "step": torch.tensor(9.0)} for index, state in state_dict["state"].items()}
        return {**state_dict, "param_groups": groups, "state": states}

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.75
    assert {float(state["step"]) for state in optimizer.state.values()} == {9.0}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_copy_and_pickle_go_on_bit_for_bit(kind: str, clone: Callable[[Any], Any]) -> None:
    net = gpt()
    optimizer = OURS[kind](net.parameters())
    train(net, optimizer, steps=range(2))
    other_net, other = clone((net, optimizer))
    assert type(other) is type(optimizer)
    train(net, optimizer, steps=range(2, 4))
    train(other_net, other, steps=range(2, 4))
    assert same(net, other_net)
    assert same_states(optimizer, other)


def test_parameters_with_different_numbers_of_steps_resume_each_at_its_own() -> None:
    net = gpt()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, steps=range(1))
    net.token.requires_grad_(False)
    train(net, optimizer, steps=range(1, 3))
    net.token.requires_grad_(True)
    other = resumed(net, torch.float32)
    second = AdamW(other.parameters())
    second.load_state_dict(through_file(optimizer.state_dict()))
    steps: list[Tensor] = [second.state[param]["step"] for param in other.parameters()]
    assert sorted(set(map(float, steps))) == [1.0, 3.0]
    train(net, optimizer, steps=range(3, 5))
    train(other, second, steps=range(3, 5))
    assert same(net, other)
