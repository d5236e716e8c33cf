"""Tables of what plans promise: that they fit, that peak and slowdown are as predicted, that nothing by hand is faster.

Each function makes one table from its record. Errors are predicted over measured, less one, so that what is below zero
was predicted too low. Slowdowns are step times over that of plain training in the same run.
"""

import statistics
from collections.abc import Sequence

from benchmarks.proof_form import (
    CPU,
    CPU_AVX2,
    CPU_AVX512,
    GPU,
    Proof,
    Row,
    all_of,
    change,
    documented_command,
    gib,
    goal,
    machine,
    mib,
    percent,
    points,
    ratio,
    read,
    recorded_command,
    row_of,
    yes,
)

FIT, FIT_XEON, SCRIPTS = f"{CPU_AVX2}/fit.json", f"{CPU_AVX512}/fit.json", f"{CPU}/scripts.json"
NAMED = {FIT: "", FIT_XEON: "-xeon"}
"""What the names of tables end in that are made from a record of `fit.py`."""
SURPRISES, META = f"{CPU_AVX2}/surprises.json", f"{CPU_AVX2}/meta_plan.json"
FIT_GPU, FIT_GPU_BYTES = f"{GPU}/fit_gpu.json", f"{GPU}/fit_gpu_bytes.json"
SHARES = ("80 %", "60 %", "40 %", "25 %")
WAYS = {
    "every-layer": "recompute every layer",
    "every-second": "recompute every second layer",
    "products": "recompute all but products",
    "offload": "offload everything",
}
"""What the record calls a way, and what it is."""


def _planned(record: str) -> list[Row]:
    return [row for row in read(record)["rows"] if row["way"] in SHARES]


def _fit(
    name: str,
    record: str,
    claim: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    goals: Sequence[str],
) -> Proof:
    made_on = machine(*(row["environment"] for row in read(record)["rows"] if "environment" in row))
    return Proof(name + NAMED[record], claim, record, recorded_command(record), made_on, header, rows, goals)


def _families(record: str) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in read(record)["rows"]))


def fit(record: str = FIT) -> Proof:
    """How the plans of twelve families came out, in sum."""
    plans = _planned(record)
    errors = [abs(row["peak_error"]) for row in plans]
    slowdown_errors = [abs(row["slowdown"] - row["predicted_slowdown"]) for row in plans]
    num_near = sum(error <= 0.01 for error in errors)
    num_close = sum(error <= 0.10 for error in slowdown_errors)
    rows = [
        ["plans", str(len(plans)), "", "", ""],
        ["budgets that were the least that fits", str(sum(row["least"] for row in plans)), "", "", ""],
        ["peaks within the budget", str(sum(row["fits"] for row in plans)), "", "", ""],
        [
            "peak, predicted and measured",
            str(num_near),
            "1 %",
            percent(statistics.median(errors)),
            percent(max(errors)),
        ],
        ["slowdown, predicted and measured", str(num_close), "10 points", *_off(slowdown_errors)],
    ]
    goals = [
        all_of("every peak within its budget", sum(row["fits"] for row in plans), len(plans)),
        all_of("every predicted slowdown within 10 points of the measured one", num_close, len(plans)),
    ]
    claim = (
        "Plans for twelve model families at 80, 60, 40 and 25 % of their peak fit, and take the peak that they predict."
    )
    return _fit("fit", record, claim, ["", "count", "within", "median off", "most off"], rows, goals)


def _off(errors: Sequence[float]) -> list[str]:
    return [points(statistics.median(errors)), points(max(errors))]


def fit_peaks(record: str = FIT) -> Proof:
    """The peaks of each family."""
    rows = [
        [family, mib(row_of(read(record)["rows"], family=family, way="plain")["peak_bytes"])]
        + [_peaks(row_of(_planned(record), family=family, way=share)) for share in SHARES]
        for family in _families(record)
    ]
    claim = "Peaks by family, in MiB: budget / predicted / measured; * where the share did not fit, and the least does."
    return _fit("fit-peaks", record, claim, ["family", "plain", *SHARES], rows, ())


def _peaks(row: Row) -> str:
    least = "*" if row["least"] else ""
    sizes = [f"{row[key] / 2**20:.1f}" for key in ("budget_bytes", "predicted_peak_bytes", "peak_bytes")]
    return f"{sizes[0]}{least} / {sizes[1]} / {sizes[2]}"


def fit_slowdowns(record: str = FIT) -> Proof:
    """The slowdowns of each family."""
    rows = [
        [family, *(_slowdowns(row_of(_planned(record), family=family, way=share)) for share in SHARES)]
        for family in _families(record)
    ]
    claim = "Slowdowns by family: predicted / measured."
    return _fit("fit-slowdowns", record, claim, ["family", *SHARES], rows, ())


