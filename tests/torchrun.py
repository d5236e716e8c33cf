"""Starts a script with a process for each rank, and reads what each of them wrote."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

Found = list[dict[str, Any]]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def torchrun(num_ranks: int, script: Path, *args: str, cwd: Path | None = None) -> str:
    """Run a script by torchrun; it has to succeed. Return what it printed."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port", str(free_port())]
    return python(*command, str(script), *args, cwd=cwd, timeout_seconds=600)


def python(*arguments: str, cwd: Path | None, timeout_seconds: float) -> str:
    """Run Python; it has to succeed. Return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_seconds,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def found_by(num_ranks: int, script: Path, what: str, folder: Path, *args: str) -> list[Found]:
    """Let a script do something and write FOLDER/RANK.json; return what each rank found."""
    folder.mkdir()
    torchrun(num_ranks, script, what, str(folder), *args)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def all_found_by(
    num_ranks: int, script: Path, whats: Collection[str], folder: Path, *args: str
) -> dict[str, list[Found]]:
    """Let one start of a script do several things and write FOLDER/WHAT/RANK.json; return what each rank found.

    To start a process takes ten times as long as most of what one does here.
    """
    folder.mkdir()
    for what in whats:
        (folder / what).mkdir()
    torchrun(num_ranks, script, ",".join(whats), str(folder), *args)
    return {
        what: [json.loads((folder / what / f"{rank}.json").read_text()) for rank in range(num_ranks)] for what in whats
    }
