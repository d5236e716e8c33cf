"""What the tests of several frameworks share: their scripts, and a look at what a plugin may leave behind."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from tests.torchrun import python

SCRIPTS = Path(__file__).parents[1] / "scripts" / "frameworks"


def called_methods() -> tuple[Any, ...]:
    """Return torch's functions that a session replaces."""
    return nn.Module.__call__, Optimizer.__init__, Optimizer.zero_grad, nn.Module.zero_grad, torch.autograd.backward


def run_script(script: Path, *arguments: str, before: Sequence[str] = ()) -> list[float]:
    """Run a script, which has to succeed, after words of a launcher; return the losses that it printed."""
    printed = python(*before, str(script), *arguments, cwd=script.parent, timeout_seconds=400)
    # ranks write into each other's lines
    losses = [float(loss) for loss in re.findall(r"\bloss ([\d.]+(?:e-\d+)?)", printed)]
    assert losses
    return losses
