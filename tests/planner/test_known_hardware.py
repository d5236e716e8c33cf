"""Plans for named hardware rest on its data sheet alone: any machine makes the same, and nothing is measured."""

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn

from packlight.activations.compress import CODECS, encoded_bytes
from packlight.budget import Budget
from packlight.planner import hardware
from packlight.planner.hardware import PRECISIONS, MeasuredFlops, operator_cost
from packlight.planner.known_hardware import KNOWN, LAUNCH_SECONDS, LINK_SHARE, MATRIX_SHARE, MEMORY_SHARE, named
from packlight.planner.plan import plan
from packlight.planner.profile import profile
from packlight.records import Plan
from tests.cases import CASES, MLP

NAMES = ("a100-40g", "a100-80g", "h100-80g", "h200", "l40s", "rtx4090", "rtx3090", "v100-32g", "t4")
AMPLE = "4GiB"

pytestmark = pytest.mark.usefixtures("seed")


def plan_for(name: str, *, dtype: torch.dtype = torch.float32, device: str = "meta", budget: object = AMPLE) -> Plan:
    with torch.device(device):
        model = MLP(2048).to(dtype)
        batch = torch.ones(4096, 64, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    return plan(model, batch, optimizer, budget=budget, loss=lambda out, _: out.sum(), hardware=name)  # type: ignore[arg-type]


@pytest.fixture
def unmeasurable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> float:
        raise AssertionError("something was measured")

    monkeypatch.setattr(hardware, "_best_seconds", refuse)
    hardware.measure.cache_clear()


def test_the_devices_are_these() -> None:
    assert tuple(KNOWN) == NAMES
    assert all(each.name == name for name, each in KNOWN.items())


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_shares_of_the_data_sheet(name: str) -> None:
    known = KNOWN[name]
    rates = known.rates()
    assert set(rates.flops_per_second) == set(PRECISIONS)
    for precision, rate in known.flops_per_second.items():
        assert rates.flops_per_second[precision] == MATRIX_SHARE * rate
    assert rates.bytes_per_second == MEMORY_SHARE * known.bytes_per_second
    assert rates.launch_seconds == LAUNCH_SECONDS
    assert known.host_bytes_per_second == pytest.approx(LINK_SHARE * {3: 15.75e9, 4: 31.5e9, 5: 63e9}[known.pcie], 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_tensor_cores_of_its_own_counts_as_fp32(name: str) -> None:
    known, rates = KNOWN[name], KNOWN[name].rates()
    missing = set(PRECISIONS) - set(known.flops_per_second)
    assert missing == ({"tf32", "bf16"} if name in ("v100-32g", "t4") else set())
    assert all(rates.flops_per_second[precision] == rates.flops_per_second["fp32"] for precision in missing)


def test_codecs_and_low_bit_updates_take_their_bytes_over_the_bandwidth() -> None:
    rates = KNOWN["h200"].rates()
    for codec in CODECS:
        traffic_bytes = 2 * (4 * 2**20 + encoded_bytes(codec, 2**20))
        assert rates.engine.codec_seconds[codec] * 2**20 == pytest.approx(traffic_bytes / rates.bytes_per_second)
    update_bytes = {name: seconds * rates.bytes_per_second for name, seconds in rates.update_seconds.items()}
    # the README's bytes of a state, read and written
    assert 12 + 2 * 1.03 < update_bytes["4bit"] < 12 + 2 * 1.2
    assert 12 + 2 * 2.12 < update_bytes["8bit"] < 12 + 2 * 2.14


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ValueError, match=re.escape(f"'h100' is not known; wanted one of {', '.join(NAMES)}")):
        named("h100")
    with pytest.raises(ValueError, match="h100-80g"):
        plan_for("H100-80G")
    assert named(None) is None


@pytest.mark.usefixtures("unmeasurable")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plan_for_named_hardware_is_the_same_each_time_and_measures_nothing(device: str) -> None:
    plans = [plan_for("a100-80g", device=device, budget="160MiB") for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0] == plan_for("a100-80g", device="meta", budget="160MiB")
    assert plans[0].hardware == "a100-80g" and "on a100-80g" in str(plans[0])
    assert "a100-80g by its data sheet" in plans[0].notes[0]


@pytest.mark.usefixtures("unmeasurable")
def test_blocks_that_cannot_run_twice_are_found_without_measuring() -> None:
    case = CASES["gpt"]()
    step = profile(case.model, case.batch, None, loss=case.loss, hardware="t4")
    assert step.hardware == "t4" and step.regions


def test_a_plan_for_the_device_at_hand_names_none() -> None:
    case = CASES["mlp"]()
    made = plan(case.model, case.batch, None, budget=AMPLE, loss=case.loss)
    assert made.hardware == "" and f"on {made.device}" in str(made)


def test_bf16_is_faster_than_fp32_on_tensor_cores_and_tf32_stands_between() -> None:
    seconds = {
        dtype: plan_for("h100-80g", dtype=dtype).estimate.step_seconds for dtype in (torch.float32, torch.bfloat16)
    }
    torch.set_float32_matmul_precision("high")
    try:
        tf32_seconds = plan_for("h100-80g").estimate.step_seconds
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seconds[torch.bfloat16] < tf32_seconds < seconds[torch.float32]


def test_a_matrix_product_takes_its_operations_over_the_rate_of_its_precision() -> None:
    rates, side = KNOWN["a100-80g"].rates(), 8192
    for dtype, tflops in ((torch.float32, 19.5), (torch.bfloat16, 312), (torch.float16, 312), (torch.float64, 19.5)):
        matrix = torch.empty(side, side, dtype=dtype, device="meta")
        seconds = operator_cost(rates, torch.ops.aten.mm.default, (matrix, matrix), {}, matrix).seconds
        assert seconds == pytest.approx(2 * side**3 / (MATRIX_SHARE * tflops * 1e12))


def test_convolutions_are_in_tf32_as_by_default_in_torch() -> None:
    rates = KNOWN["a100-80g"].rates()
    value, weight = torch.empty(64, 256, 64, 64, device="meta"), torch.empty(256, 256, 3, 3, device="meta")
    args = (value, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    seconds = operator_cost(rates, torch.ops.aten.convolution.default, args, {}, value).seconds
    assert seconds == pytest.approx(2 * value.numel() * 256 * 9 / (MATRIX_SHARE * 156e12))


def test_a_share_is_of_the_named_device_and_more_than_it_has_is_refused() -> None:
    total_bytes = KNOWN["t4"].device_bytes
    assert plan_for("t4", budget="50%").budget_bytes == total_bytes // 2
    for budget in (total_bytes + 1, "101%", "16GiB"):
        with pytest.raises(ValueError, match=r"the device has 14\.50 GiB"):
            plan_for("t4", budget=budget)


def test_a_budget_in_bytes_of_its_own_may_be_more_than_the_device_has_and_a_note_says_so() -> None:
    budget = Budget(2 * KNOWN["t4"].device_bytes)
    made = plan_for("t4", budget=budget)
    assert made.budget_bytes == budget.device_bytes
    assert any("more than the 14.50 GiB that t4 has" in note for note in made.notes)


def test_optimisers_step_as_on_cuda_with_a_temporary_as_large_as_their_parameters() -> None:
    with torch.device("meta"):
        model, batch = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]), torch.ones(4, 64)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    costs = {}
    for foreach in (None, False):
        optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
        step = profile(model, batch, optimizer, loss=lambda out, _: out.sum(), hardware="l40s")
        costs[foreach] = step.optimizers[0]
        assert optimizer.param_groups[0]["foreach"] is foreach
    assert costs[None].temporary_bytes >= num_bytes > costs[False].temporary_bytes
    assert costs[None].state_bytes == costs[False].state_bytes