def _slowdowns(row: Row) -> str:
    return f"{row['predicted_slowdown']:.2f} / {row['slowdown']:.2f}"


def by_hand(record: str = FIT) -> Proof:
    """Ways by hand, each beside a plan at its peak."""
    rows, everything = [], []
    for way, told in WAYS.items():
        hand = [row for row in read(record)["rows"] if row["way"] == way]
        plans = [row_of(read(record)["rows"], family=row["family"], way=f"at {way}") for row in hand]
        over = [plan["slowdown"] / row["slowdown"] for plan, row in zip(plans, hand, strict=True)]
        everything += over
        medians = [statistics.median(row["slowdown"] for row in each) for each in (hand, plans)]
        rows.append([told, *map(ratio, medians), *_spread(over)])
    rows.append(["all", "", "", *_spread(everything)])
    goals = [all_of("no plan slower than the way by hand whose peak it has", _num_kept(everything), len(everything))]
    goals.append(f"the slowest plan beside its way: {change(max(everything) - 1)}")
    header = ["by hand", "slowdown, median", "of plans at its peaks", "plan over way, median", "least", "most"]
    told = f"{_num_kept(everything)} of {len(everything)}"
    claim = f"At the peak that a way by hand reaches, a plan is no slower in {told} cases."
    return _fit("by-hand", record, claim, [*header, "not slower"], rows, goals)


def _spread(over: Sequence[float]) -> list[str]:
    num_kept = f"{_num_kept(over)} of {len(over)}"
    return [ratio(statistics.median(over)), ratio(min(over)), f"{max(over):.3f}", num_kept]


def _num_kept(over: Sequence[float]) -> int:
    return sum(value <= 1 for value in over)


def scripts() -> Proof:
    """Unmodified scripts."""
    record: list[Row] = read(SCRIPTS)
    rows = [
        [row["script"], f"{row['share']} %", yes(row["exact"])]
        + [mib(row[key]) for key in ("plain_peak_bytes", "budget_bytes", "predicted_bytes", "measured_bytes")]
        + [change(row["error"]), yes(row["same_output"]), change(row["held_out_change"])]
        for row in record
    ]
    exact = [row for row in record if row["exact"]]
    slowdowns = [row["measured_slowdown"] for row in record]
    predicted = [row["predicted_slowdown"] for row in record]
    goals = [
        all_of("every peak within its budget", sum(row["fits"] for row in record), len(record)),
        all_of("the same output under `--exact`", sum(row["same_output"] for row in exact), len(exact)),
        f"not shown: slowdowns; {ratio(min(predicted))} to {ratio(max(predicted))} were predicted, "
        f"{ratio(min(slowdowns))} to {ratio(max(slowdowns))} measured, which no plan explains",
    ]
    header = [
        "script",
        "share",
        "exact",
        "plain MiB",
        "budget",
        "predicted",
        "measured",
        "error",
        "same output",
        "held-out loss",
    ]
    made_on = machine(*(row["environment"] for row in record))
    claim = "Unmodified scripts fit their budgets, at the peaks that were predicted."
    command = documented_command("scripts.py", SCRIPTS)
    return Proof("scripts", claim, SCRIPTS, command, made_on, header, rows, goals)


def surprises() -> Proof:
    """What goes otherwise than planned."""
    runs: list[Row] = read(SURPRISES)["runs"]
    rows = [
        [row["surprise"]]
        + [mib(row[key]) for key in ("budget_bytes", "predicted_peak_bytes", "peak_bytes")]
        + [yes(row["same_losses"])]
        + [f"{row[key]:.2f}" for key in ("plain_seconds", "predicted_seconds", "step_seconds")]
        for row in runs
    ]
    goals = [
        all_of("every peak within its budget", sum(row["fits"] for row in runs), len(runs)),
        all_of("losses bit for bit those of plain training", sum(row["same_losses"] for row in runs), len(runs)),
    ]
    header = [
        "surprise",
        "budget MiB",
        "predicted",
        "measured",
        "same losses",
        "plain s a step",
        "predicted s",
        "measured s",
    ]
    made_on = machine(*(row["environment"] for row in runs))
    claim = "What goes otherwise than planned stays within the budget, bit for bit."
    return Proof("surprises", claim, SURPRISES, recorded_command(SURPRISES), made_on, header, rows, goals)


