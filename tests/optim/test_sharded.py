"""Sharded states on real processes over gloo: the bits of a plain run, bytes, checkpoints for any number of ranks."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch

import packlight
from packlight.numerics.noise import key_at, seed_at, seed_of, words
from packlight.optim.state import from_portable
from tests.torchrun import Found, all_found_by

SCRIPT = Path(__file__).parent / "sharded.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


WHATS = {
    1: (("load",),),
    2: (("bits", "nbytes", "save", "load", "portable", "refusals", "placed", "learns"),),
    3: (("load",), ("bits", "nbytes", "learns")),
}
"""What processes do that are started together, by their number."""


@cache
def start(whats: tuple[str, ...], num_ranks: int, folder: Path) -> dict[str, list[Found]]:
    """Start a process for each rank by torchrun, once for all tests; two ranks save what any number loads."""
    saving = WHATS[2][0]
    if num_ranks != 2:
        start(saving, 2, folder)
    return all_found_by(
        num_ranks, SCRIPT, whats, folder / f"{num_ranks}-{whats[0]}", str(folder / f"2-{saving[0]}" / "save")
    )


def run(what: str, num_ranks: int, folder: Path) -> list[Found]:
    """Return what each rank found."""
    return start(next(whats for whats in WHATS[num_ranks] if what in whats), num_ranks, folder)[what]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parameters_and_states_have_the_bits_of_a_run_without_shards(num_ranks: int, folder: Path) -> None:
    for found in run("bits", num_ranks, folder):
        assert len(found) == 19
        assert [each["name"] for each in found if not each["params"] or not each["states"] or each["nan"]] == []


def formula(shape: list[int], num_rows: int, state_format: str) -> int:
    """The bytes of a piece's state, from the formats alone: rows are padded to blocks of 128."""
    width = math.prod(shape[1:])
    blocks = -(-width // 128)
    if state_format == "fp32" or math.prod(shape) <= 4096 or len(shape) == 1:
        return 4 + 8 * num_rows * width
    if state_format == "8bit":  # a byte a code, a bf16 scale for 32
        return 4 + 2 * num_rows * blocks * (128 + 4 * 2)
    if state_format == "fp8":  # a byte a code, an fp32 scale and a byte for 128
        return 4 + 2 * num_rows * blocks * (128 + 4 + 1)
    columns = 128 * blocks
    maxima = 2 * 4 * (num_rows + columns) if (shape[0] + width) * 64 <= shape[0] * width else 0
    return 4 + 2 * num_rows * blocks * (64 + 4) + maxima


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_rank_has_the_bytes_of_the_formula(num_ranks: int, folder: Path) -> None:
    for found in run("nbytes", num_ranks, folder):
        for each in found:
            assert each["before"] == each["after"] == each["counted"] == sum(size for *_, size in each["each"])
            assert "torch.uint8" in each["dtypes"] or each["format"] == "fp32"
            for shape, local, state_format, size in each["each"]:
                assert size == formula(shape, local[0], state_format), (shape, local, state_format)
            if each["format"] == "4bit":
                assert each["counted"] < 0.26 * each["fp32"]


def test_checkpoints_of_two_ranks_are_loaded_by_one_two_and_three_bit_for_bit(folder: Path) -> None:
    saved = run("save", 2, folder)
    assert [each["name"] for each in saved[0]] == ["whole-4bit", "whole-8bit", "odd-4bit", "odd-8bit"]
    for num_ranks in (1, 2, 3):
        for found in run("load", num_ranks, folder):
            for each in found:
                assert each["steps_before"] == [0.0], "making states to load into is no step"
                assert each["loaded"] and each["ended"]
                assert each["plain"] is each["name"].startswith("whole")


def test_states_go_to_torchs_own_optimiser_and_back(folder: Path) -> None:
    for found in run("portable", 2, folder):
        for each in found:
            assert each["steps"] == [2.0] and each["are_dtensors"]
            # a code of a root is off by half a level of 16 at most, its square by (1 + 1 / 16)^2 - 1 of the largest
            assert each["error"] < (1 + 1 / 16) ** 2 - 1


def test_what_cannot_be_sharded_is_refused_before_anything_has_changed(folder: Path) -> None:
    for published, plain, host in run("refusals", 2, folder):
        assert "its scales are of whole tensors; '4bit', '8bit', 'fp8' or 'fp32' was wanted" in published["paper4bit"]
        assert plain["plain"].startswith(
            "ValueError: exp_avg_codes came as a Tensor for a parameter that is a DTensor on"
        )
        assert plain["states"] == 0
        assert "shard it with CPUOffloadPolicy" in host["host"]


def test_parameters_that_are_replicated_or_cut_along_a_later_axis_have_compact_states_where_rows_are_left(
    folder: Path,
) -> None:
    for replicated, second, last in run("placed", 2, folder):
        assert replicated["equal"] and "exp_avg_sq_rows" in replicated["keys"]
        assert "exp_avg_sq_codes" in second["keys"] and "exp_avg_sq_rows" not in second["keys"]
        assert second["bytes"] == 4 + 2 * 64 * 4 * (128 + 8)
        assert last["keys"] == ["exp_avg", "exp_avg_sq", "step"]
        assert second["error"] < 4e-2 and last["error"] < 4e-2  # at most a learning rate a step


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_language_model_learns_with_sharded_states_as_with_fp32_ones(num_ranks: int, folder: Path) -> None:
    for found in run("learns", num_ranks, folder):
        ends = {each["name"]: sum(each["losses"][-10:]) / 10 for each in found}
        begins = {each["name"]: each["losses"][0] for each in found}
        assert len(set(begins.values())) == 1 and ends["torch"] < 0.7 * begins["torch"]
        assert abs(ends["fp32"] - ends["torch"]) < 1e-3
        assert abs(ends["4bit"] - ends["torch"]) < 0.03 and abs(ends["8bit"] - ends["torch"]) < 0.01


@pytest.mark.usefixtures("seed")
def test_a_piece_of_a_parameter_gets_the_random_words_that_it_has_in_the_whole() -> None:
    device = torch.device("cpu")
    for origin in (0, 128, 12800, 2**32 - 256, 2**33 + 640):
        seed, step = seed_of(7, 3), 11
        for start, stop in ((0, 300), (128, 1000)):
            wanted = words(key_at(seed, step), origin + start, origin + stop, device=device)
            found = words(key_at(seed_at(seed, origin), step), start, stop, device=device)
            if (origin + stop) >> 32 == (origin >> 32):
                assert torch.equal(found, wanted)


@pytest.mark.usefixtures("seed")
def test_moments_that_were_too_narrow_to_be_cut_in_blocks_are_loaded_by_a_run_without_shards() -> None:
    param = torch.nn.Parameter(torch.randn(700, 16))
    optimizer, moments = packlight.AdamW([("weight", param)]), torch.rand(2, 700, 16)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": torch.tensor(3.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}}
    with pytest.warns(UserWarning, match="too short for blocks of 128"):
        optimizer.load_state_dict(saved)
    wanted = from_portable(saved["state"][0], state_format="4bit")
    assert optimizer.state[param].keys() == wanted.keys()
    assert all(torch.equal(optimizer.state[param][key], value) for key, value in wanted.items())
