"""The proof page says what the records say: each table, the figures around them, and what README and docs quote."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.proof import BLOCK, NOT_SHOWN, PAGE, PAGES, blocks, complaints, made_for, tables, unused, written
from benchmarks.proof_form import RESULTS, change, documented_command, goal, machine, ratio, read
from benchmarks.proof_steps import hooks

ROOT = Path(__file__).parents[1]
PROOFS = tables()
TEXT = PAGE.read_text(encoding="utf-8")
MADE = made_for(PAGE)
MOST_ROWS = 16
FIGURE = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w-])")
NO_FIGURES = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|figure \d+|ZeRO-\d|<!--.*?-->")
"""What has digits and is no figure: code, targets of links, numbers of papers, of their figures, and markers."""


def quoted(text: str) -> list[str]:
    return FIGURE.findall(NO_FIGURES.sub(" ", text))


def shown(section: str) -> set[str]:
    """Return every figure that a table of a section has, without its sign."""
    found = re.findall(r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?", "\n".join(blocks(section).values()))
    return {figure.lstrip("+-") for figure in found}


def by_hand(text: str) -> list[str]:
    """Return the figures that no record gives."""
    return quoted(BLOCK.sub(" ", text))


@pytest.mark.parametrize("name", PROOFS)
def test_a_table_on_the_page_is_what_its_record_gives(name: str) -> None:
    assert blocks(TEXT)[name].strip() == PROOFS[name].markdown(), "python -m benchmarks.proof --write"


@pytest.mark.parametrize("name", PROOFS)
def test_a_table_is_short_and_names_command_machine_and_record(name: str) -> None:
    proof = PROOFS[name]
    assert 1 <= len(proof.rows) <= MOST_ROWS
    assert {len(row) for row in proof.rows} == {len(proof.header)}
    assert proof.command.startswith(("python ", "torchrun "))
    assert f"results/{proof.record}" in proof.command
    assert proof.machine


def test_every_record_is_used_or_named_as_not_shown() -> None:
    assert unused(PROOFS) == []
    assert [path for path in NOT_SHOWN if not (RESULTS / path).is_file()] == []


def test_a_record_that_nobody_uses_is_named() -> None:
    left = {name: proof for name, proof in PROOFS.items() if proof.record != "simulated/zero_table.json"}
    assert unused(left) == ["simulated/zero_table.json"]


def test_no_table_is_missing_or_unknown() -> None:
    assert complaints(TEXT, MADE) == []


def test_a_figure_that_was_changed_on_the_page_is_found_and_mended() -> None:
    proof = PROOFS["fit"]
    figure = proof.rows[3][-1]
    wrong = TEXT.replace(f"{figure} |", "0.01 % |", 1)
    assert [each.partition(":")[0] for each in complaints(wrong, MADE)] == ["fit"]
    assert written(wrong, MADE) == TEXT


def test_missing_and_unknown_tables_are_named() -> None:
    renamed = TEXT.replace("<!-- proof: fit -->", "<!-- proof: gone -->")
    assert {each.partition(":")[0] for each in complaints(renamed, MADE)} == {"fit", "gone"}


def test_the_command_checks_the_page() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.proof", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("section", TEXT.split("\n## ")[1:], ids=lambda section: section.partition("\n")[0])
def test_text_around_the_tables_has_only_figures_of_its_section(section: str) -> None:
    assert [figure for figure in by_hand(section) if figure not in shown(section)] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_sentences_that_quote_tables_say_what_these_tables_say(page: Path) -> None:
    assert complaints(page.read_text(encoding="utf-8"), made_for(page)) == [], "python -m benchmarks.proof --write"


def test_a_figure_that_was_changed_in_a_quote_is_found_and_mended() -> None:
    page = PAGES[1]
    text, made = page.read_text(encoding="utf-8"), made_for(page)
    figure = quoted(made["figures"])[-1]
    wrong = text.replace(f" {figure} GiB.", " 0.01 GiB.")
    assert [each.partition(":")[0] for each in complaints(wrong, made)] == ["figures"]
    assert written(wrong, made) == text


def test_readme_s_section_of_figures_has_none_by_hand() -> None:
    (section,) = re.findall(r"^## Figures\n(.*?)^## ", PAGES[1].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(quoted(section)) > 5 and by_hand(section) == []


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.name)
def test_paragraphs_of_docs_that_cite_the_page_have_no_figure_by_hand(page: Path) -> None:
    paragraphs = BLOCK.sub(" ", page.read_text(encoding="utf-8")).split("\n\n")
    assert [figure for each in paragraphs if "benchmarks/README.md" in each for figure in quoted(each)] == []


def test_the_sums_are_those_that_the_benchmark_printed_itself() -> None:
    verdict = read(PROOFS["fit"].record)["verdict"]
    plans, _, within, peaks, slowdowns = PROOFS["fit"].rows
    assert (plans[1], within[1]) == (str(verdict["num_planned"]), str(verdict["num_planned"]))
    assert verdict["num_over_budget"] == 0
    assert peaks[4] == f"{verdict['largest_peak_error']:.2%}".replace("%", " %")
    assert slowdowns[3:] == [
        f"{verdict[f'{which}_slowdown_error_points']:.1f} points" for which in ("median", "largest")
    ]
    every = PROOFS["by-hand"].rows[-1]
    num_kept = len(verdict["over_by_hand"]) - verdict["num_slower_than_by_hand"]
    assert every[3] == ratio(verdict["median_over_by_hand"])
    assert every[-1] == f"{num_kept} of {len(verdict['over_by_hand'])}"


def test_ratios_are_those_that_the_benchmarks_printed_themselves() -> None:
    group = read(PROOFS["states-gpu"].record)["groups"][0]
    assert [row[1] for row in PROOFS["states-gpu"].rows] == [ratio(row["ratio"]) for row in group["rows"]]
    record = read(hooks().record)
    own = [row["ratio"] for part in ("overhead", "recompute") for row in record[part]["rows"]]
    assert [row[2] for row in hooks().rows] == [f"{each:.3f}" for each in own]


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "told"),
    [
        (0.9, 1.0, False, "goal: it at most 1.00: met (0.90)"),
        (1.0, 1.0, False, "goal: it at most 1.00: met (1.00)"),
        (1.25, 1.0, False, "goal: it at most 1.00: missed by 0.25 (1.25)"),
        (0.9, 1.0, True, "goal: it at least 1.00: missed by 0.10 (0.90)"),
        (1.0, 1.0, True, "goal: it at least 1.00: met (1.00)"),
    ],
)
def test_a_goal_is_met_or_says_by_how_much_it_is_missed(value: float, limit: float, at_least: bool, told: str) -> None:
    assert goal("it", value, limit, show=ratio, at_least=at_least) == told


def test_a_change_has_a_sign_but_for_none() -> None:
    assert [change(value) for value in (0.012, -0.004, 1e-9, -1e-9)] == ["+1.20 %", "-0.40 %", "0.00 %", "0.00 %"]


def test_records_of_two_machines_make_no_table_of_one() -> None:
    here = {"hardware": "A", "num_cpus": 2, "num_threads": 2, "torch": "2"}
    assert machine(here, {**here, "platform": "other"}) == "A, 2 CPUs, 2 threads; torch 2"
    with pytest.raises(ValueError, match="a table for each"):
        machine(here, {**here, "hardware": "B"})


def test_a_record_without_a_command_has_one_in_its_benchmark() -> None:
    made = documented_command("scripts.py", "somewhere/scripts.json")
    assert made == "python benchmarks/scripts.py --output benchmarks/results/somewhere/scripts.json"
    with pytest.raises(ValueError, match="0 commands that write other"):
        documented_command("scripts.py", "somewhere/other.json")
