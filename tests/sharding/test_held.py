"""What ranks hold is what shapes say, to the byte, under DeepSpeed and FSDP2 on real processes over gloo."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import Found, found_by

SCRIPT = Path(__file__).parent / "held.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held")


@cache
def ranks(what: str, num_ranks: int, folder: Path) -> list[Found]:
    return found_by(num_ranks, SCRIPT, what, folder / f"{what}-{num_ranks}")


def test_what_deepspeed_holds_between_steps_is_what_shapes_say_in_all_stages_and_dtypes(folder: Path) -> None:
    for *found, _, _ in ranks("zero", 3, folder):
        assert {(each["stage"], each["dtype"]) for each in found} == {
            (stage, dtype) for stage in range(4) for dtype in ("torch.float32", "torch.bfloat16")
        }
        for each in found:
            assert each["held"] == each["said"], each
            assert each["same"], each  # the engine at hand says the same of the optimiser's shares


def test_deepspeed_takes_the_config_of_a_plan_and_keeps_packlights_optimiser(folder: Path) -> None:
    for *_, made, _ in ranks("zero", 3, folder):
        assert made["stage"] == made["taken_stage"] and made["bucket"] == made["wanted_bucket"]
        assert made["is_ours"] and made["learns"] and made["json"] and made["clipping"] == 1.0


def test_partitioned_checkpoints_hold_a_part_of_each_blocks_input_and_contiguous_ones_all_buffers(
    folder: Path,
) -> None:
    for each_rank in ranks("zero", 3, folder):
        found: Any = each_rank[-1]
        plain, partitioned, contiguous = found
        assert all(each["held"] == each["said"] for each in found)
        assert partitioned["held"] == plain["held"] // 3 and contiguous["held"] == partitioned["held"] * 5 // 4


def test_what_fully_shard_holds_is_what_shapes_say_and_a_cut_model_tells_how_it_is_cut(folder: Path) -> None:
    for found in ranks("fsdp", 3, folder):
        *cut, half, _, _, _, _ = found
        for each in cut:
            assert each["held"] == each["said"] and each["same"] and each["trains"], each
            assert "cut over processes already" in each["refusal"]
        assert half == {"gathered": "torch.bfloat16", "kept": True}


def test_a_model_is_cut_as_its_plan_says_with_its_precision_and_its_host_memory(folder: Path) -> None:
    for *_, half, on_host, _, _ in ranks("fsdp", 3, folder):
        assert half["dtypes"] == ["torch.bfloat16"] and not half["offloads"] and half["policy"] == "OffloadPolicy"
        assert on_host["dtypes"] == ["None"] and on_host["offloads"] and on_host["policy"] == "CPUOffloadPolicy"
        assert all(each["units"] and each["trains"] for each in (half, on_host))


def test_meshes_with_replicas_are_refused_by_name_and_units_inside_recomputed_blocks_are_gathered_again(
    folder: Path,
) -> None:
    for *_, refusal, is_equal in ranks("fsdp", 3, folder):
        checked: Any = is_equal
        assert "over a second axis of the mesh (HSDP)" in str(refusal)
        assert checked is True
