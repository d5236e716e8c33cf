"""The sentences of README.md and docs/ that quote the proof page, each made from the cells of the tables it names.

A figure that stands in some table may be that of another claim. So a sentence with figures is a function of its tables
here, and stands on its page between `<!-- quote: NAME -->` and `<!-- /quote -->`; `proof.py` writes and compares it as
it does the tables. Words are changed here, figures by new records.
"""

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import proof_fit, proof_states, proof_steps
from benchmarks.proof_form import FOLDER, percent, read

ROOT = FOLDER.parent
WIDTH = 120
CODECS = ("fp8", "int8", "int4")
FORMATS = ("4bit", "8bit", "fp8")


def readme() -> str:
    """What plans promise, in short."""
    plans, by_hand, meta = proof_fit.fit(), proof_fit.by_hand(), proof_fit.meta_plan()
    second, second_by_hand = proof_fit.fit(proof_fit.FIT_XEON), proof_fit.by_hand(proof_fit.FIT_XEON)
    peak, slowdown = "peak, predicted and measured", "slowdown, predicted and measured"
    gpu, more = proof_fit.fit_gpu(), proof_fit.fit_gpu_bytes()
    resident = meta.column("resident GiB")
    lowest = min(map(_number, [*gpu.column("error"), *more.column("plans' lowest error")]))
    return _items(
        f"{plans.cell('peaks within the budget', 'count')} of {plans.cell('plans', 'count')} plans for twelve model "
        "families at 80, 60, 40 and 25 % of their peak (or the least that fits) fit on two CPU cores; the predicted "
        f"peak is within {plans.cell(peak, 'within')} of the measured one in {plans.cell(peak, 'count')}, and "
        f"{plans.cell(peak, 'most off')} off at most. The slowdown is within {plans.cell(slowdown, 'within')} in "
        f"{plans.cell(slowdown, 'count')}, and {plans.cell(slowdown, 'most off')} off at most.",
        "At the peak of each of four ways by hand (recompute every layer, every second one, all but products; offload "
        f"everything) {by_hand.cell('all', 'not slower')} plans were no slower, and the slowest "
        f"took {by_hand.cell('all', 'most')} times as long.",
        f"On a second machine {second.cell('peaks within the budget', 'count')} of {second.cell('plans', 'count')} "
        f"plans fit, the slowdown is within {second.cell(slowdown, 'within')} in {second.cell(slowdown, 'count')}, and "
        f"{second_by_hand.cell('all', 'not slower')} plans were no slower than by hand; slowdowns are worst predicted "
        "where much moves to a disk.",
        f"On an H100 exact plans fit, and their predicted peaks were at most {percent(-lowest / 100)} below the "
        f"allocator's; slowdowns of short steps are predicted too low: {_range(gpu.column('measured'))} were measured "
        f"where {_range(gpu.column('slowdown predicted'))} were predicted.",
        "Llamas of 7, 13 and 70 billion parameters are planned for without their memory and without a GPU in "
        f"{_range(meta.column('seconds to plan'))} s, with at most {max(resident, key=_number)} GiB.",
    )


def activations() -> str:
    """What techniques cost that keep what is saved for backward."""
    hooks, codecs, gpu = proof_steps.hooks(), proof_steps.codecs(), proof_steps.gpu()
    peak, time, off = (
        [codecs.cell(name, column) for name in CODECS]
        for column in ("live peak over plain", "time over plain", "gradients off")
    )
    wide, own = "packlight.offload, wide window", "packlight.offload"
    hidden = {name: gpu.cell(f"packlight.{name}", "over plain") for name in ("compress int8", "recompute")}
    return _filled(
        "Measured on two cores with AVX2 (`benchmarks/README.md`, Activations): `packlight.recompute` takes "
        f"{hooks.cell('packlight.recompute', 'over the first of its part')} times as long as torch's checkpoint on the "
        f"same blocks; fp8 holds a step at {peak[0]} of its live peak for {time[0]} times its time, with gradients "
        f"{off[0]} off; int8 at {peak[1]}, {time[1]} times and {off[1]}; int4 at {peak[2]}, {time[2]} times and "
        f"{off[2]}. On an H100, over the plain step: where the link can hide the copies (k = {gpu.row(wide)[1]}) "
        f"offload takes {gpu.cell(wide, 'over plain')} with a window of two of the largest tensors and "
        f"{gpu.cell(own, 'over plain')} with the default one, which is smaller, int8 {hidden['compress int8']}, "
        f"recomputation {hidden['recompute']}; where it cannot (k = {gpu.row(own)[5]}) offload takes "
        f"{gpu.cell(own, 'over plain', nth=1)}."
    )


