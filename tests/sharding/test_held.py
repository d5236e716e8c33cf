"""What ranks hold is what shapes say, to the byte, under DeepSpeed and FSDP2 on real processes over gloo."""

from functools import cache
from pathlib import Path

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
    for found in ranks("zero", 3, folder):
        assert {(each["stage"], each["dtype"]) for each in found} == {
            (stage, dtype) for stage in range(4) for dtype in ("torch.float32", "torch.bfloat16")
        }
        for each in found:
            assert each["held"] == each["said"], each
            assert each["same"], each  # the engine at hand says the same of the optimiser's shares


def test_what_fully_shard_holds_is_what_shapes_say_and_a_cut_model_tells_how_it_is_cut(folder: Path) -> None:
    for found in ranks("fsdp", 3, folder):
        *cut, half = found
        for each in cut:
            assert each["held"] == each["said"] and each["same"] and each["trains"], each
        assert half == {"gathered": "torch.bfloat16", "kept": True}
