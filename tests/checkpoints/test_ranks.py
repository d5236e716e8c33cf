"""Converted checkpoints on several processes: FSDP2 and DeepSpeed load them, and what they have written is read."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from packlight.checkpoints import convert
from tests.checkpoints.ranks import decoder, make, train
from tests.torchrun import Found, found_by

SCRIPT = Path(__file__).parent / "ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@cache
def sources(folder: Path) -> Path:
    """Checkpoints of plain runs in this process, converted; beside each what is to be found after loading it."""
    place = folder / "sources"
    place.mkdir()
    for kind in ("torch", "4bit"):
        model = decoder()
        optimizer = make(kind, model)
        train(model, optimizer, range(2))
        saved: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7}
        torch.save(saved, place / f"{kind}.pt")
        convert(place / f"{kind}.pt", "dcp", place / f"{kind}-dcp")
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        states = dict(zip(names, saved["optimizer"]["state"].values(), strict=True))
        if kind == "torch":
            weights = dict(model.named_parameters())
            moments = {name: {key: state[key] for key in ("exp_avg", "exp_avg_sq")} for name, state in states.items()}
            wanted = {name: {"fp32": weights[name].detach(), **moments[name]} for name in names}
            torch.save(wanted, place / "universal-wanted.pt")
        torch.save(states, place / f"{kind}-wanted.pt")
    convert(place / "torch.pt", "deepspeed-universal", place / "universal")
    convert(place / "torch-dcp", "8bit", place / "8bit-dcp")
    model = decoder()
    direct = make("8bit", model)
    direct.load_state_dict(torch.load(place / "torch.pt", weights_only=True)["optimizer"])
    states = dict(zip(names, direct.state_dict()["state"].values(), strict=True))
    torch.save(states, place / "8bit-wanted.pt")
    return place


@cache
def loads(num_ranks: int, folder: Path) -> list[Found]:
    saves(folder)
    return found_by(num_ranks, SCRIPT, "loads", folder / f"loads-{num_ranks}", str(sources(folder)))


@cache
def saves(folder: Path) -> Path:
    found_by(2, SCRIPT, "saves", folder / "saves", str(folder))
    return folder / "saves"


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fsdp2_loads_a_converted_folder_bit_for_bit_and_trains_on(num_ranks: int, folder: Path) -> None:
    first, *others = loads(num_ranks, folder)
    found = [each for each in first if each["name"].startswith("dcp")]
    assert [each["name"] for each in found] == ["dcp torch", "dcp 4bit", "dcp 8bit"]
    for each in found:
        assert each["wrong"] == [] and each["lr"] == [1e-3] and each["steps"] == [3.0], each
        assert each["name"] == "dcp torch" or "exp_avg_scale from nan to nan" in each["said"], each
    assert all(each["steps"] == [3.0] for other in others for each in other if each["name"].startswith("dcp"))


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deepspeed_loads_a_converted_folder_bit_for_bit_and_trains_on(num_ranks: int, folder: Path) -> None:
    for rank in loads(num_ranks, folder):
        found = [each for each in rank if each["name"].startswith("universal")]
        assert [each["name"] for each in found] == ["universal 2 torch", "universal 2 4bit", "universal 3 torch"]
        for each in found:
            assert each["wrong"] == [] and each["loaded"] and each["steps"] == [2.0], each
            assert each["epoch"] == 7 and each["global_steps"] == 4  # two of them here
            assert max(each["losses"]) < 6
        assert "torch.uint8" in found[1]["dtypes"]
        assert found[0]["decay"] == [0.1, 0.0]


def test_zero_refuses_a_checkpoint_of_another_number_of_ranks_and_keeps_the_states(folder: Path) -> None:
    (found,) = (each for each in loads(1, folder)[0] if each["name"] == "zero of two ranks")
    assert found["said"].startswith("ZeRORuntimeException") and found["same"], found


@pytest.mark.parametrize("kind", ["torch", "4bit"])
def test_what_two_ranks_of_fsdp2_saved_becomes_a_file(kind: str, folder: Path, tmp_path: Path) -> None:
    place = saves(folder)
    convert(place / f"fsdp-{kind}", "torch", tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    model = decoder()
    model.load_state_dict(loaded["model"])
    theirs = make("torch", model)
    theirs.load_state_dict(loaded["optimizer"])
    wanted = torch.load(place / f"fsdp-{kind}.pt", weights_only=True)
    if kind == "4bit":
        ours = make("4bit", decoder())
        state_dict = ours.state_dict()
        numbers = [name for group in ours.param_groups for name in group["param_names"]]
        state_dict["state"] = {number: wanted[name] for number, name in enumerate(numbers)}
        ours.load_state_dict(state_dict)
        portable = ours.state_dict(format="portable")["state"]  # type: ignore[call-arg]
        wanted = {name: portable[number] for number, name in enumerate(numbers)}
    for name, state in wanted.items():
        found = theirs.state[model.get_parameter(name)]
        assert all(torch.equal(found[key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    train(model, theirs, range(2, 3))


@pytest.mark.parametrize("stage", [2, 3])
def test_what_two_ranks_of_zero_saved_becomes_a_file_and_a_universal_folder(
    stage: int, folder: Path, tmp_path: Path
) -> None:
    place = saves(folder)
    convert(place / f"zero{stage}", "deepspeed-universal", tmp_path / "universal")
    convert(tmp_path / "universal", "torch", tmp_path / "out.pt")
    wanted = torch.load(place / f"zero{stage}.pt", weights_only=True)
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    model = decoder()
    model.load_state_dict(loaded["model"])
    theirs = make("torch", model)
    theirs.load_state_dict(loaded["optimizer"])
    for name, state in wanted.items():
        param = model.get_parameter(name)
        assert torch.equal(param.detach(), state["fp32"])
        assert all(torch.equal(theirs.state[param][key], state[key]) for key in ("exp_avg", "exp_avg_sq"))
        assert float(theirs.state[param]["step"]) == 2
    train(model, theirs, range(2, 3))
