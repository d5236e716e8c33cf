"""Plans for several ranks: which sharding is chosen, and what each rank would hold and send."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packlight
from packlight.budget import BudgetError
from packlight.planner.known_hardware import named
from packlight.planner.request import World
from packlight.planner.world import seen_by_rank, ways
from packlight.ranks import ShardingRow
from packlight.records import Plan


class Decoder(nn.Module):
    """A language model with a tied head."""

    def __init__(self, width: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(num_blocks)
        )
        self.head = nn.Linear(width, 512, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.wte(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def made(
    budget: int | str,
    world: World | int,
    *,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
    host_budget: str | None = None,
) -> Plan:
    with torch.device("meta"):
        model = Decoder(width).to(dtype)
        ids = torch.zeros(2, 64, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    given = packlight.Budget.of(budget)
    asked: Any = {"hardware": "h100-80g", "world": world, "exact": exact, "host_budget": host_budget}
    return packlight.plan(model, ids, optimizer, budget=given, **asked)


def rows(plan: Plan) -> dict[str, ShardingRow]:
    assert plan.sharding is not None
    return {row.name: row for row in plan.sharding.rows}


def test_where_everything_fits_the_fastest_sharding_is_taken_and_the_plan_says_what_binds() -> None:
    plan = made("1GiB", World(8, link_bytes_per_second=1e12))
    assert plan.sharding is not None
    known = [row for row in plan.sharding.rows if row.step_seconds is not None]
    assert min(known, key=lambda row: row.step_seconds or 0.0).is_chosen and plan.sharding.num_ranks == 8
    assert plan.estimate.device_peak_bytes <= 2**30 and set(plan.state_formats.values()) == {"fp32"}
    assert "compute binds" in plan.sharding.binds and plan.sharding.binds in str(plan)
    assert {row.name for row in plan.sharding.rows} == {*("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2 (kept)")}
    assert sum(row.is_chosen for row in plan.sharding.rows) == 1


def test_where_states_are_too_many_for_a_rank_an_exact_plan_cuts_them_before_anything_is_recomputed() -> None:
    link = 1e12
    alone = made("1GiB", World(8, engine="ddp", link_bytes_per_second=link), width=256).estimate
    plan = made(int(0.8 * alone.plain_peak_bytes), World(8, link_bytes_per_second=link), width=256, exact=True)
    assert plan.sharding is not None and plan.sharding.engine in ("zero", "fsdp")
    assert not plan.recomputed() and set(plan.state_formats.values()) == {"fp32"}


def test_on_more_ranks_states_take_less_and_low_bit_formats_are_not_chosen_for_nothing() -> None:
    few, many = (made("1GiB", World(number, engine="zero")) for number in (2, 64))
    for stage in (1, 2, 3):
        one, other = (rows(plan)[f"ZeRO-{stage}"] for plan in (few, many))
        assert other.state_bytes["fp32"] < one.state_bytes["fp32"] / 16
    assert set(many.state_formats.values()) == {"fp32"}


def test_a_slow_link_is_said_to_bind_and_its_seconds_are_those_of_the_bytes() -> None:
    plan = made("1GiB", World(4, engine="ddp", link_bytes_per_second=1e7))
    assert plan.sharding is not None
    (row,) = plan.sharding.rows
    with torch.device("meta"):
        numel = sum(each.numel() for each in Decoder().parameters())
    assert row.sent_bytes == 2 * 4 * numel * 3 // 4
    assert row.communication_seconds == pytest.approx(row.sent_bytes / 1e7, rel=0.01)
    assert "the link binds" in plan.sharding.binds
    assert plan.estimate.step_seconds >= row.exposed_seconds > 0


def test_one_rank_holds_what_a_model_without_ranks_holds() -> None:
    with torch.device("meta"):
        model, ids = Decoder(), torch.zeros(2, 64, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    alone = packlight.plan(model, ids, optimizer, budget="1GiB", hardware="h100-80g")
    plan = made("1GiB", World(1, engine="ddp"))
    assert plan.estimate.device_peak_bytes == alone.estimate.device_peak_bytes
    assert plan.estimate.step_seconds == pytest.approx(alone.estimate.step_seconds)


def test_where_nothing_fits_each_sharding_says_what_it_would_need() -> None:
    with pytest.raises(BudgetError, match=r"under ZeRO-1.*under ZeRO-3|under ZeRO-3.*under ZeRO-1") as refused:
        made("1MiB", World(2, engine="zero"))
    smallest = refused.value.smallest_bytes
    assert smallest is not None
    assert made(smallest, World(2, engine="zero")).estimate.device_peak_bytes <= smallest


def test_a_plan_for_ranks_is_saved_and_read_again(tmp_path: Path) -> None:
    plan = made("1GiB", 4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["sharding"]["num_ranks"] == 4


def test_in_sixteen_bits_deepspeeds_stages_have_fp32_copies_to_step_and_others_have_none() -> None:
    plan = made("1GiB", 4, dtype=torch.bfloat16)
    with torch.device("meta"):
        numel = sum(each.numel() for each in Decoder().parameters())
    assert any("which trains differently" in note for note in plan.notes)
    found = rows(plan)
    assert found["DDP"].parameter_bytes == 2 * numel
    assert 2 * numel + numel <= found["ZeRO-2"].parameter_bytes < 2 * numel + 1.01 * numel


def test_with_a_precision_fp32_shares_are_used_in_sixteen_bits_and_no_engine_trains_differently() -> None:
    plan = made("1GiB", World(4, precision="bf16"))
    halves, wholes = rows(made("1GiB", 4, dtype=torch.bfloat16)), rows(made("1GiB", 4))
    found = rows(plan)
    assert set(found) == set(halves) - {"DDP"} and not any("differently" in note for note in plan.notes)
    for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3"):  # DeepSpeed steps fp32 copies, so this is what a model in bf16 takes
        assert replace(found[name], is_chosen=False, step_seconds=None) == replace(
            halves[name], is_chosen=False, step_seconds=None
        )
    for name in ("FSDP2", "FSDP2 (kept)"):
        cast, half, whole = found[name], halves[name], wholes[name]
        assert (cast.parameter_bytes, cast.state_bytes["fp32"]) == (whole.parameter_bytes, whole.state_bytes["fp32"])
        assert cast.sent_bytes == half.sent_bytes == whole.sent_bytes // 2
        assert cast.buffer_bytes < whole.buffer_bytes and cast.plain_peak_bytes < whole.plain_peak_bytes
        assert half.state_bytes["fp32"] < whole.state_bytes["fp32"] * 0.51  # torch's own are in bf16 there
    with pytest.raises(ValueError, match=r"precision bf16 is of fp32 parameters; some are torch\.bfloat16"):
        made("1GiB", World(4, precision="bf16"), dtype=torch.bfloat16)


def test_where_host_memory_may_be_used_shares_are_kept_there_when_a_rank_has_no_room_for_them() -> None:
    roomy = made("1GiB", World(4, engine="fsdp", link_bytes_per_second=1e12), width=256, host_budget="1GiB")
    assert roomy.sharding is not None and not roomy.sharding.offloads
    found = rows(roomy)
    device, host = found["FSDP2"], found["FSDP2 (host)"]
    assert host.parameter_bytes == host.gradient_bytes == device.host_bytes == 0
    with torch.device("meta"):
        shares = [torch.Size((-(-each.shape[0] // 4), *each.shape[1:])).numel() for each in Decoder(256).parameters()]
    assert host.host_bytes == 2 * 4 * sum(shares) and host.sent_bytes == device.sent_bytes
    assert host.plain_peak_bytes < device.plain_peak_bytes - 2 * 4 * sum(shares)  # states go, the rest is copied
    tight = int(0.8 * (device.plain_peak_bytes + host.plain_peak_bytes) / 2)
    plan = made(tight, World(4, engine="fsdp", link_bytes_per_second=1e12), width=256, host_budget="1GiB", exact=True)
    assert plan.sharding is not None and plan.sharding.offloads and plan.estimate.device_peak_bytes <= tight
    states = host.state_bytes["fp32"]
    assert plan.estimate.host_peak_bytes >= host.host_bytes + states and plan.estimate.slowdown > 1
    with pytest.raises(BudgetError):
        made(tight, World(4, engine="fsdp", link_bytes_per_second=1e12), width=256, host_budget="1MiB", exact=True)
    whole = 4 * (host.host_bytes + states)  # the host budget is a rank's
    there = str((host.host_bytes + states) * 3 // 2)
    assert int(there) < whole // 2
    again = made(tight, World(4, engine="fsdp", link_bytes_per_second=1e12), width=256, host_budget=there, exact=True)
    assert again.sharding is not None and again.sharding.offloads


def test_gathered_units_are_on_the_line_only_while_they_are_used() -> None:
    model = Decoder(256)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(2, 64, dtype=torch.long)
    step = packlight.profile(model, ids, optimizer, loss=lambda output, _: output.float().square().mean())
    (kept, cut) = (way for way in ways(model, [optimizer], World(4, engine="fsdp")) if not way.asked.offloads)
    peaks = []
    for way in (kept, cut):
        seen = seen_by_rank(step, way.sharding, 1e12)
        assert [save.storage for save in seen.saves] == [save.storage for save in step.saves]
        assert all(0 <= each.born < each.died <= step.num_events for each in seen.storages)
        added = seen.storages[len(step.storages) :]
        gathered = sum(unit.gathered_bytes for unit in way.sharding.units)
        most = max(
            sum(each.num_bytes for each in added if each.born <= at < each.died) for at in range(step.num_events)
        )
        peaks.append(most)
        assert most <= 3 * gathered
    assert peaks[1] < peaks[0]
    assert cut.asked.units == tuple(f"blocks.{at}" for at in range(4))


@pytest.mark.parametrize(
    ("world", "said"),
    [
        ({"num_ranks": 0}, "1 or more"),
        ({"num_ranks": 2, "engine": "horovod"}, "wanted one of ddp, zero, fsdp"),
        ({"num_ranks": 2, "link_bytes_per_second": 0.0}, "more than 0"),
        ({"num_ranks": 2, "precision": "int8"}, "wanted one of bf16, fp16"),
        ({"num_ranks": 2, "engine": "ddp", "precision": "bf16"}, "use autocast in the script"),
    ],
)
def test_worlds_that_cannot_be_are_refused(world: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        World(**world)  # type: ignore[arg-type]


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    h100 = named("h100-80g")
    assert h100 is not None
    assert h100.link_bytes_per_second(8) > 8 * h100.link_bytes_per_second(16)
    slower = replace(h100, peer_bytes_per_second=0.0)
    assert slower.link_bytes_per_second(8) < h100.link_bytes_per_second(8)
