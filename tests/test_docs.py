"""README and the pages of docs/ name what there is: imports, attributes, commands, options, files."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import packlight
from packlight.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])
OWN = {"run", "plan"}  # what follows a script on the line is the script's


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each line that starts packlight."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "packlight" in words[:8]:
                yield words[words.index("packlight") + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_a_page_parses_and_what_it_takes_of_packlight_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packlight"):
                module = importlib.import_module(node.module or "")
                for each in node.names:
                    if not hasattr(module, each.name):
                        importlib.import_module(f"{node.module}.{each.name}")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "packlight":
                assert hasattr(packlight, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_a_page_exist_with_their_options(page: Path) -> None:
    for name, *words in lines(page):
        command = main.commands[name]
        known = {option for param in command.params for option in param.opts}
        for word in words:
            if word.endswith(".py") and name in OWN:
                break
            assert not word.startswith("-") or word in known, f"packlight {name} {word}"
        assert isinstance(command, click.Command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_links_to_or_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in linked if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:tests|benchmarks|docs|src)/[\w/.-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
