"""A conversion that is told to stop in the middle leaves no half of a result, and nothing beside it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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