def host_budgets() -> Proof:
    """Plans with less and less host memory."""
    rows = [
        [
            row["host_budget"],
            *(gib(row[key]) for key in ("host_peak_bytes", "device_peak_bytes")),
            f"{row['slowdown']:.3f}",
        ]
        + [str(row["choices"].get(choice, 0)) for choice in ("keep", "recompute", "compress", "offload")]
        for row in read(SURPRISES)["host_budgets"]
    ]
    header = [
        "host budget",
        "on the host GiB",
        "device peak GiB",
        "slowdown",
        "keep",
        "recompute",
        "compress",
        "offload",
    ]
    made_on = machine(*(row["environment"] for row in read(SURPRISES)["runs"]))
    claim = "Exact plans for a GPU that is not here use what host memory they may, and recompute more where it is less."
    return Proof("host-budgets", claim, SURPRISES, recorded_command(SURPRISES), made_on, header, rows)


def meta_plan() -> Proof:
    """Plans without the memory and the GPU."""
    record: list[Row] = read(META)
    rows = [
        [row["shape"], f"{row['num_tokens']:,}", row["hardware"], row["host_budget"] or "-"]
        + [gib(each) for each in (row["estimate"]["plain_peak_bytes"], row["budget_bytes"])]
        + [gib(row["estimate"]["device_peak_bytes"]), gib(row["smallest_budget_bytes"])]
        + [f"{row['seconds']:.0f}", gib(row["resident_peak_bytes"])]
        for row in record
    ]
    resident_bytes = max(row["resident_peak_bytes"] for row in record)
    goals = [
        goal("seconds to plan", max(row["seconds"] for row in record), 60, show=lambda each: f"{each:.0f}"),
        goal("resident peak, GiB", resident_bytes, 4 * 2**30, show=gib),
    ]
    header = [
        "model",
        "tokens",
        "hardware",
        "host",
        "plain GiB",
        "budget",
        "predicted",
        "least budget",
        "seconds to plan",
    ]
    made_on = machine(*(row["environment"] for row in record))
    claim = "Llamas of 7, 13 and 70 billion parameters are planned for without their memory and without the GPU."
    command = documented_command("meta_plan.py", META)
    return Proof("meta-plan", claim, META, command, made_on, [*header, "resident GiB"], rows, goals)


def _plans(record: str) -> list[Row]:
    return [row for row in read(record)["rows"] if "share" in row]


def _worst(row: Row) -> float:
    """Return the error of a predicted peak against the step of the run that is farthest from it."""
    return max((float(row["predicted_peak_bytes"] / peak - 1) for peak in row["peak_bytes_by_step"]), key=abs)


def _gpu(name: str, claim: str, record: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Proof:
    plans = _plans(record)
    goals = [all_of("every step within the budget", sum(all(row["fits"]) for row in plans), len(plans))]
    return Proof(
        name, claim, record, recorded_command(record), machine(read(record)["environment"]), header, rows, goals
    )


def fit_gpu() -> Proof:
    """Peaks and slowdowns on a GPU."""
    rows = [
        [row["family"], f"{row['share']} %", row["host_budget"] or "-", *_gpu_peaks(row)]
        + [ratio(row[key]) for key in ("predicted_slowdown", "slowdown")]
        for row in _plans(FIT_GPU)
    ]
    header = [
        "family",
        "share",
        "host",
        "budget MiB",
        "predicted",
        "allocator's",
        "error",
        "slowdown predicted",
        "measured",
    ]
    claim = "On a GPU exact plans fit, at the allocator's peaks; slowdowns of short steps are predicted too low."
    return _gpu("fit-gpu", claim, FIT_GPU, header, rows)


def _gpu_peaks(row: Row) -> list[str]:
    sizes = (row["budget_bytes"], row["predicted_peak_bytes"], max(row["peak_bytes_by_step"]))
    return [*map(mib, sizes), change(_worst(row))]


def fit_gpu_bytes() -> Proof:
    """Peaks of more families on a GPU, a row for each."""
    rows = []
    for family in dict.fromkeys(row["family"] for row in read(FIT_GPU_BYTES)["rows"]):
        plans = [row for row in _plans(FIT_GPU_BYTES) if row["family"] == family]
        plain = next(row for row in read(FIT_GPU_BYTES)["rows"] if row["family"] == family and "share" not in row)
        errors = [_worst(row) for row in plans]
        counts = (len(plans), sum(all(row["fits"]) for row in plans), sum(row["mended"] for row in plans))
        sizes = [mib(plain["peak_bytes_by_step"][0]), change(_worst(plain)), change(min(errors)), change(max(errors))]
        rows.append([family, *map(str, counts), *sizes])
    header = ["family", "plans", "within", "mended", "plain MiB", "error of plain", "plans' lowest error", "highest"]
    claim = "The peaks of exact plans at 60 and 40 %, with host memory and without, are predicted for six families."
    return _gpu("fit-gpu-bytes", claim, FIT_GPU_BYTES, header, rows)
