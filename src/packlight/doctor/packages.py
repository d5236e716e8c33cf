"""Which optional packages can be used: each is imported, in a process of its own, at the same time.

importlib.metadata knows which version is installed and not whether it loads: a package built for another torch, or
without a shared library that it wants, is installed all the same, and fails in the middle of a script. So each is
really imported. That may take many seconds, print, start threads or end the process, none of which shall happen here.
Who has no time for it gets what is installed, as untried.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import BinaryIO

from packlight.doctor.findings import Finding

TIMEOUT_SECONDS = 120.0
MARK = "packlight-doctor:"
"""In front of the line that is ours: packages print, too."""
PROGRAM = f"""
import importlib, importlib.util, json, sys
is_there = importlib.util.find_spec(sys.argv[1]) is not None
module = importlib.import_module(sys.argv[1]) if is_there else None
version = str(getattr(module, "__version__", ""))
print("\\n{MARK}" + json.dumps({{"is_there": is_there, "version": version}}), flush=True)
"""


@dataclass(frozen=True)
class Package:
    """A package, and what it is good for.

    Attributes:
        name: as it is imported and installed.
        least: the oldest version that packlight is made for.
        cost: what the user has not without it.
        essential: whether packlight can neither plan nor run without it.
        extra: the extra of packlight that installs it; empty where that is another package's part.
    """

    name: str
    least: str
    cost: str
    essential: bool = False
    extra: str = ""


TORCH = Package("torch", "2.11", "packlight can neither plan nor run", essential=True)
OPTIONAL = (
    Package("triton", "3.6", "optimiser states in few bits are for the CPU alone; a GPU's keep fp32 ones"),
    Package(
        "deepspeed", "0.19", "scripts under DeepSpeed do not start, and ZeRO's plans cannot be run", extra="deepspeed"
    ),
    Package("bitsandbytes", "0.50", "scripts with its optimisers or 4-bit weights do not start", extra="bitsandbytes"),
    Package("transformers", "5.23", "scripts that use it do not start", extra="transformers"),
    Package("accelerate", "1.15", "scripts that use it, or transformers' Trainer, do not start", extra="transformers"),
    Package("lightning", "2.6", "scripts that use it do not start", extra="lightning"),
    Package("plotly", "6", "no page is drawn (--html); tables are printed all the same", extra="report"),
)
"""What packlight and the scripts under it may use besides; versions as in pyproject.toml."""


@dataclass(frozen=True)
class Imported:
    """What came of an import: whether there is such a module, the version that it has, or else why it failed."""

    is_there: bool = True
    version: str = ""
    failure: str = ""


def import_each(
    names: Sequence[str], *, timeout_seconds: float = TIMEOUT_SECONDS, ended: Callable[[str], object] = str
) -> list[Imported]:
    """Import modules, each in a process of its own and all at once.

    Args:
        names: of the modules.
        timeout_seconds: after which an import has failed, and its process is killed.
        ended: called with each name when its import has ended, in another thread.

    Returns:
        What came of each.
    """

    def imported(name: str) -> Imported:
        result = _import(name, timeout_seconds)
        ended(name)
        return result

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return list(pool.map(imported, names))


def _import(name: str, timeout_seconds: float) -> Imported:
    # Files and no pipes: what an import has started may hold a pipe open after the import was killed.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-P", "-c", PROGRAM, name]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return Imported(failure=f"its import had not ended after {timeout_seconds:g} s")
        finally:
            process.kill()
            process.wait()
        return _read(code, *(_lines(file) for file in (output, errors)))


def _lines(file: BinaryIO) -> list[str]:
    file.seek(0)
    return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _read(code: int, output: Sequence[str], errors: Sequence[str]) -> Imported:
    """Tell an import by what its process left."""
    ours = [line for line in output if line.startswith(MARK)]
    if ours:
        return Imported(**json.loads(ours[-1].removeprefix(MARK)))
    if code < 0:
        return Imported(failure=f"its import was ended by signal {-code}")
    return Imported(failure=errors[-1] if errors and code else f"its import ended the process with status {code}")


def findings_of(
    packages: Sequence[Package], *, timeout_seconds: float = TIMEOUT_SECONDS, ended: Callable[[str], object] = str
) -> list[Finding]:
    """Tell which of these packages can be used.

    Args:
        packages: what to look at.
        timeout_seconds: for each import.
        ended: see `import_each`.

    Returns:
        A finding for each.
    """
    results = import_each([each.name for each in packages], timeout_seconds=timeout_seconds, ended=ended)
    return [_finding(each, imported) for each, imported in zip(packages, results, strict=True)]


def installed(packages: Sequence[Package]) -> list[Finding]:
    """Tell which of these packages are installed; none is imported.

    Args:
        packages: what to look at.

    Returns:
        A finding for each: untried, or missing.
    """
    return [_installed(each) for each in packages]


def _installed(package: Package) -> Finding:
    if find_spec(package.name) is None:
        return _finding(package, Imported(is_there=False))
    version = _installed_version(package.name)
    found = f"{version or 'of no version'}, not imported"
    return Finding(package.name, "untried", found, essential=package.essential, facts={"version": version})


def _finding(package: Package, imported: Imported) -> Finding:
    name, cost = package.name, package.cost
    if not imported.is_there:
        how = f"; pip install 'packlight[{package.extra}]'" if package.extra else ""
        return Finding(name, "missing", "not installed", f"{cost}{how}", package.essential)
    version = imported.version or _installed_version(name)
    facts = {"version": version, "importable": not imported.failure}
    if imported.failure:
        found = f"{version or 'of no version'}, cannot be imported: {imported.failure}"
        return Finding(name, "missing", found, cost, package.essential, facts)
    if not version:
        return Finding(name, "limited", "of no version", f"wanted {package.least} or newer", package.essential, facts)
    if release(version) < release(package.least):
        older = f"older than {package.least}, which packlight is tested with; it may fail"
        return Finding(name, "limited", version, older, package.essential, facts)
    return Finding(name, "works", version, essential=package.essential, facts=facts)


def _installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def release(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers, by which versions are compared.

    >>> release("2.13.0+cpu")
    (2, 13, 0)
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
