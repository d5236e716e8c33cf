"""The examination: which parts are looked at, in which order, and what is essential.

The optional packages are imported meanwhile, since that takes longest. Nothing of ours that imports torch is imported
before torch itself was seen to load in a process of its own: a torch that cannot be loaded is a finding, too.
"""

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from packlight.doctor import limits, packages
from packlight.doctor.findings import Diagnosis, Finding, guarded, told
from packlight.doctor.packages import OPTIONAL, TIMEOUT_SECONDS, TORCH

ROOT = Path("/")


def examine(
    disk: str | os.PathLike[str] | None = None,
    *,
    quick: bool = False,
    root: Path = ROOT,
    timeout_seconds: float = TIMEOUT_SECONDS,
    tell: Callable[[str], object] = str,
) -> Diagnosis:
    """Try everything that packlight may use on this machine; it takes some seconds, a minute where others compute.

    Args:
        disk: the folder of the disk tier; None for the folder for temporary files. One that is named is essential.
        quick: import no optional package; what is installed is untried then.
        root: the folder in which proc and sys stand.
        timeout_seconds: for the import of each optional package.
        tell: called with what is being done, before each part that takes its time.

    Returns:
        What was found. A part that fails, in whatever way, is a finding and no error.
    """
    awaited = {} if quick else {each.name: None for each in OPTIONAL}  # in this order
    with ThreadPoolExecutor(1) as pool:
        look = partial(packages.findings_of, timeout_seconds=timeout_seconds, ended=awaited.pop)
        tell(f"importing {', '.join([TORCH.name, *awaited])}")
        others = pool.submit(packages.installed if quick else look, OPTIONAL)
        torch = packages.findings_of([TORCH], timeout_seconds=timeout_seconds)[0]
        found = [_python(), torch]
        works = torch.status != "missing"
        found += _trials(None if disk is None else os.fspath(disk), root, tell) if works else []
        found += _limits(root, num_threads=_num_threads() if works else None)
        if waiting := list(awaited):  # at once, since it shrinks meanwhile
            tell(f"waiting for the imports of {', '.join(waiting)}")
        return Diagnosis.of([*found, *others.result()])


def _python() -> Finding:
    return Finding("Python", "works", f"{platform.python_version()} on {platform.platform()}")


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


def _trials(disk: str | None, root: Path, tell: Callable[[str], object]) -> list[Finding]:
    """Return what came of all that needs torch."""
    tell("planning and training a small model")
    try:
        from packlight.doctor import trials
    except Exception as error:  # numpy or scipy may be broken
        return [Finding("plan and run", "missing", told(error), packages.TORCH.cost, essential=True)]
    planned = guarded("plan and run", trials.planning, cost=packages.TORCH.cost, essential=True)
    tell("trying kernels, pinned memory and the disk tier")
    return [
        *planned,
        *guarded("CUDA", lambda: list(trials.gpus(root)), cost=trials.NO_GPU),
        *guarded("C++ compiler", trials.compiler, cost=trials.NO_COMPILER),
        *guarded("pinned memory", trials.pinned_memory, cost="tensors cannot wait in host memory (--host-budget)"),
        *guarded("disk tier", lambda: trials.disk(disk), cost=trials.NO_DISK, essential=disk is not None),
    ]


def _limits(root: Path, *, num_threads: int | None) -> list[Finding]:
    """Return what the operating system allows."""
    unknown = "budgets in percent, and what fits, cannot be known"
    return [
        *guarded("host memory", lambda: limits.memory(root), cost=unknown),
        *guarded("processors", lambda: limits.processors(root, num_threads=num_threads), cost="unknown"),
        *guarded("shared memory", lambda: limits.shared_memory(root / "dev/shm"), cost="unknown"),
    ]
