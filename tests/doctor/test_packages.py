"""Packages are imported in processes of their own, and versions are those of pyproject.toml."""

import re
import time
import tomllib
from pathlib import Path

import pytest

from packlight.doctor.packages import OPTIONAL, TORCH, Package, findings_of, import_each, installed, release

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def requirements() -> dict[str, str]:
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = (re.match(r"([a-z]+)>=([\d.]+)", each) for requirement in lists for each in requirement)
    return {match.group(1): match.group(2) for match in found if match}


def test_the_oldest_versions_are_those_of_the_project() -> None:
    wanted = requirements()
    assert {each.name: each.least for each in (TORCH, *OPTIONAL)} == {
        each.name: wanted[each.name] for each in (TORCH, *OPTIONAL)
    }


def test_each_extra_installs_its_package() -> None:
    extras = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["optional-dependencies"]
    for each in OPTIONAL:
        assert not each.extra or any(line.startswith(each.name) for line in extras[each.extra])


def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    (found,) = import_each(["sleeper"], timeout_seconds=1.0)
    assert "had not ended after 1 s" in found.failure
    assert time.monotonic() - start < 60


def test_an_import_that_ends_its_process_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quitter.py").write_text("import os\nos._exit(0)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (found,) = import_each(["quitter"])
    assert found.is_there and "ended the process with status 0" in found.failure


def test_a_package_that_is_not_there_is_missing_with_the_way_to_get_it() -> None:
    package = Package("no_such_package", "1", "pages are not drawn", extra="report")
    for found in (*findings_of([package]), *installed([package])):
        assert found.status == "missing" and found.found == "not installed"
        assert "pip install 'packlight[report]'" in found.cost


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("2.14.0.dev20261101", (2, 14, 0)), ("unknown", ())]
)
def test_versions_are_compared_by_their_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
