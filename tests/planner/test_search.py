"""Searches with a tier: what moves is spread over equal blocks, and more room for it makes no plan slower."""

import random
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from packlight.budget import Budget
from packlight.planner import search
from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment
from packlight.planner.known_hardware import named
from packlight.planner.links import find_link
from packlight.planner.moving import Moving
from packlight.planner.options import encodings, moves
from packlight.planner.profile import profile
from packlight.planner.program import GAP
from packlight.planner.search import Search
from packlight.planner.solve import solve
from packlight.planner.spread import Spread, evenly
from packlight.step import Profile

pytestmark = pytest.mark.usefixtures("seed")


def mean_square(output: Tensor, _: Tensor) -> Tensor:
    return output.square().mean()


def step_through_host(host_budget: str, *, num_layers: int = 8) -> Profile:
    """A step of an encoder on the meta device, for named hardware."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True) for _ in range(num_layers)]
        model, batch = nn.Sequential(*layers), torch.empty(4, 1024, 2048)
    step = profile(model, batch, torch.optim.AdamW(model.parameters()), loss=mean_square, hardware="h100-80g")
    link = find_link(torch.device("meta"), host_budget=host_budget, known=named("h100-80g"))
    return replace(step, link=link)


def test_weights_are_ordered_so_that_their_sums_stay_within_the_largest_of_their_share() -> None:
    for _ in range(100):
        weights = [random.choice((0, 0, 1, 3, random.randrange(100))) for _ in range(random.randrange(1, 20))]
        places = evenly(weights)
        assert sorted(places) == list(range(len(weights)))
        mean, total = sum(weights) / len(weights), 0.0
        for number, place in enumerate(places[:-1], start=1):
            total += weights[place]
            assert abs(total - number * mean) <= max(weights)


def test_equal_weights_stay_where_they_are() -> None:
    assert evenly([7] * 5) == evenly([7] * 5, behind=0.5) == list(range(5))
    assert evenly([]) == []


def test_weights_at_one_end_are_spread() -> None:
    assert [([3] * 3 + [0] * 3)[at] for at in evenly([3] * 3 + [0] * 3)] == [3, 0, 3, 0, 3, 0]


def test_dealing_out_changes_which_of_the_equal_blocks_does_what_and_nothing_else() -> None:
    step = step_through_host("64GiB")
    costs = StepCost(step)
    blocks = costs.saving_blocks()
    inner = [
        name
        for name in costs.groups
        if name.startswith(f"{blocks[1]}.") and len(costs.blocks_of(costs.groups[name])) == 1
    ]
    assert inner
    recomputed = frozenset(blocks[4:6])
    treated = {name: Treatment("offload") for name in inner}
    before = costs.price(recomputed, None, treated=treated)
    deals = list(Spread(costs).deals(recomputed, treated))
    assert any(set(dealt) != set(treated) or again != recomputed for again, dealt in deals)
    for again, dealt in deals:
        assert len(again) == len(recomputed)
        assert Counter(map(costs.group_bytes, dealt)) == Counter(map(costs.group_bytes, treated))
        waiting = costs.moving(recomputed, treated).waiting_seconds, costs.moving(again, dealt).waiting_seconds
        after = costs.price(again, None, treated=dealt)
        assert after.seconds - waiting[1] == pytest.approx(before.seconds - waiting[0])


def test_copies_that_nobody_waits_for_are_as_fast_as_their_link_and_others_as_slow_as_they_were() -> None:
    step = step_through_host("64GiB", num_layers=2)
    assert step.link is not None
    assert Moving().slowness(step) == (1.0, 1.0)
    assert Moving(stored_bytes=1).slowness(step) == (1.0, 1.0)
    num_bytes = round(step.forward_seconds * step.link.out_bytes_per_second)
    out, back = Moving(stored_bytes=num_bytes, waiting_out_seconds=step.forward_seconds).slowness(step)
    assert out == pytest.approx(2.0, rel=1e-6) and back == 1.0


def test_room_on_the_host_makes_plans_faster_and_little_of_it_none_slower() -> None:
    steps = [step_through_host(budget) for budget in ("1B", "1GiB", "16GiB")]
    plain = StepCost(steps[0]).price((), steps[0].optimizers[0])
    least_bytes = solve(steps[0], Budget(2 * plain.peak_bytes), exact=True).smallest_budget_bytes
    budget = Budget(least_bytes + (plain.peak_bytes - least_bytes) // 3)
    none, little, enough = (solve(step, budget, exact=True).estimate.slowdown for step in steps)
    assert little - 1 <= (none - 1) * (1 + GAP)
    assert enough - 1 < 0.9 * (none - 1)


def test_a_search_that_is_told_of_waiting_finds_a_plan_that_waits_less_than_its_first() -> None:
    step = step_through_host("64GiB")
    costs = StepCost(step)
    costs = costs.through(3 * max(map(costs.group_bytes, costs.groups)))
    options = encodings(costs, exact=True) | moves(costs, exact=True)
    least, plain = (
        Search(costs, options, step.optimizers[:1]).least(step.optimizers[0]).cost,
        costs.price((), step.optimizers[0]),
    )
    allowed_bytes = least.peak_bytes + (plain.peak_bytes - least.peak_bytes) // 3
    found = []
    for num_tries in (1, search.MAX_TRIES):
        with mock.patch.object(search, "MAX_TRIES", num_tries):
            chosen = Search(costs, options, step.optimizers[:1]).fastest(allowed_bytes, max_seconds=120.0)
        assert chosen is not None and chosen.cost.peak_bytes <= allowed_bytes
        found.append((chosen.cost.seconds, costs.moving(chosen.recomputed, chosen.treated).waiting_seconds))
    (first_seconds, first_waiting), (seconds, waiting) = found
    assert waiting < first_waiting and seconds < first_seconds
