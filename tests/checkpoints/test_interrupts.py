"""A conversion that is told to stop in the middle leaves no half of a result, and nothing beside it."""

import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from packlight.checkpoints import conversion, output
from tests.torchrun import ENVIRONMENT

NUM_TENSORS, SHAPE = 120, (128, 1024)  # so many that a signal comes in the middle


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_conversion_that_is_stopped_leaves_everything_as_it_was(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    source, out = tmp_path / "states.pt", tmp_path / "small.pt"
    moment = torch.ones(SHAPE)
    torch.save(
        {
            "state": {at: {"momentum_buffer": moment + at} for at in range(NUM_TENSORS)},
            "param_groups": torch.optim.SGD(
                [(f"layer{at}", torch.nn.Parameter(torch.empty(0))) for at in range(NUM_TENSORS)], momentum=0.9
            ).state_dict()["param_groups"],
        },
        source,
    )
    torch.save({f"layer{at}": torch.zeros(1).expand(SHAPE) for at in range(NUM_TENSORS)}, tmp_path / "model.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    command = ["convert", str(source), "--to", "8bit", "--model", str(tmp_path / "model.pt"), str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "packlight", *command], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not any(each.name.endswith(".partial") for each in tmp_path.iterdir()):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


class Interrupts:
    """Raises KeyboardInterrupt before some of the instructions that convert, lend a folder and put a result there.

    Args:
        numbers: each says before which instruction one comes, counted from the one before.
    """

    def __init__(self, *numbers: int) -> None:
        self.left, self.num_calls, self.came = list(numbers), 0, False
        self.lending: CodeType = output.beside.__wrapped__.__code__  # type: ignore[attr-defined]
        self.watched = {conversion.convert.__code__, output.put.__code__, self.lending}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> "Interrupts | None":
        """Be told of an event, as `sys.settrace` tells of it."""
        if frame.f_code not in self.watched:
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            self.num_calls += frame.f_code is self.lending  # of two, the second is the removal
        elif event == "opcode" and self.left and (frame.f_code is not self.lending or self.num_calls == 1 or self.came):
            self.left[0] -= 1
            if not self.left[0]:
                del self.left[0]
                self.came = True
                raise KeyboardInterrupt(f"in {frame.f_code.co_name}, line {frame.f_lineno}")
        return self


TENSORS = "__0_0.distcp"
"""The file of a folder of torch.distributed.checkpoint that a process writes its tensors to."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint, an "old" folder made from one before, and the "new" one that it is to be."""
    folder = tmp_path_factory.mktemp("made")
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.SGD([("weight", parameter)], momentum=0.9)
    for name in ("old", "new"):
        parameter.grad = torch.randn(3, 5)
        optimizer.step()
        state = {"model": {"weight": parameter.detach()}, "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "states.pt")
        conversion.convert(folder / "states.pt", "dcp", folder / name)
    assert (folder / "old" / TENSORS).read_bytes() != (folder / "new" / TENSORS).read_bytes()
    return folder


def interrupted(made: Path, place: Path, *numbers: int) -> KeyboardInterrupt | None:
    """Convert over a copy of the old folder; return the last interrupt, None where none came through."""
    shutil.copytree(made / "old", place / "out")
    before = sys.gettrace()
    sys.settrace(Interrupts(*numbers))
    try:
        conversion.convert(made / "states.pt", "dcp", place / "out", overwrite=True)
    except KeyboardInterrupt as interrupt:
        return interrupt.with_traceback(None)
    finally:
        sys.settrace(before)
    return None


def test_an_interrupt_before_any_instruction_leaves_what_was_there_or_the_whole_result(
    made: Path, tmp_path: Path
) -> None:
    old, new = ((made / name / TENSORS).read_bytes() for name in ("old", "new"))
    found = []
    for number in range(1, 10_000):
        place = tmp_path / str(number)
        interrupt = interrupted(made, place, number)
        assert [path.name for path in place.iterdir()] == ["out"], interrupt
        assert sorted(path.name for path in (place / "out").iterdir()) == [".metadata", TENSORS], interrupt
        found.append((place / "out" / TENSORS).read_bytes())
        if interrupt is None:
            break
    num_old = found.count(old)
    assert found == [old] * num_old + [new] * (len(found) - num_old) and 0 < num_old < len(found) - 1


def test_a_second_interrupt_while_the_first_is_handled_leaves_the_old_or_the_new_checkpoint_somewhere(
    made: Path, tmp_path: Path, seed: int
) -> None:
    whole = {(made / name / TENSORS).read_bytes() for name in ("old", "new")}
    random, num_put = Random(seed), 0
    for number in range(1, 10_000):
        place = tmp_path / str(number)
        interrupt = interrupted(made, place, number, random.randint(1, 20))
        if interrupt is None:
            break
        assert {path.read_bytes() for path in place.rglob(TENSORS)} & whole, interrupt
        num_put += "in put" in f"{interrupt} {interrupt.__context__}"
    assert num_put > 10


def test_a_removal_that_is_interrupted_is_finished(tmp_path: Path) -> None:
    left = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename == shutil.__file__ and event == "line":
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return trace

    for number in range(1, 1_000):
        left, before = number, sys.gettrace()
        with suppress(KeyboardInterrupt, OSError):  # rmtree closes what an interrupt let it close already
            try:
                with output.beside(tmp_path / "out") as folder:
                    (folder / "made").mkdir(parents=True)
                    (folder / "made" / TENSORS).write_bytes(b"tensors")
                    sys.settrace(trace)
            finally:
                sys.settrace(before)
        assert list(tmp_path.iterdir()) == []
        if left > 0:
            break
    assert number > 20
