"""States under DeepSpeed's ZeRO, on real processes over gloo: their bytes, what is learned, stopping and going on."""

import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.torchrun import ENVIRONMENT, Found, all_found_by

SCRIPT = Path(__file__).parent / "zero.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


WHATS = {
    1: ("universal-2", "universal-3"),
    2: ("learns-1", *(f"{what}-{stage}" for stage in (2, 3) for what in ("learns", "stops", "resumes", "offloaded"))),
    3: ("learns-2", "learns-3"),
}


@cache
def start(num_ranks: int, folder: Path) -> dict[str, list[Found]]:
    """Start a process for each rank by torchrun, once for all tests; one rank loads what two have saved."""
    if num_ranks == 1:
        for stage in (2, 3):
            make_universal(stage, folder)
    return all_found_by(num_ranks, SCRIPT, WHATS[num_ranks], folder / str(num_ranks), str(folder / "universal"))


def run(what: str, stage: int, folder: Path, *, num_ranks: int = 2) -> list[Found]:
    """Return what each rank found."""
    return start(num_ranks, folder)[f"{what}-{stage}"]


def make_universal(stage: int, folder: Path) -> None:
    """Convert what two ranks have saved by DeepSpeed's own command."""
    start(2, folder)
    made = folder / "universal" / str(stage)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
            *("--input_folder", str(folder / "2" / f"stops-{stage}" / "4bit" / "t")),
            *("--output_folder", str(made / "t")),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (made / "latest").write_text("t")


def formula(numel: int, state_format: str) -> int:
    """The bytes of a fragment's state: codes, scales and a step counter."""
    blocks, whole, rest = math.ceil(numel / 128), *divmod(numel, 128)
    each = {
        "fp32": 4 * numel,
        "4bit/blocks": 64 * whole + min(rest, 64) + 4 * blocks,
        "8bit/blocks": numel + 2 * math.ceil(numel / 32),
        "fp8/blocks": numel + 5 * blocks,
    }
    return 4 + 2 * each[state_format]


@pytest.mark.parametrize(
    ("stage", "num_ranks"),
    [(1, 2), (2, 2), (3, 2), *(pytest.param(stage, 3, marks=pytest.mark.slow) for stage in (2, 3))],
)
def test_states_take_the_bytes_of_the_formula_and_models_learn_as_with_fp32_ones(
    stage: int, num_ranks: int, folder: Path
) -> None:
    ranks = run("learns", stage, folder, num_ranks=num_ranks)
    for found in ranks:
        kinds = {"DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer"}
        assert {each["kinds"] for each in found} == kinds
        plain = sum(found[0]["losses"][-5:]) / 5
        assert plain < 0.6 * found[0]["losses"][0]
        for each in found[1:]:
            assert each["counted"] == each["said"] == sum(formula(*fragment) for fragment in each["fragments"])
            assert sum(numel for numel, _ in each["fragments"]) == each["elements"]
            limit = {"fp32": 1e-3, "4bit": 0.05, "8bit": 0.02, "fp8": 0.02}[each["format"]]
            assert abs(sum(each["losses"][-5:]) / 5 - plain) < limit
    fp32, four = (sum(found[at]["counted"] for found in ranks) for at in (1, 2))
    assert four < 0.2 * fp32


NAMES = {"fp32": "fp32", "book": "4bit/blocks", "softsign": "8bit/blocks"}


@pytest.mark.parametrize("stage", [2, 3])
def test_fragments_are_cut_where_parameters_begin_and_have_their_formats(stage: int, folder: Path) -> None:
    first, second = (found[2] for found in run("learns", stage, folder))
    whole = [[math.prod(shape), NAMES[coding]] for _, shape, coding in first["whole"]]
    if stage == 3:  # half of each parameter
        halves = [[math.ceil(numel / 2), name] for numel, name in whole]
        assert first["fragments"] == second["fragments"] == halves
        return
    matrices = [each for each in whole if each[1] != "fp32"]
    for group in (matrices, whole[len(matrices) :]):  # a run of parameters for each rank, one of them cut in two
        found = [
            [[numel, name] for numel, name in each["fragments"] if (name == "fp32") == (group[0][1] == "fp32")]
            for each in (first, second)
        ]
        one, two = found
        padding = sum(numel for numel, _ in one + two) - sum(numel for numel, _ in group)
        assert 0 <= padding < 4  # partitions are multiples of two elements
        assert not padding or two.pop() == [padding, "fp32"]
        if one[-1] == group[len(one) - 1]:
            assert one + two == group
        else:
            assert one[:-1] == group[: len(one) - 1] and two[1:] == group[len(one) :]
            assert one[-1][0] + two[0][0] == group[len(one) - 1][0] and one[-1][1] == two[0][1]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_is_resumed_equals_one_that_never_stopped(stage: int, folder: Path) -> None:
    stopped = run("stops", stage, folder)
    resumed = run("resumes", stage, folder)
    for before, after in zip(stopped, resumed, strict=True):
        for one, other in zip(before, after, strict=True):
            assert other["equal"] and other["losses"] == one["losses"][4:]
            assert "torch.uint8" in other["dtypes"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_of_two_ranks_is_loaded_by_one(stage: int, folder: Path) -> None:
    ((found,),) = run("universal", stage, folder, num_ranks=1)
    assert found["steps"] == [8.0]
    assert "torch.uint8" in found["dtypes"]
    assert max(found["losses"]) < 4.0  # it goes on where the two had come to, from 5.75 at the begin


@pytest.mark.parametrize("stage", [2, 3])
def test_states_that_deepspeed_offloads_are_stepped_on_the_host_by_packlights_own_optimiser(
    stage: int, folder: Path
) -> None:
    for (found,) in run("offloaded", stage, folder):
        assert found["class"] == "AdamW" and "torch.uint8" in found["dtypes"]
        differences = [abs(one - other) for one, other in zip(found["losses"], found["wanted"], strict=True)]
        assert found["losses"][-1] < 0.7 * found["losses"][0] and max(differences) < 0.02
