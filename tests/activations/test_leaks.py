"""Steps that succeed and steps that fail leave nothing behind, with every choice at once.

The loop is that of benchmarks/activations_leaks.py, which does 2,000 steps of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from benchmarks.activations_leaks import KINDS, NUM_LAYERS, Loop, leaks

# Half a cycle has every kind of step at every layer.
CYCLE_STEPS = 2 * len(KINDS) * NUM_LAYERS


PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.activations_leaks import leaks
print(json.dumps(leaks(Path(sys.argv[1]), num_steps=int(sys.argv[2]), num_rounds=3, codecs=("fp8",))))
"""


def test_engines_leave_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own: every object counts, and a worker's threads make some when they like."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(CYCLE_STEPS)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["changes"] == []
    assert record["num_failed"] == {"forward": 30, "backward": 30, "second run": 12}


def test_what_is_left_behind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    step = Loop._step

    def leaking(loop: Loop, kind: str, layer: nn.Module) -> None:
        left.append(layer.register_forward_hook(lambda *_: None))
        step(loop, kind, layer)

    monkeypatch.setattr(Loop, "_step", leaking)
    changes = leaks(tmp_path, num_steps=CYCLE_STEPS, num_rounds=2, codecs=("mask",))["changes"]
    assert [line.partition(",")[0] for line in changes] == ["objects", "hooks"]