def states() -> str:
    """What low-bit states save, cost and change."""
    cpu, gpu, quality = proof_states.cpu_steps(), proof_states.gpu_steps(), proof_states.quality_train()
    size = {name: cpu.cell(f"packlight {name}", "state bytes, fp32") for name in ("fp32", *FORMATS)}
    fp32, bf16 = (
        [cpu.cell(f"packlight {name}", f"{dtype}: over fused") for name in FORMATS] for dtype in ("fp32", "bf16")
    )
    on_gpu = [gpu.cell(f"packlight {name}", "over fused") for name in FORMATS]
    loss = {name: quality.cell(name, "bytes, 300 steps").split(" (")[0] for name in ("fp32", *FORMATS, "seeds of fp32")}
    return _items(
        f"**What it saves**: of {size['fp32']} bytes a parameter of a large matrix, all but {size['8bit']} (`8bit`), "
        f"{size['fp8']} (`fp8`) or {size['4bit']} (`4bit`).",
        f"**What it costs**: on two cores with AVX2 a step of `4bit` takes {fp32[0]} times as long as torch's fused "
        f"AdamW in fp32 and {bf16[0]} in bf16, `8bit` {fp32[1]} and {bf16[1]}, `fp8` {fp32[2]} and {bf16[2]}; on an "
        f"H100 in bf16 {on_gpu[0]}, {on_gpu[1]} and {on_gpu[2]}. The update is rounded: held-out losses of a "
        f"byte-level GPT after 300 steps, means of three seeds, are {loss['fp32']} (fp32), {loss['8bit']} (`8bit`), "
        f"{loss['fp8']} (`fp8`), {loss['4bit']} (`4bit`), where seeds of fp32 are {loss['seeds of fp32']} "
        "(`benchmarks/README.md`, States and Quality).",
    )


def states_on_a_gpu() -> str:
    """What binds a step on a GPU."""
    gpu = proof_states.gpu_steps()
    whole, blocks = (gpu.cell(f"packlight {name}", "over fused") for name in ("4bit", "4bit blocks"))
    return _filled(
        f"A step of `4bit` took {whole} times as long there as torch's fused AdamW in bf16, {blocks} in blocks alone "
        "(`benchmarks/README.md`, States): it is bound by arithmetic, not yet by memory."
    )


def pipelines() -> str:
    """What pipelines hold and take."""
    made = proof_steps.pipeline_run()
    names = [row[0] for row in made.rows if not row[0].startswith("torch")]
    still = [made.cell(name, "over torch's", nth=1) for name in names if "+" not in name]
    half = [made.cell(name, "over torch's", nth=1) for name in names if name.endswith("1/2")]
    own, least, moved = (made.cell(name, "over torch's") for name in ("1F1B-I", "GIS-H", "GIS-H + 1/2"))
    return _items(
        "**What it saves**: on 2 ranks with 2 chunks, beside torch's interleaved 1F1B, of its bytes beyond parameters "
        f"and gradients: {own} (the same schedule) to {least} (GIS-H) with nothing moved, {moved} (GIS-H) with half of "
        "each rank's chunks on a disk.",
        f"**What it costs**: {_range(still)} times torch's time with nothing moved, {_range(half)} with half moved "
        "there, where copies take processor time from compute (`benchmarks/README.md`, Pipelines).",
    )


def ranks() -> str:
    """What a rank holds of a large decoder."""
    made, size = proof_steps.ranks(), read(proof_steps.RANKS)["parameters"] / 1e9
    _, second, third = (row for row in made.rows if row[0] == "64")
    at = made.header.index
    ours, low, estimated = at("packlight"), at("packlight, 4bit"), at("DeepSpeed's estimator")
    return _filled(
        f"Of a decoder of {size:.2f} billion parameters in bf16 a rank of 64 holds {second[ours]} GB in stage 2 and "
        f"{third[ours]} in stage 3, with 4-bit states {second[low]} and {third[low]}; DeepSpeed's estimator says "
        f"{second[estimated]} and {third[estimated]} with fp32 ones. `benchmarks/README.md` (Ranks) has the table, "
        "also for 4 and 16 ranks, beside the paper's formula, and says where they differ and why."
    )


QUOTES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"figures": readme},
    ROOT / "docs" / "activations.md": {"activations": activations},
    ROOT / "docs" / "optimizer-states.md": {"states": states, "states-gpu": states_on_a_gpu},
    ROOT / "docs" / "pipelines.md": {"pipelines": pipelines},
    ROOT / "docs" / "ranks.md": {"ranks": ranks},
}
"""By page, what stands between its markers."""


def quotes(page: Path) -> dict[str, str]:
    """Return what a page quotes, by name; nothing of a page that has no quotes."""
    return {name: f"\n{make()}\n\n" for name, make in QUOTES.get(page, {}).items()}


def _number(figure: str) -> float:
    return float(figure.removesuffix(" %").replace(",", ""))


def _range(figures: Iterable[str]) -> str:
    ordered = sorted(figures, key=_number)
    return f"{ordered[0]} to {ordered[-1]}"


def _filled(text: str, *, first: str = "", others: str = "") -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _items(*texts: str) -> str:
    return "\n".join(_filled(text, first="- ", others="  ") for text in texts)
