"""What cannot be read or represented is refused in one line, with exit status 2, and leaves nothing behind."""

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import packlight
from packlight.checkpoints import convert, dcpfolder
from packlight.checkpoints.scratch import Scratch
from packlight.cli import main
from tests.checkpoints.ranks import decoder, train


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    model = decoder()
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "torch": torch.optim.AdamW,
        "4bit": packlight.AdamW,
        "amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
        "sgd": lambda params: torch.optim.SGD(params, momentum=0.9),
        "rmsprop": torch.optim.RMSprop,
    }
    for name, make in makers.items():
        optimizer = make(list(model.named_parameters()))
        train(model, optimizer, range(1))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / name)
    convert(folder / "torch", "dcp", folder / "dcp")
    convert(folder / "torch", "deepspeed-universal", folder / "universal")
    return folder


@pytest.fixture
def place(originals: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with links to files of the originals, in which nothing else may be left."""
    before = set(tmp_path.iterdir())
    yield tmp_path
    left = {path for path in tmp_path.iterdir() if path.name.startswith(".")} - before
    assert not left, "nothing half made is left"


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def refused(result: Result) -> str:
    """The one line that says why; there is no traceback and no usage."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("packlight: ") and result.stdout == ""
    return line


def changed(source: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, out)
    return out


def state(checkpoint: dict[str, Any]) -> Any:
    return checkpoint["optimizer"]["state"][0]


def fill(key: str, value: float) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: state(checkpoint)[key].view(-1)[:1].fill_(value)


def group_of(checkpoint: dict[str, Any]) -> Any:
    return checkpoint["optimizer"]["param_groups"][0]


DAMAGED: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any], str]] = {
    "NaN in a moment": (
        "torch",
        "4bit",
        fill("exp_avg", float("nan")),
        "parameter wte.weight: its state came with exp_avg",
    ),
    "infinite moment": (
        "torch",
        "torch",
        fill("exp_avg_sq", float("inf")),
        "wte.weight: its state came with exp_avg_sq",
    ),
    "negative moment": ("torch", "dcp", fill("exp_avg_sq", -1.0), "no number below zero was wanted"),
    "NaN in a scale": ("4bit", "4bit", fill("exp_avg_scale", float("nan")), "exp_avg_scale"),
    "no step": ("torch", "8bit", lambda each: state(each).pop("step"), "a step count was wanted"),
    "no moment": ("torch", "8bit", lambda each: state(each).pop("exp_avg_sq"), "a state with ['exp_avg', 'step'] came"),
    "no codes": ("4bit", "torch", lambda each: state(each).pop("exp_avg_codes"), "few or no codes"),
    "short codes": (
        "4bit",
        "torch",
        lambda each: state(each).update(exp_avg_codes=state(each)["exp_avg_codes"][1:]),
        "wte.weight has too many, too few or no codes",
    ),
    "other shape": (
        "torch",
        "torch",
        lambda each: state(each).update(exp_avg=torch.ones(3, 3)),
        "wte.weight has moments of shape (3, 3) in the optimiser",
    ),
    "unknown format": ("4bit", "torch", lambda each: group_of(each).update(state_formats=["2bit"] * 17), "'2bit'"),
    "no model, codes": ("4bit", "torch", lambda each: each.pop("model"), "--model FILE"),
    "no names": (
        "torch",
        "dcp",
        lambda each: (each.pop("model"), group_of(each).pop("param_names")),
        "parameter 0 has no name, and dcp has parameters by name",
    ),
    "no weights": ("torch", "deepspeed-universal", lambda each: each.pop("model"), "Give the model's state dict"),
    "a stranger's state": (
        "torch",
        "torch",
        lambda each: each["optimizer"]["state"].update({99: {}}),
        "no param group has",
    ),
    "several optimisers": (
        "torch",
        "torch",
        lambda each: each.update(two=each["optimizer"]),
        "2 optimisers, at optimizer",
    ),
    "no optimiser": ("torch", "torch", lambda each: each.pop("optimizer"), "has no optimiser"),
    "other steps": (
        "torch",
        "deepspeed-universal",
        lambda each: state(each).update(step=torch.tensor(9.0)),
        "from 1 to 9 steps",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_unfit_file_is_refused(case: str, originals: Path, place: Path) -> None:
    source, target, change, said = DAMAGED[case]
    changed(originals / source, place / "in.pt", change)
    line = refused(command(place / "in.pt", "--to", target, place / "out"))
    assert said in line, line
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("amsgrad", "4bit", "amsgrad"),
        ("rmsprop", "torch", "param group 0: a param group with"),
        ("sgd", "deepspeed-universal", "Use --to torch or --to dcp"),
        ("universal", "4bit", "use --to torch, and then --to 4bit on the result"),
        ("nothing", "torch", "is not there"),
        ("", "torch", "is a folder of another kind"),
    ],
)
def test_what_has_no_place_in_the_target_is_refused(
    source: str, target: str, said: str, originals: Path, place: Path
) -> None:
    assert said in refused(command(originals / source, "--to", target, place / "out"))


