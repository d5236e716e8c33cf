"""Makes the tables of benchmarks/README.md from the committed records, and the sentences that quote them elsewhere.

    python -m benchmarks.proof                prints every table
    python -m benchmarks.proof --check        compares; exit status 1 where something is missing, other, or unknown
    python -m benchmarks.proof --write        puts tables and sentences between their markers

A table stands on the page between `<!-- proof: NAME -->` and `<!-- /proof -->`; what stands around it is written by
hand, and quotes figures of the tables of its section only. Each table is a function of a record in `proof_fit.py`,
`proof_states.py` or `proof_steps.py`. A sentence with figures of tables stands in README.md or docs/ between
`<!-- quote: NAME -->` and `<!-- /quote -->`, and is a function of those tables in `proof_quotes.py`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import proof_fit, proof_states, proof_steps
from benchmarks.proof_form import CPU_AVX2, CPU_AVX512, FOLDER, RESULTS, Proof
from benchmarks.proof_quotes import ROOT, quotes

PAGE = FOLDER / "README.md"
PAGES = [PAGE, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- (proof|quote): ([\w-]+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)
PROOFS: tuple[Callable[[], Proof], ...] = (
    proof_fit.fit,
    proof_fit.fit_peaks,
    proof_fit.fit_slowdowns,
    proof_fit.by_hand,
    *(partial(make, proof_fit.FIT_XEON) for make in (proof_fit.fit, proof_fit.fit_slowdowns, proof_fit.by_hand)),
    proof_fit.scripts,
    proof_fit.surprises,
    proof_fit.host_budgets,
    proof_fit.fit_gpu,
    proof_fit.fit_gpu_bytes,
    proof_fit.meta_plan,
    proof_states.cpu_steps,
    proof_states.cpu_goals,
    proof_states.cpu_small,
    proof_states.cpu_sizes,
    proof_states.gpu_steps,
    proof_states.gpu_small,
    proof_states.gpu_sizes,
    proof_states.quality_train,
    proof_states.quality_update,
    proof_steps.hooks,
    proof_steps.disk,
    proof_steps.codecs,
    proof_steps.leaks,
    proof_steps.gpu,
    proof_steps.pipeline_run,
    proof_steps.pipeline_trend,
    proof_steps.ranks,
)
"""In the order of the page."""
NOT_SHOWN = {f"{folder}/fit.html": "the drawing of fit.json, for a browser" for folder in (CPU_AVX2, CPU_AVX512)}
"""Files below `results` that no table is made from, with the reason."""


def tables() -> dict[str, Proof]:
    """Return every table by its name."""
    return {proof.name: proof for proof in (make() for make in PROOFS)}


def made_for(page: Path) -> dict[str, str]:
    """Return what the records give for a page: its tables, or the sentences that quote them, by name."""
    return {name: f"\n{proof.markdown()}\n\n" for name, proof in tables().items()} if page == PAGE else quotes(page)


def blocks(page: str) -> dict[str, str]:
    """Return what stands between the markers of a page, by name."""
    found = [(name, text) for _, name, text in BLOCK.findall(page)]
    if len(dict(found)) != len(found):
        raise ValueError(f"a name stands twice on the page: {[name for name, _ in found]}")
    return dict(found)


def complaints(page: str, made: Mapping[str, str]) -> list[str]:
    """Say what on a page differs from what the records give."""
    found = blocks(page)
    wrong = [f"{name}: no record gives this" for name in found if name not in made]
    wrong += [f"{name}: not on the page" for name in made if name not in found]
    for name, text in found.items():
        if name in made and text != made[name]:
            wrong.append(f"{name}: differs from its record; run python -m benchmarks.proof --write")
    return wrong


def written(page: str, made: Mapping[str, str]) -> str:
    """Return a page with every table and sentence as its record gives it."""

    def block(found: re.Match[str]) -> str:
        return f"<!-- {found[1]}: {found[2]} -->\n{made.get(found[2], found[3])}<!-- /{found[1]} -->"

    return BLOCK.sub(block, page)


def unused(proofs: Mapping[str, Proof]) -> list[str]:
    """Return files below `results` that no table is made from and nobody has named as not shown."""
    used = {proof.record for proof in proofs.values()} | set(NOT_SHOWN)
    paths = (path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in used)


def main() -> None:
    """Print, compare or write the tables, and what quotes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare the pages with the records")
    what.add_argument("--write", action="store_true", help="put tables and sentences on the pages")
    options = parser.parse_args()
    if not (options.write or options.check):
        print("\n\n".join(proof.markdown() for proof in tables().values()))
        return
    wrong = [f"results/{path}: no table is made from it" for path in unused(tables())]
    for page in PAGES:
        text, made = page.read_text(encoding="utf-8"), made_for(page)
        if options.write:
            text = written(text, made)
            page.write_text(text, encoding="utf-8")
        wrong += [f"{page.relative_to(ROOT)}: {each}" for each in complaints(text, made)]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
