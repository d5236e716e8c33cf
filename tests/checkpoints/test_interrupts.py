"""A conversion that is told to stop in the middle leaves no half of a result, and nothing beside it."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
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


class Interrupt:
    """Raises KeyboardInterrupt before one of the instructions that convert, lend a folder and put a result there."""

    def __init__(self, number: int) -> None:
        """Raise it before the instruction with a number, of all that are executed."""
        lending: CodeType = output.beside.__wrapped__.__code__  # type: ignore[attr-defined]
        self.left, self.lending, self.num_calls = number, lending, 0
        self.watched = {conversion.convert.__code__, output.put.__code__, lending}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> "Interrupt | None":
        """Be told of an event, as `sys.settrace` tells of it."""
        if frame.f_code not in self.watched:
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            self.num_calls += frame.f_code is self.lending  # the second call is the removal, and may be cut short
        elif event == "opcode" and not (frame.f_code is self.lending and self.num_calls > 1):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt(f"in {frame.f_code.co_name}, line {frame.f_lineno}")
        return self


def test_an_interrupt_before_any_instruction_leaves_what_was_there_or_the_whole_result(tmp_path: Path) -> None:
    source, place, tensors = tmp_path / "states.pt", tmp_path / "place", "__0_0.distcp"
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.SGD([("weight", parameter)], momentum=0.9)
    for name in ("old", "new"):
        parameter.grad = torch.randn(3, 5)
        optimizer.step()
        torch.save({"model": {"weight": parameter.detach()}, "optimizer": optimizer.state_dict()}, source)
        conversion.convert(source, "dcp", tmp_path / name)
    old, new = ((tmp_path / name / tensors).read_bytes() for name in ("old", "new"))
    assert old != new
    found = []
    for number in range(1, 10_000):
        shutil.copytree(tmp_path / "old", place / "out")
        sys.settrace(Interrupt(number))
        try:
            conversion.convert(source, "dcp", place / "out", overwrite=True)
            break
        except KeyboardInterrupt as interrupt:
            sys.settrace(None)
            assert [path.name for path in place.iterdir()] == ["out"], interrupt
            assert sorted(path.name for path in (place / "out").iterdir()) == [".metadata", tensors], interrupt
            found.append((place / "out" / tensors).read_bytes())
        finally:
            sys.settrace(None)
        shutil.rmtree(place)
    num_old = found.count(old)
    assert found == [old] * num_old + [new] * (len(found) - num_old) and 0 < num_old < len(found)
    assert (place / "out" / tensors).read_bytes() == new