def test_a_file_that_is_cut_off_or_has_a_flipped_bit_is_refused(originals: Path, place: Path) -> None:
    whole = (originals / "torch").read_bytes()
    (place / "in.pt").write_bytes(whole[:-2000])
    assert "cut off" in refused(command(place / "in.pt", "--to", "4bit", place / "out"))
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    (place / "in.pt").write_bytes(flipped)
    torch.load(place / "in.pt", weights_only=True)  # torch takes it
    assert "is damaged: Bad CRC-32" in refused(command(place / "in.pt", "--to", "4bit", place / "out"))
    (place / "in.pt").write_bytes(b"no checkpoint")
    assert "a file of another kind" in refused(command(place / "in.pt", "--to", "4bit", place / "out"))


def test_objects_that_are_no_plain_data_are_not_unpickled(originals: Path, place: Path) -> None:
    changed(originals / "torch", place / "in.pt", lambda each: each.update(model=nn.Linear(2, 2)))
    assert "unpickling may run any code" in refused(command(place / "in.pt", "--to", "4bit", place / "out"))


@pytest.mark.parametrize("damage", ["missing", "cut off", "flipped", "metadata"])
def test_a_dcp_folder_that_lacks_bytes_or_has_others_is_refused(damage: str, originals: Path, place: Path) -> None:
    folder = place / "dcp"
    folder.mkdir()
    for each in (originals / "dcp").iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(content[:-5000])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-100])
    said = {"missing": "is missing", "cut off": "is cut off", "flipped": "is damaged", "metadata": ".metadata"}[damage]
    assert said in refused(command(folder, "--to", "4bit", place / "out"))


@pytest.mark.parametrize("name", ["exp_avg.pt", "step.pt", "fp32.pt"])
def test_a_universal_folder_without_a_file_is_refused(name: str, originals: Path, place: Path) -> None:
    shutil.copytree(originals / "universal", place / "universal")
    file = place / "universal" / "universal" / "zero" / "head.weight" / name
    file.write_bytes(file.read_bytes()[:-50])
    assert "is cut off" in refused(command(place / "universal", "--to", "torch", place / "out"))
    file.unlink()
    if name != "step.pt":  # as in stage 3: one for all
        assert "is missing" in refused(command(place / "universal", "--to", "torch", place / "out"))


def test_what_is_there_stays_until_the_result_is_complete(originals: Path, place: Path) -> None:
    out = place / "out"
    out.write_text("before")
    assert "--overwrite" in refused(command(originals / "torch", "--to", "4bit", out))
    changed(originals / "torch", place / "bad.pt", fill("exp_avg", float("nan")))
    refused(command(place / "bad.pt", "--to", "4bit", out, "--overwrite"))
    assert out.read_text() == "before"
    assert command(originals / "torch", "--to", "4bit", out, "--overwrite").exit_code == 0
    first = out.read_bytes()
    assert command(originals / "torch", "--to", "dcp", place / "dcp").exit_code == 0
    assert command(originals / "4bit", "--to", "dcp", place / "dcp", "--overwrite").exit_code == 0
    read = dcpfolder.read(place / "dcp", Scratch(place))
    assert "exp_avg_codes" in read["optimizer"]["state"]["head.weight"]
    (place / "other").mkdir()
    (place / "other" / "thesis.txt").write_text("mine")
    assert "is not replaced" in refused(command(originals / "torch", "--to", "dcp", place / "other", "--overwrite"))
    assert (place / "other" / "thesis.txt").read_text() == "mine" and out.read_bytes() == first


def test_a_place_in_or_around_the_checkpoint_is_refused(originals: Path, place: Path) -> None:
    for out in (originals / "dcp", originals / "dcp" / "inside", originals):
        assert "beside it was wanted" in refused(command(originals / "dcp", "--to", "torch", out, "--overwrite"))
    assert "make it first" in refused(command(originals / "dcp", "--to", "torch", place / "no" / "out"))


@pytest.mark.parametrize("target", ["4bit", "dcp", "deepspeed-universal"])
def test_a_conversion_that_is_interrupted_leaves_nothing(target: str, originals: Path, place: Path) -> None:
    def tell(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(originals / "torch", target, place / "out", tell=tell)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("target", ["torch", "dcp", "deepspeed-universal"])
def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(target: str, originals: Path, place: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        result = command(originals / "torch", "--to", target, place / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1 and "File too large" in result.stderr, result
    assert list(place.iterdir()) == []


def test_a_success_says_what_was_done_in_one_line(originals: Path, place: Path) -> None:
    done = command(originals / "torch", "--to", "4bit", place / "out")
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout == f"{place / 'out'}: 73 tensors of 17 parameters' states, 1.54 MiB -> 298.07 KiB\n"
