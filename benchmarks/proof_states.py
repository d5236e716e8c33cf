"""Tables of low-bit optimiser states: what a step costs beside other packages' steps, and how training comes out.

A time is the median of its samples, a ratio one of medians, to torch's fused AdamW in the same rounds.
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.proof_form import (
    CPU,
    CPU_AVX2,
    GPU,
    Proof,
    Row,
    all_of,
    change,
    documented_command,
    goal,
    machine,
    percent,
    ratio,
    read,
    recorded_command,
    row_of,
)

CPU_STATES = f"{CPU_AVX2}/states.json"
GPU_STATES, GPU_SMALL = f"{GPU}/states.json", f"{GPU}/states_small.json"
TRAIN, UPDATE = f"{CPU}/quality_train.json", f"{CPU}/quality_update.json"
BASELINE = "torch fused"
OURS = "packlight "
FP32 = "packlight fp32"
LOW_BIT = ("packlight 4bit", "packlight 4bit blocks", "packlight 4bit blocks, nearest")


def _group(record: str, name: str, dtype: str) -> Row:
    return row_of(read(record)["groups"], group=name, dtype=dtype)


def _seconds(row: Row) -> float:
    """Return the median; a peer that was timed on a part of the elements counts for all of them."""
    return float(statistics.median(row["sample_seconds"]) * row["num_elements"] / row["measured_elements"])


def _over_fused(group: Row) -> dict[str, float]:
    seconds = {row["contender"]: _seconds(row) for row in group["rows"]}
    return {name: each / seconds[BASELINE] for name, each in seconds.items()}


def _proof(
    name: str, claim: str, record: str, header: Sequence[str], rows: Sequence[Sequence[str]], *goals: str
) -> Proof:
    made_on = machine(read(record)["environment"])
    return Proof(name, claim, record, recorded_command(record), made_on, header, rows, goals)


def _scaled(groups: Iterable[Row]) -> str:
    """Name who was timed on a part of the elements."""
    named = {
        row["contender"]: f"{row['measured_elements']:,} of {row['num_elements']:,}"
        for group in groups
        for row in group["rows"]
        if row["measured_elements"] != row["num_elements"]
    }
    parts = ", ".join(sorted(set(named.values())))
    return f"timed on {parts} elements, and multiplied: {', '.join(named)}" if named else ""


def _absent(groups: Iterable[Row]) -> str:
    absent: dict[str, str] = {}
    for group in groups:
        absent |= group["absent"]
    return "absent: " + "; ".join(f"{name} ({reason})" for name, reason in absent.items())


def cpu_steps() -> Proof:
    """Steps of one large tensor on the CPU."""
    groups = [_group(CPU_STATES, "fp32", "float32"), _group(CPU_STATES, "bf16", "bfloat16")]
    ratios = [_over_fused(group) for group in groups]
    rows = []
    for row in groups[1]["rows"]:
        name = row["contender"]
        cells = [ratio(each[name]) if name in each else "-" for each in ratios]
        times = [_milliseconds(group, name) for group in groups]
        rows.append(
            [name, cells[0], times[0], cells[1], times[1], _state_bytes(groups[0], name), _state_bytes(groups[1], name)]
        )
    resident = [row["temporary_resident_bytes"] for group in groups for row in group["rows"] if _is_ours(row)]
    told = f"KiB by which packlight's steps of {groups[0]['num_elements']:,} elements raise the resident peak"
    header = ["one tensor", "fp32: over fused", "ms", "bf16: over fused", "ms", "state bytes, fp32", "bf16"]
    goals = [
        goal(told, max(resident), 2**20, show=lambda each: f"{each / 2**10:,.0f}"),
        _scaled(groups),
        _absent(groups),
    ]
    low = [each[name] for each in ratios for name in each if name in (*LOW_BIT, "packlight 8bit")]
    claim = (
        f"On the CPU a step with states of 4 or 8 bits takes {ratio(min(low))} to {ratio(max(low))} times as long as "
        "torch's fused one, and allocates next to nothing; fp8 takes longer."
    )
    return _proof("states-cpu", claim, CPU_STATES, header, rows, *goals)


def _is_ours(row: Row) -> bool:
    return bool(row["contender"].startswith(OURS))


def _milliseconds(group: Row, name: str) -> str:
    found = [_seconds(row) for row in group["rows"] if row["contender"] == name]
    return f"{found[0] * 1e3:,.1f}" if found else "-"


def _state_bytes(group: Row, name: str) -> str:
    found = [row["state_bytes_per_parameter"] for row in group["rows"] if row["contender"] == name]
    return f"{found[0]:.2f}" if found else "-"


def cpu_goals() -> Proof:
    """The goals of these steps, a row for each peer."""
    bounds = [
        (*bound["claim"].split(" / "), bound)
        for bound in read(CPU_STATES)["bounds"]
        if bound["group"] in ("fp32", "bf16") and " / " in bound["claim"]
    ]
    peers = list(dict.fromkeys(peer for _, peer, _ in bounds))
    columns = [(ours, group) for ours in LOW_BIT for group in ("fp32", "bf16")]
    rows = []
    for peer in peers:
        cells = {(ours, bound["group"]): bound for ours, other, bound in bounds if other == peer}
        rows.append([peer, *(_bound(cells.get(column)) for column in columns)])
    num_met = sum(bound["value"] <= bound["limit"] for *_, bound in bounds)
    header = ["over", *(f"{ours.removeprefix(OURS)}, {group}" for ours, group in columns)]
    claim = "What was wanted of these steps: a time over the peer's, at most; with + what is missed by."
    return _proof("states-goals", claim, CPU_STATES, header, rows, all_of("every bound", num_met, len(bounds)))


def _bound(bound: Row | None) -> str:
    if bound is None:
        return "-"
    over = bound["value"] - bound["limit"]
    return f"{bound['value']:.3f} of {bound['limit']:.3g}" + (f" +{over:.3f}" if over > 0 else "")


def cpu_small() -> Proof:
    """Steps of many small tensors on the CPU."""
    groups = [_group(CPU_STATES, "small", dtype) for dtype in ("float32", "bfloat16")]
    return _small("states-cpu-small", CPU_STATES, {"fp32": groups[0], "bf16": groups[1]})


def gpu_small() -> Proof:
    """Steps of many small tensors on a GPU."""
    groups = [_group(GPU_SMALL, name, "bfloat16") for name in ("small", "small-matrices")]
    return _small("states-gpu-small", GPU_SMALL, {"bf16": groups[0], "bf16 matrices": groups[1]})


def _small(name: str, record: str, groups: Mapping[str, Row]) -> Proof:
    header, goals, ours = ["many tensors"], [], []
    rows: dict[str, list[str]] = {}
    for told, group in groups.items():
        shape = " x ".join(f"{each:,}" for each in group["shape"])
        header += [f"{group['num_tensors']:,} of {shape}, {told}: over fused", "ms"]
        over = _over_fused(group)
        for row in group["rows"]:
            rows.setdefault(row["contender"], []).extend(
                [ratio(over[row["contender"]]), _milliseconds(group, row["contender"])]
            )
        ours.append(over[LOW_BIT[0]])
        goals.append(goal(f"packlight 4bit over fused, {told}", ours[-1], 1.0, show=ratio))
    taken = f"{ratio(min(ours))} and {ratio(max(ours))}" if min(ours) < max(ours) else ratio(ours[0])
    claim = f"A step of many small tensors takes {taken} times as long as torch's fused one."
    table = [[contender, *cells] for contender, cells in rows.items()]
    return _proof(name, claim, record, header, table, *goals)


def cpu_sizes() -> Proof:
    """Steps of growing tensors on the CPU."""
    return _sizes("states-cpu-sizes", CPU_STATES)


def gpu_sizes() -> Proof:
    """Steps of growing tensors on a GPU."""
    return _sizes("states-gpu-sizes", GPU_STATES)


def _sizes(name: str, record: str) -> Proof:
    rows, costs = [], {}
    for group in read(record)["groups"]:
        if group["group"] != "linear":
            continue
        fused, ours = (row_of(group["rows"], contender=each) for each in (BASELINE, LOW_BIT[0]))
        each = [_seconds(row) for row in (fused, ours)]
        costs[group["num_elements"]] = each[1] / group["num_elements"]
        rows.append(
            [f"{group['num_elements']:,}", *(f"{seconds * 1e3:.2f}" for seconds in each), ratio(each[1] / each[0])]
        )
    small, large = list(costs)[1], list(costs)[-1]
    told = f"packlight 4bit, an element of {large:,} over one of {small:,}"
    claim = "The time that an element takes does not grow with the tensor, within the bound below."
    header = ["elements of one tensor", "torch fused ms", "packlight 4bit ms", "over fused"]
    return _proof(name, claim, record, header, rows, goal(told, costs[large] / costs[small], 1.5, show=ratio))


def gpu_steps() -> Proof:
    """Steps of large tensors on a GPU."""
    group = _group(GPU_STATES, "bf16", "bfloat16")
    over = _over_fused(group)
    rows = [
        [
            row["contender"],
            ratio(over[row["contender"]]),
            f"{_seconds(row) * 1e3:.2f}",
            percent(row["copy_bandwidth_fraction"]),
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{row['temporary_tensor_bytes']:,}",
        ]
        for row in group["rows"]
    ]
    ours = [row for row in group["rows"] if _is_ours(row)]
    num_fast = sum(row["copy_bandwidth_fraction"] >= 0.85 for row in ours)
    temporary = max(row["temporary_tensor_bytes"] for row in ours)
    shape = " x ".join(map(str, group["shape"]))
    header = [
        f"{group['num_tensors']} of {shape}, bf16",
        "over fused",
        "ms",
        "of a copy's bandwidth",
        "state bytes",
        "temporary bytes",
    ]
    goals = [
        all_of("at least 85 % of the bandwidth of a copy, all formats", num_fast, len(ours)),
        goal("temporary bytes of packlight's steps", temporary, 2**20, show=lambda each: f"{each:,.0f}"),
        _absent([group]),
    ]
    low = [over[row["contender"]] for row in ours if row["contender"] != FP32]
    taken = f"{ratio(min(low))} to {ratio(max(low))}"
    claim = f"On a GPU a step with low-bit states takes {taken} times as long as torch's fused one."
    return _proof("states-gpu", claim, GPU_STATES, header, rows, *goals)


def quality_train() -> Proof:
    """Held-out losses after training."""
    record = read(TRAIN)
    tasks = list(dict.fromkeys(row["task"] for row in record["summary"]))
    formats = list(dict.fromkeys(row["format"] for row in record["summary"]))
    means = {(task, form): statistics.mean(_losses(task, form)) for task in tasks for form in formats}
    rows = [
        [form] + [f"{means[task, form]:.4f} ({change(means[task, form] / means[task, 'fp32'] - 1)})" for task in tasks]
        for form in formats
    ]
    seeds = {task: f"{min(_losses(task, 'fp32')):.4f} to {max(_losses(task, 'fp32')):.4f}" for task in tasks}
    rows.append(["seeds of fp32", *seeds.values()])
    others = [case for case in means if case[1] != "fp32"]
    near = [abs(means[case] / means[case[0], "fp32"] - 1) <= record["tolerance"] for case in others]
    inside = [min(_losses(task, "fp32")) <= means[task, form] <= max(_losses(task, "fp32")) for task, form in others]
    goals = [
        all_of(f"every mean within {percent(record['tolerance'])} of fp32's", sum(near), len(others)),
        all_of("every mean within the seeds of fp32", sum(inside), len(others)),
    ]
    num_seeds, steps = len(_losses(tasks[0], "fp32")), {run["task"]: run["steps"] for run in record["runs"]}
    header = ["states", *(f"{task}, {steps[task]} steps" for task in tasks)]
    claim = f"Training with low-bit states reaches the held-out loss of fp32 ones: means of {num_seeds} seeds."
    command = documented_command("quality.py", TRAIN)
    return Proof("quality", claim, TRAIN, command, machine(record["environment"]), header, rows, goals)


def _losses(task: str, form: str) -> list[float]:
    return [run["loss"] for run in read(TRAIN)["runs"] if (run["task"], run["format"]) == (task, form)]


def quality_update() -> Proof:
    """Errors of the update."""
    record = read(UPDATE)
    starts = list(dict.fromkeys((row["start"], row["beta2"]) for row in record["rows"]))
    formats = list(dict.fromkeys(row["format"] for row in record["rows"]))
    rows = [
        [form]
        + [f"{row_of(record['rows'], format=form, start=at, beta2=beta2)['both']['error']:.3g}" for at, beta2 in starts]
        for form in formats
    ]
    goals = []
    for bound in record["bounds"]:
        form, start, moment, limit = _parsed(bound["claim"])
        value = row_of(record["rows"], format=form, start=start, beta2=0.999)[moment]["error"]
        goals.append(goal(f"{form}, {start}, by {moment} alone", value, limit, show=lambda each: f"{each:.3f}"))
    header = ["states", *(f"{start}, {beta2}" for start, beta2 in starts)]
    claim = (
        f"How far updates are from exact ones over {record['num_steps']} real gradients: norm of the error over theirs."
    )
    command = documented_command("quality.py", UPDATE)
    return Proof("quality-update", claim, UPDATE, command, machine(record["environment"]), header, rows, goals)


def _parsed(claim: str) -> tuple[str, str, str, float]:
    """Take format, start, moment and limit out of a bound's words, which are all that its record has."""
    found = re.fullmatch(r"(\w+), (.+), (\w+): error [\d.]+ <= ([\d.]+)", claim)
    if found is None:
        raise ValueError(f"a bound reads {claim!r}; wanted 'FORMAT, START, MOMENT: error X <= Y'")
    return found[1], found[2], found[3], float(found[4])
