"""Checkpoints of DeepSpeed's ZeRO as each rank wrote its part: DeepSpeed's own converter makes a universal one of them.

How partitions are padded and cut is DeepSpeed's business and changes with it, so `ds_to_universal` is run as it is, in
a process of its own. It takes the memory that it takes, and unpickles the files as DeepSpeed does: give it your own
checkpoints only.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from packlight.checkpoints import torchfile
from packlight.checkpoints.refusal import CheckpointError
from packlight.checkpoints.universal import LATEST, TAG

OPTIMIZER_FILES = "*zero_pp_rank_*_optim_states.pt"
MODULE = "deepspeed.checkpoint.ds_to_universal"


def tag_folder(path: Path) -> Path | None:
    """Return the folder with the ranks' files, None where there are none: it may be named in a file `latest`."""
    latest = path / "latest"
    named = path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path
    return next((each for each in (path, named) if any(each.glob(OPTIMIZER_FILES))), None)


def to_universal(path: Path, folder: Path) -> None:
    """Write a universal checkpoint into a new folder.

    Raises:
        CheckpointError: DeepSpeed is not installed, a rank's file is missing or damaged, or the converter failed.
    """
    source = tag_folder(path)
    assert source is not None
    _check_files(source)
    if importlib.util.find_spec("deepspeed") is None:
        raise CheckpointError(f"{path} needs DeepSpeed's own converter: pip install 'packlight[deepspeed]'")
    command = [sys.executable, "-m", MODULE, "--inject_missing_state", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(source), "--output_folder", str(folder / TAG)]
    folder.mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise CheckpointError(f"{path}: {MODULE} failed: {''.join(last) or done.returncode}")
    (folder / LATEST).write_text(TAG, encoding="utf-8")


def _environment() -> dict[str, str]:
    return {"DS_ACCELERATOR": "cpu", **os.environ}


def _check_files(source: Path) -> None:
    """Raise where a rank's file is not there, or damaged."""
    files = sorted(source.glob(OPTIMIZER_FILES))
    ranks = [int(re.findall(r"zero_pp_rank_(\d+)_", each.name)[0]) for each in files]
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise CheckpointError(f"{source}: optimiser files of ranks {missing} are missing. Copy the files of all ranks.")
    for each in (*files, *sorted(source.glob("*_model_states.pt"))):
        if not torchfile.is_torch_file(each):
            raise CheckpointError(f"{each} is not a file of torch.save, or is cut off. Take another copy.")
        torchfile.check_sums(each, str(each))
