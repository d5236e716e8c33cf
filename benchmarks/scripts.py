"""Claim: an unmodified training script fits its budget, and its peak is what was predicted.

Runs each script of tests/scripts as it is (`--measure-only`), then at 75 % of that peak (the GPT also at 50 %), with
and without `--exact`, each run in a process of its own. Prints one table and writes JSON.

    python benchmarks/scripts.py --output benchmarks/results/HARDWARE/scripts.json
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SCRIPTS = Path(__file__).parents[1] / "tests" / "scripts"
CASES: dict[str, list[str]] = {
    "plain_gpt": ["plain_gpt.py"],
    "llama_transformers": ["llama_transformers.py"],
    "bert_accumulate": ["bert_accumulate.py"],
    "digits_convnet": ["digits_convnet.py"],
    "packaged (-m)": ["-m", "packaged.train"],
    "evaluate_and_save": ["evaluate_and_save.py", "--out", "{folder}/checkpoint.pt"],
    "flat_sequential": ["flat_sequential.py"],
}
SHARES = {"plain_gpt": (75, 50)}


def run(options: list[str], script: list[str], folder: str) -> tuple[dict[str, Any], str]:
    """Run a script under packlight; return its record and its output."""
    record = Path(folder) / "run.json"
    target = [part.format(folder=folder) for part in script]
    command = [sys.executable, "-m", "packlight", "run", *options, "--record", str(record), *target]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(record.read_text(encoding="utf-8")), done.stdout


def held_out(output: str) -> float:
    """Read the last held-out loss that a script printed."""
    return float(re.findall(r"held-out loss ([-\d.einf]+)", output)[-1])


def row(
    name: str, share: int, plain: tuple[dict[str, Any], str], planned: tuple[dict[str, Any], str]
) -> dict[str, Any]:
    """Compare a planned run with the plain one."""
    (plain_record, plain_output), (record, output) = plain, planned
    measured, estimate = record["measurement"], record["estimate"]
    peak, predicted = measured["device_peak_bytes"], estimate["device_peak_bytes"]
    return {
        "script": name,
        "share": share,
        "exact": record["plan"]["exact"],
        "plain_peak_bytes": plain_record["measurement"]["device_peak_bytes"],
        "budget_bytes": record["plan"]["budget_bytes"],
        "first_predicted_bytes": record["first_estimate"]["device_peak_bytes"],
        "predicted_bytes": predicted,
        "measured_bytes": peak,
        "error": predicted / peak - 1,
        "fits": peak <= record["plan"]["budget_bytes"],
        "same_output": output == plain_output,
        "held_out_change": held_out(output) / held_out(plain_output) - 1,
        "state_formats": sorted(set(record["plan"]["state_formats"].values())),
        "predicted_slowdown": estimate["slowdown"],
        "measured_slowdown": measured["step_seconds"] / plain_record["measurement"]["step_seconds"],
        "environment": record["environment"],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Lay the rows out for a reader."""
    made = Table(title="unmodified scripts under a budget")
    for title in ("script", "share", "exact", "budget MiB", "predicted", "measured", "error", "fits", "same output"):
        made.add_column(title, justify="left" if title == "script" else "right")
    for each in rows:
        sizes = (f"{each[key] / 2**20:.1f}" for key in ("budget_bytes", "predicted_bytes", "measured_bytes"))
        facts = f"{each['error']:+.2%}", str(each["fits"]), str(each["same_output"])
        made.add_row(each["script"], f"{each['share']} %", str(each["exact"]), *sizes, *facts)
    return made


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    console, rows = Console(), []
    for name, script in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            plain = run(["--measure-only"], script, folder)
            for share in SHARES.get(name, (75,)):
                budget = str(plain[0]["measurement"]["device_peak_bytes"] * share // 100)
                for exact in (["--exact"], []):
                    rows.append(row(name, share, plain, run(["--budget", budget, *exact], script, folder)))
                    console.print(f"{name} {share} %: predicted {rows[-1]['predicted_bytes']}", style="dim")
    console.print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
