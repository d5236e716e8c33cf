"""ZeRO's formulas, and what shapes say of a rank."""

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import nn

from packlight.sharding import Share, Weight, weights_of
from packlight.sharding.residual import Checkpointing, checkpoint_bytes
from packlight.sharding.stages import ALIGNMENT, ZeroOptions, paper_bytes, zero_sharding


def test_the_papers_table_of_a_model_of_seven_and_a_half_billion_parameters_is_reproduced() -> None:
    # Rajbhandari et al. 2020, figure 1 and section 5.4: GB for 7.5B parameters on 1, 4, 16 and 64 ranks.
    table = {
        1: (120.0, 120.0, 120.0, 120.0),
        4: (120.0, 52.5, 41.25, 30.0),
        16: (120.0, 35.6, 21.6, 7.5),
        64: (120.0, 31.4, 16.6, 1.88),
    }
    for num_ranks, stages in table.items():
        for stage, wanted in enumerate(stages):
            found = paper_bytes(7_500_000_000, stage=stage, num_ranks=num_ranks) / 1e9
            assert found == pytest.approx(wanted, abs=0.1 if wanted > 2 else 0.01), (num_ranks, stage)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> list[Weight]:
    """Draw parameters of two groups, of sizes that nothing divides; one is not trained."""
    draw = random.Random(seed)
    shapes = [tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(3, 12))]
    made = [Weight(f"w{at}", shape, dtype, group=draw.randint(0, 1)) for at, shape in enumerate(shapes)]
    return [*made, Weight("frozen", (3, 5), dtype, is_trained=False)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stage", [1, 2])
def test_partitions_of_all_ranks_hold_every_element_once_and_are_equally_large(seed: int, stage: int) -> None:
    weights, num_ranks = drawn(seed), random.Random(seed).randint(1, 9)
    made = zero_sharding(weights, ZeroOptions(stage, num_ranks, reduce_bucket_elements=100))
    shares = [share for own in made.shares for share in own]
    for weight in weights:
        held = sum(share.numel for share in shares if share.name == weight.name)
        assert held == (weight.numel if weight.is_trained else 0)
    sizes = {sum(share.numel for share in own) for own in made.shares}
    groups = {weight.group for weight in weights if weight.is_trained}
    whole = [sum(each.numel for each in weights if each.is_trained and each.group == group) for group in groups]
    assert sizes == {sum(ALIGNMENT * math.ceil(size / (ALIGNMENT * num_ranks)) for size in whole)}
    assert made.master_bytes == 4 * sizes.pop()


@pytest.mark.parametrize("seed", range(8))
def test_in_stage_three_a_rank_holds_a_part_of_each_parameter_rounded_up(seed: int) -> None:
    weights, num_ranks = drawn(seed, torch.bfloat16), random.Random(seed).randint(1, 9)
    made = zero_sharding(weights, ZeroOptions(3, num_ranks, persistent_elements=20))
    parts = {weight.name: -(-weight.numel // num_ranks) for weight in weights}
    assert made.parameter_bytes == 2 * sum(parts.values())
    assert {share.name: share.numel for share in made.shares[0]} == {
        name: part for name, part in parts.items() if name != "frozen"
    }
    persistent = sum(weight.nbytes for weight in weights if weight.numel <= 20)
    assert made.buffer_bytes == 2 * 500_000_000 and made.persistent_bytes == persistent


def test_tied_and_meta_parameters_are_counted_once_and_in_full() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"wte": nn.Embedding(1000, 64), "head": nn.Linear(64, 1000, bias=False)})
        model["head"].weight = model["wte"].weight
    assert weights_of(model) == (Weight("wte.weight", (1000, 64), torch.float32),)
    made = zero_sharding(weights_of(model), ZeroOptions(2, 4))
    assert made.parameter_bytes == 4 * 64_000 and made.master_bytes == 64_000


def test_frozen_parameters_have_no_state_and_stay_whole_before_stage_three() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters())
    made = zero_sharding(weights_of(model, [optimizer]), ZeroOptions(1, 2))
    assert made.parameter_bytes == 4 * 72 + 4 * 72
    assert {share.name for own in made.shares for share in own} == {"1.weight", "1.bias"}


@pytest.mark.parametrize(("stage", "num_ranks"), [(4, 2), (-1, 2), (2, 0)])
def test_stages_and_ranks_that_there_are_not_are_refused(stage: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="wanted a stage from 0 to 3 and 1 rank or more"):
        ZeroOptions(stage, num_ranks)


def test_parameters_of_several_dtypes_are_refused() -> None:
    weights = [Weight("a", (2,), torch.float32), Weight("b", (2,), torch.bfloat16)]
    with pytest.raises(ValueError, match="ZeRO wants one dtype"):
        zero_sharding(weights, ZeroOptions(2, 2))


def test_a_share_is_frozen_data() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Share("a", (2,), (1,), torch.float32).name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_parallel": 0}, "1 or more"),
        ({"is_contiguous": True, "num_checkpoints": 2}, "partitioned activations only"),
        ({"partitions": True, "is_contiguous": True}, "say it in num_checkpoints"),
    ],
)
def test_checkpointing_that_deepspeed_refuses_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Checkpointing(**options)


def test_inputs_that_cannot_be_divided_and_too_few_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided among 2 ranks"):
        checkpoint_bytes([((3, 5), torch.float32)], 2, Checkpointing(2, partitions=True))
    with pytest.raises(ValueError, match="raise num_checkpoints"):
        how = Checkpointing(2, partitions=True, is_contiguous=True, num_checkpoints=1)
        checkpoint_bytes([((4, 5), torch.float32)], 2, how)


def test_checkpoints_in_host_memory_take_none_of_the_devices_but_what_is_gathered() -> None:
    found = checkpoint_bytes([((4, 6), torch.bfloat16)], 3, Checkpointing(2, partitions=True, on_host=True))
    assert (found.device_bytes, found.host_bytes, found.gathered_bytes, found.sent_bytes) == (0, 72, 48, 72)
