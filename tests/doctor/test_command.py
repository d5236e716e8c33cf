"""The command as users start it: what works exits with 0, what is broken is told with its error and its cost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from packlight.doctor.findings import Diagnosis, Finding
from packlight.doctor.packages import OPTIONAL

BROKEN = 'raise ImportError("libcudart.so.99: cannot open shared object file")'
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
SOUND = '__version__ = "99.1"\nprint("a package that prints")'
OLD = '__version__ = "0.1"'


def doctor(*options: str, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with packages that stand before the installed ones, which would take many seconds to be imported."""
    environment = {**os.environ, "COLUMNS": "120", **variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "packlight", "doctor", *options]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=240, check=False)


def make_packages(folder: Path, **sources: str) -> None:
    for package in OPTIONAL:
        if package.name == "triton":  # torch imports it
            continue
        (folder / package.name).mkdir()
        (folder / package.name / "__init__.py").write_text(sources.get(package.name, SOUND))


def by_name(data: Any) -> dict[str, Finding]:
    return {each.name: each for each in Diagnosis.from_dict(data).findings}


def test_a_machine_that_works_exits_with_0_and_a_table(tmp_path: Path) -> None:
    make_packages(tmp_path)
    done = doctor(path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("torch", "plan and run", "C++ compiler", "disk tier", "host memory", "pinned memory", "bitsandbytes"):
        assert f"│ {part}" in done.stdout
    assert "packlight can plan and run here" in done.stdout
    assert "Traceback" not in done.stderr
    says = [line.removeprefix("packlight: ") for line in done.stderr.splitlines() if line.startswith("packlight: ")]
    names = ", ".join(package.name for package in OPTIONAL)
    assert says[:2] == [f"importing torch, {names}", "planning and training a small model"]


def test_what_is_broken_is_told_with_its_error_and_a_named_folder_that_is_none_exits_with_1(tmp_path: Path) -> None:
    make_packages(tmp_path, deepspeed=BROKEN, lightning=DIES, plotly=OLD)
    no_folder = tmp_path / "file"
    no_folder.write_text("not a folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = doctor("--json", "--disk", str(no_folder), path=tmp_path, PATH=str(empty), CXX="")
    assert done.returncode == 1, done.stdout + done.stderr
    found = by_name(json.loads(done.stdout))
    assert found["C++ compiler"].status == "missing"
    assert "no C++ compiler" in found["C++ compiler"].found and "many times slower" in found["C++ compiler"].cost
    assert found["plan and run"].status == "limited"  # it plans, and says that the kernels are slow
    assert found["plan and run"].facts["measured_bytes"] <= found["plan and run"].facts["predicted_bytes"]
    assert found["disk tier"].status == "missing" and found["disk tier"].essential
    assert str(no_folder) in found["disk tier"].found
    assert found["deepspeed"].status == "missing" and "libcudart.so.99" in found["deepspeed"].found
    assert found["lightning"].status == "missing" and "signal 11" in found["lightning"].found
    assert found["plotly"].status == "limited" and "older than 6" in found["plotly"].cost
    assert found["accelerate"].status == "works" and found["accelerate"].found == "99.1"


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(BROKEN)
    done = doctor("--quick", "--json", path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = by_name(json.loads(done.stdout))
    assert found["torch"].status == "missing" and "libcudart.so.99" in found["torch"].found
    assert found["torch"].essential
    assert "plan and run" not in found and "host memory" in found
    assert found["plotly"].status == "untried"
