"""Tables of what a step keeps, and of pipelines and ranks: seconds and bytes beside torch's, the paper's, DeepSpeed's.

Ratios of activations on the CPU are of medians, beside the median of the rounds' ratios; on a GPU the latter alone, for
each contender is timed there in rounds with the plain step.
"""

import statistics
from collections.abc import Iterable

from benchmarks.proof_form import (
    CPU_AVX2,
    GPU,
    SIMULATED,
    Proof,
    Row,
    all_of,
    cell,
    change,
    documented_command,
    goal,
    machine,
    mib,
    percent,
    ratio,
    read,
    recorded_command,
    row_of,
    three,
    yes,
)

CPU_ACTIVATIONS, GPU_ACTIVATIONS = f"{CPU_AVX2}/activations.json", f"{GPU}/activations_gpu.json"
PIPELINE, TREND, RANKS = (
    f"{CPU_AVX2}/pipeline_run.json",
    f"{SIMULATED}/pipeline_trend.json",
    f"{SIMULATED}/zero_table.json",
)
TREND_TOLERANCES = 5, 0.15
"""Points of utilisation, and share of the published bytes at 16,384 tokens and above."""


def _claims(record: Iterable[Row], *, exact: str = "") -> list[str]:
    """Return the goals that a record bears with it; those of bits in words."""
    made = []
    for each in record:
        if "bit-equal" in each["claim"]:
            made.append(all_of(f"{exact}loss and every gradient bit-equal", int(each["value"]), each["limit"]))
        else:
            at_least = each["relation"] == ">="
            made.append(goal(each["claim"], each["value"], each["limit"], show=_short, at_least=at_least))
    return made