def test_storages_are_rounded_as_cuda_s_allocator_rounds_them() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
    step = profile(model, torch.ones(7, 3), None, loss=lambda out, _: out.sum(), hardware="rtx4090")
    assert all(storage.num_bytes % 512 == 0 for storage in step.storages)
    assert step.resident_bytes["parameters"] == 4 * 512


def test_records_without_the_name_of_a_hardware_still_load() -> None:
    made = plan_for("h200")
    data = made.to_dict()
    assert Plan.from_dict(copy.deepcopy(data)) == made
    del data["hardware"]
    assert Plan.from_dict(data) == dataclasses.replace(made, hardware="")


def test_a_device_at_hand_measures_a_precision_when_it_is_first_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def measured(_: torch.device, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return 3.0

    monkeypatch.setattr(hardware, "_matrix_flops_per_second", measured)
    rates = MeasuredFlops(torch.device("cpu"), 7.0)
    assert rates["fp32"] == rates["tf32"] == 7.0 and asked == []
    assert rates["bf16"] == rates["bf16"] == 3.0 and asked == [torch.bfloat16]


def test_a_bf16_model_on_this_machine_is_planned_with_the_measured_rate_of_bf16() -> None:
    model, batch = MLP(256).to(torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    step = profile(model, batch, None, loss=lambda out, _: out.sum())
    operators = hardware.measure("cpu").operators
    assert step.seconds > 0 and operators is not None
    assert operators.measured(torch.ops.aten.mm.default, (batch, torch.ones(64, 64, dtype=torch.bfloat16)), {})
