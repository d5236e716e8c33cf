"""Makes the tables of benchmarks/README.md from the committed records, and says where the page differs from them.

    python -m benchmarks.proof                prints every table
    python -m benchmarks.proof --check        compares; exit status 1 where a table is missing, other, or unknown
    python -m benchmarks.proof --write        puts the tables between their markers

A table stands on the page between `<!-- proof: NAME -->` and `<!-- /proof -->`; what stands around it is written by
hand, and quotes figures of tables only. Each table is a function of a record in `proof_fit.py`, `proof_states.py` or
`proof_steps.py`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping

from benchmarks import proof_fit, proof_states, proof_steps
from benchmarks.proof_form import FOLDER, RESULTS, Proof

PAGE = FOLDER / "README.md"
BLOCK = re.compile(r"<!-- proof: ([\w-]+) -->\n(.*?)<!-- /proof -->", re.DOTALL)
PROOFS: tuple[Callable[[], Proof], ...] = (
    proof_fit.fit,
    proof_fit.fit_peaks,
    proof_fit.fit_slowdowns,
    proof_fit.by_hand,
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
NOT_SHOWN = {
    "cpu-2-cores-amd-epyc-avx2/fit.html": "the drawing of fit.json, for a browser",
}
"""Files below `results` that no table is made from, with the reason."""


def tables() -> dict[str, Proof]:
    """Return every table by its name."""
    return {proof.name: proof for proof in (make() for make in PROOFS)}


def blocks(page: str) -> dict[str, str]:
    """Return what stands between the markers of a page, by name."""
    found = BLOCK.findall(page)
    if len(dict(found)) != len(found):
        raise ValueError(f"a table stands twice on the page: {[name for name, _ in found]}")
    return dict(found)


def complaints(page: str, proofs: Mapping[str, Proof]) -> list[str]:
    """Say what on a page differs from the records."""
    found = blocks(page)
    made = [f"{name}: no record gives this table" for name in found if name not in proofs]
    made += [f"{name}: not on the page" for name in proofs if name not in found]
    for name, text in found.items():
        if name in proofs and text != _block(proofs[name]):
            made.append(f"{name}: differs from {proofs[name].record}; run python -m benchmarks.proof --write")
    return made


def written(page: str, proofs: Mapping[str, Proof]) -> str:
    """Return a page with every table as its record gives it."""

    def block(found: re.Match[str]) -> str:
        text = _block(proofs[found[1]]) if found[1] in proofs else found[2]
        return f"<!-- proof: {found[1]} -->\n{text}<!-- /proof -->"

    return BLOCK.sub(block, page)


def unused(proofs: Mapping[str, Proof]) -> list[str]:
    """Return files below `results` that no table is made from and nobody has named as not shown."""
    used = {proof.record for proof in proofs.values()} | set(NOT_SHOWN)
    paths = (path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in used)


def _block(proof: Proof) -> str:
    return f"\n{proof.markdown()}\n\n"


def main() -> None:
    """Print, compare or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare the page with the records")
    what.add_argument("--write", action="store_true", help="put the tables on the page")
    options = parser.parse_args()
    proofs, page = tables(), PAGE.read_text(encoding="utf-8")
    if options.write:
        page = written(page, proofs)
        PAGE.write_text(page, encoding="utf-8")
    if options.write or options.check:
        wrong = complaints(page, proofs) + [f"results/{path}: no table is made from it" for path in unused(proofs)]
        sys.exit("\n".join(wrong) or 0)
    print("\n\n".join(proof.markdown() for proof in proofs.values()))


if __name__ == "__main__":
    main()