def _short(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def hooks() -> Proof:
    """An engine that keeps everything, and recomputation."""
    record = read(CPU_ACTIVATIONS)
    rows = []
    for part in ("overhead", "recompute"):
        first = statistics.median(record[part]["rows"][0]["sample_seconds"])
        for row in record[part]["rows"]:
            seconds = statistics.median(row["sample_seconds"])
            peak = mib(row["peak_bytes"]) if "peak_bytes" in row else "-"
            rows.append(
                [row["contender"], f"{seconds * 1e3:.0f}", f"{seconds / first:.3f}", f"{row['paired_ratio']:.3f}", peak]
            )
    goals = _claims(record["overhead"]["claims"], exact="engine: ") + _claims(
        record["recompute"]["claims"], exact="recompute: "
    )
    header = ["a step of a GPT", "ms", "over the first of its part", "median of rounds", "live peak MiB"]
    claim = "An engine that keeps all costs next to nothing, and `packlight.recompute` what torch's checkpoint costs."
    return _activations("hooks", claim, header, rows, goals)


def _activations(name: str, claim: str, header: list[str], rows: list[list[str]], goals: list[str]) -> Proof:
    made_on = machine(read(CPU_ACTIVATIONS)["environment"])
    command = recorded_command(CPU_ACTIVATIONS)
    return Proof(name, claim, CPU_ACTIVATIONS, command, made_on, header, rows, goals)


def disk() -> Proof:
    """Offloading to a disk."""
    record = read(CPU_ACTIVATIONS)["disk"]
    rows = []
    for row in record["resident"]:
        plain = row_of(record["resident"], malloc=row["malloc"], window_bytes=None)
        window = f"{row['window_bytes'] // 2**20} MiB" if row["window_bytes"] else "keeps all"
        shares = [cell(row.get(key), percent) for key in ("fall_share", "predicted_fall_share")]
        resident = mib(row["resident_peak_bytes"] - row["resident_before_bytes"])
        sizes = [mib(row["bytes_out"]), mib(row["live_peak_bytes"]), resident]
        times = [f"{row['seconds']:.2f}", ratio(row["seconds"] / plain["seconds"])]
        rows.append([f"{row['malloc']}, {window}", *sizes, *shares, *times])
    header = [
        "malloc, window",
        "offloaded MiB",
        "live peak",
        "resident rise",
        "fall over offloaded",
        "predicted",
        "s",
        "over plain",
    ]
    claim = "What is offloaded to a disk leaves the resident peak, where malloc gives memory back."
    return _activations("disk", claim, header, rows, _claims(record["claims"]))


def codecs() -> Proof:
    """What each codec saves, costs and changes."""
    record = read(CPU_ACTIVATIONS)["compress"]
    first = statistics.median(record["rows"][0]["sample_seconds"])
    rows = []
    for row in record["rows"]:
        trained = row_of(record["training"]["summary"], codec=row["contender"])
        seconds = statistics.median(row["sample_seconds"])
        rows.append([
            row["contender"],
            cell(row.get("bytes_per_element"), three),
            ratio(row["peak_bytes"] / record["rows"][0]["peak_bytes"]),
            cell(row.get("predicted_peak_ratio"), ratio),
            three(seconds / first),
            three(row["paired_ratio"]),
            percent(row["gradient_error"]),
            f"{trained['mean']:.4f}",
            change(trained["change"]),
        ])  # fmt: skip
    header = ["codec", "bytes an element", "live peak over plain", "predicted", "time over plain", "median of rounds"]
    header += ["gradients off", "held-out loss", "change"]
    claim = "What each codec saves of a step's live peak, what it costs, and what it changes."
    return _activations("codecs", claim, header, rows, [])


def leaks() -> Proof:
    """Nothing is left behind."""
    record = read(CPU_ACTIVATIONS)["leaks"]
    rows = [
        ["steps", f"{record['num_steps']:,}"],
        ["engines put on and taken off", str(record["num_engines"])],
        *([f"failures in {what}", str(count)] for what, count in record["num_failed"].items()),
        ["counts compared", str(len(record["rows"]))],
        ["counts that changed", str(sum(row["after_warm_up"] != row["at_the_end"] for row in record["rows"]))],
        ["growth of resident memory, bytes", str(record["resident_growth_bytes"])],
    ]
    claim = "Steps with every choice at once, and failures, leave nothing behind."
    return _activations("leaks", claim, ["", "count"], rows, _claims(record["claims"]))


def gpu() -> Proof:
    """Offload, recomputation and codecs on a GPU."""
    record = read(GPU_ACTIVATIONS)["gpu"]
    hidden, bound = record["groups"]
    rows = [
        [row["contender"], *_beside_plain(row), *_beside_plain(row_of(bound["rows"], contender=row["contender"]))]
        for row in hidden["rows"]
    ]
    shapes = [f"width {each['shape']['width']:,}" for each in (hidden, bound)]
    columns = ("ms", "over plain", "predicted")
    header = ["a step", f"{shapes[0]}: k", *columns, f"{shapes[1]}: k", *columns]
    wide = row_of(hidden["rows"], contender="packlight.offload, wide window")
    claims = [each for each in record["claims"] if "bit-equal" not in each["claim"] and "peak" not in each["claim"]]
    absent = "; ".join(f"{name} ({reason})" for name, reason in hidden["absent"].items())
    rates = " and ".join(f"{record['bandwidths'][f'{way}_bytes_per_second'] / 1e9:.1f}" for way in ("out", "in"))
    nearer = goal("the same, the goal beyond that claim", wide["paired_ratio"], 1.03, show=_short)
    goals = [
        *_claims(claims[:1]),
        nearer,
        *_claims(claims[1:]),
        f"absent: {absent}",
        f"the link moved {rates} GB/s out and in",
    ]
    own = row_of(bound["rows"], contender="packlight.offload")
    times = [f"{ratio(row['paired_ratio'])} times" for row in (wide, own)]
    claim = (
        f"On a GPU a step with offload takes {times[0]} a plain one's time with a wide window, where copies can hide "
        f"behind compute, and {times[1]}, as long as the link takes, where they cannot."
    )
    made_on = machine(read(GPU_ACTIVATIONS)["environment"])
    return Proof(
        "activations-gpu", claim, GPU_ACTIVATIONS, recorded_command(GPU_ACTIVATIONS), made_on, header, rows, goals
    )


def _beside_plain(row: Row) -> list[str]:
    k, predicted = cell(row.get("k"), ratio), cell(row.get("predicted_ratio"), three)
    return [k, f"{row['seconds'] * 1e3:.0f}", three(row["paired_ratio"]), predicted]


def pipeline_run() -> Proof:
    """Pipelines beside torch's schedules."""
    record = read(PIPELINE)
    first, *_ = record["rows"]
    seconds = {row["name"]: statistics.median(row["all_seconds"]) for row in record["rows"]}
    rows = [_schedule(row, first) for row in record["rows"]]
    ours = [row for row in record["rows"] if row["predicted_bytes"]]
    still = [row["name"] for row in ours if "+" not in row["name"]]
    slowest = max(seconds[name] for name in still) / seconds[first["name"]]
    goals = [
        all_of("bytes of every rank as predicted, to the byte", sum(_same(row) == "yes" for row in ours), len(ours)),
        all_of("gradients those of torch, bit for bit", sum(row["gradients_off"] == 0 for row in ours), len(ours)),
        goal("time over torch's where nothing moves", slowest, 1.0, show=ratio),
    ]
    sizes = record["sizes"]
    header = [
        "schedule",
        "fullest rank MiB",
        "over torch's",
        "as predicted",
        "s",
        "over torch's",
        "predicted s",
        "measured over it",
        "gradients off",
    ]
    shape = f"{sizes['layers']} layers, {sizes['chunks']} chunks a rank and {sizes['microbatches']} microbatches"
    claim = f"Pipelines of {shape} take the bytes that their plan says; + is what moves to a disk."
    command = documented_command("pipeline_run.py", PIPELINE)
    return Proof("pipeline-run", claim, PIPELINE, command, machine(record["environment"]), header, rows, goals)


def _schedule(row: Row, first: Row) -> list[str]:
    """Return the cells of a schedule beside the first one, which is torch's."""
    peaks = [max(each["peaks_bytes"]) for each in (row, first)]
    seconds = [statistics.median(each["all_seconds"]) for each in (row, first)]
    predicted = row["predicted_seconds"]
    bytes_told = [mib(peaks[0]), ratio(peaks[0] / peaks[1]), _same(row)]
    seconds_told = [ratio(seconds[0]), ratio(seconds[0] / seconds[1]), cell(predicted, ratio)]
    off = change(seconds[0] / predicted - 1) if predicted else "-"
    return [row["name"], *bytes_told, *seconds_told, off, f"{row['gradients_off']:g}"]


def _same(row: Row) -> str:
    return "-" if row["predicted_bytes"] is None else "yes" if row["predicted_bytes"] == row["peaks_bytes"] else "no"


def pipeline_trend() -> Proof:
    """Simulated pipelines beside published ones."""
    record: list[Row] = read(TREND)
    ran = [row for row in record if row["published_gigabytes"] is not None]
    rows = []
    for row in record:
        published = row in ran
        off = change(row["activation_gigabytes"] / row["published_gigabytes"] - 1) if published else "-"
        rows.append([
            f"{row['length']:,}",
            row["schedule"],
            yes(row["fits"]),
            yes(published),
            f"{row['utilisation']:.1f}",
            cell(row["published_utilisation"], str),
            f"{row['activation_gigabytes']:.1f}",
            cell(row["published_gigabytes"], str),
            off,
        ])  # fmt: skip
    most_points, most_share = TREND_TOLERANCES
    long = [row for row in ran if row["length"] >= 16384]
    num_fast = sum(abs(row["utilisation"] - row["published_utilisation"]) <= most_points for row in ran)
    num_near = sum(abs(row["activation_gigabytes"] / row["published_gigabytes"] - 1) <= most_share for row in long)
    goals = [
        all_of("what fits is what ran", sum(row["fits"] == (row in ran) for row in record), len(record)),
        all_of(f"utilisation within {most_points} points", num_fast, len(ran)),
        all_of(f"activations within {percent(most_share)} at 16,384 tokens and above", num_near, len(long)),
    ]
    header = ["tokens", "schedule", "fits", "ran", "utilisation %", "published", "activations GB", "published", "off"]
    claim = "Simulated pipelines show the published trend of PipeOffload's figure 15."
    made_on = "Arithmetic, the same on each machine; the record names no versions"
    return Proof(
        "pipeline-trend", claim, TREND, documented_command("pipeline_trend.py", TREND), made_on, header, rows, goals
    )


def ranks() -> Proof:
    """What a rank holds, as the paper, DeepSpeed's estimator and a plan say."""
    record = read(RANKS)
    rows = []
    for row in record["rows"]:
        if row["states"] != "fp32" or (row["stage"] == 0) != (row["ranks"] == 1):
            continue
        low = row_of(record["rows"], ranks=row["ranks"], stage=row["stage"], states="4bit")
        rows.append([str(row["ranks"]), str(row["stage"]), *_sizes(row), *_sizes(low)[:1], *_sizes(low)[2:]])
    sharded = [row for row in record["rows"] if row["stage"] != 1]
    off = {form: _off(row for row in sharded if row["states"] == form) for form in ("fp32", "4bit")}
    estimated = [row["deepspeed"] / row["packlight"] - 1 for row in record["rows"] if row["deepspeed"]]
    goals = [
        *(
            f"stages 0, 2 and 3, {form} states: a plan is at most {percent(each)} off the paper"
            for form, each in off.items()
        ),
        f"DeepSpeed's estimator beside a plan: {change(min(estimated))} to {change(max(estimated))}",
        f"on the meta device DeepSpeed counts {record['deepspeed_counts']:,} parameters of {record['parameters']:,}",
    ]
    header = ["ranks", "stage", "paper", "DeepSpeed's estimator", "packlight", "off the paper"]
    header += ["paper, 4bit states", "packlight, 4bit", "off the paper, 4bit"]
    model = f"a decoder of {record['parameters'] / 1e9:.2f} billion parameters"
    claim = f"What a rank holds of {model}, in GB: plans count what ZeRO's paper counts."
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    made_on = f"Arithmetic on the meta device; {versions}"
    return Proof("ranks", claim, RANKS, documented_command("zero_table.py", RANKS), made_on, header, rows, goals)


def _sizes(row: Row) -> list[str]:
    told = ["-" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("paper", "deepspeed", "packlight")]
    return [*told, change(row["packlight"] / row["paper"] - 1)]


def _off(rows: Iterable[Row]) -> float:
    return max(abs(float(row["packlight"] / row["paper"]) - 1) for row in rows)
