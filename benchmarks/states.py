"""Claim: a step with low-bit states costs no more than one with fp32 states, and allocates nothing.

Times AdamW steps of packlight, torch and other packages side by side (`contenders.py`), in rounds (`rounds.py`). A
ratio is one of medians, to `torch.optim.AdamW(fused=True)` in the same rounds. Before the rounds it prints a
prediction: the bytes that a step has to move at least, at the bandwidth of a copy.

    fp32, bf16      one tensor of 8192 x 8192 (CUDA: 16 of them); also what a step allocates while it runs
    small           500 tensors of 2,048 elements (CUDA: 2,000)
    small-matrices  2,000 tensors of 64 x 256 elements, large enough for low-bit states (CUDA)
    linear          1M to 256M elements

Peers that need up to 30 temporary bytes per parameter on the CPU are timed there on a quarter of the elements; their
seconds are multiplied, and the table says so. That can flatter them (`--slow-share 1` gives them all elements). Who
could not run is listed with the reason.

    python benchmarks/states.py --json benchmarks/results/HARDWARE/states.json
    python benchmarks/states.py --device cuda --json benchmarks/results/HARDWARE/states.json
"""

import functools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces each start otherwise

import click
import torch
from contenders import PEERS
from rich.console import Console
from rich.table import Table
from rounds import BASELINE, Rows, Workload, available_bytes, free, matrix, measure

from packlight.integrations.script import environment

DEFAULT = "packlight 4bit"
BLOCKS = ("packlight 4bit blocks", "packlight 4bit blocks, nearest")
DEEPSPEED = ("deepspeed CPUAdam", "deepspeed CPUAdam, 16-bit states")
LOW_BIT_PEERS = ("bitsandbytes 8bit", "torchao 4bit", "torchao 8bit", "torchao fp8")
SMALL_PEERS = (*LOW_BIT_PEERS[:2], "flashoptim")
SMALL = (BASELINE, "torch foreach", DEFAULT, DEEPSPEED[0], *SMALL_PEERS)
GROUPS = {"cpu": ("fp32", "bf16", "small", "linear"), "cuda": ("bf16", "small", "small-matrices", "linear")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOW_SHARES = ("1", "2", "4", "8", "16")
ELEMENTS = {"cpu": 2**26, "cuda": 2**30}
TENSOR_ELEMENTS = 2**26  # CUDA's elements lie in tensors of 8192 x 8192, as a large model's do
NUM_SMALL = {"cpu": 500, "cuda": 2000}
LINEAR_SIZES = 5  # each four times the one before
MOST_TEMPORARY_BYTES = 2**20
LEAST_COPY_BANDWIDTH_FRACTION = 0.85
# An element of the largest tensor, whose bytes come from memory, beside one of a tensor 64 times smaller.
MOST_GROWTH = 1.5
MIB = 2**20


def elements_of(text: str) -> int:
    """Read a number of elements: a power of two, so that it makes a matrix.

    Args:
        text: digits, then perhaps K, M or G for powers of 1024.

    Returns:
        The number.

    Raises:
        click.BadParameter: it is something else.
    """
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdigit() or (number := int(digits) * factor) < 2**20 or number & (number - 1):
        raise click.BadParameter(f"{text!r} came, a power of two from 1M up, such as 64M, was wanted")
    return number


def workloads(name: str, num_elements: int, device: str, slow_share: int) -> Iterator[Workload]:
    """Yield the workloads of a group.

    Args:
        name: the group's.
        num_elements: of the large tensors.
        device: "cpu" or "cuda".
        slow_share: slow peers get one n-th of the elements, on the CPU.

    Yields:
        The workloads; `small` has one per dtype, `linear` one per size.
    """
    if name in DTYPES:
        num_tensors = max(1, num_elements // TENSOR_ELEMENTS) if device == "cuda" else 1
        shapes = [matrix(num_elements // num_tensors)] * num_tensors
        yield Workload(name, shapes, DTYPES[name], device, allocations=True, slow_share=slow_share)
    elif name == "linear":
        largest = num_elements * (4 if device == "cpu" else 1)
        for size in (largest // 4**power for power in reversed(range(LINEAR_SIZES))):
            calls = max(1, largest // 16 // size)  # a short step alone would measure the clock
            yield Workload(name, [matrix(size)], _small_dtypes(device)[0], device, (BASELINE, DEFAULT), calls)
    else:
        shape = (2048,) if name == "small" else (64, 256)
        for dtype in _small_dtypes(device):
            yield Workload(name, [shape] * NUM_SMALL[device], dtype, device, SMALL)


def _small_dtypes(device: str) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)


def bounds(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold a group against what is claimed.

    Args:
        group: its record.

    Returns:
        One record a claim: value, limit, and whether it holds; None where a contender is absent.
    """
    seconds = {row["contender"]: row["seconds"] for row in group["rows"]}
    made = []
    for ours, other, limit in _ratio_limits(group["group"], group["device"]):
        present = ours in seconds and other in seconds
        value = seconds[ours] / seconds[other] if present else None
        made.append(_bound(group, f"{ours} / {other}", value, limit))
    for row in group["rows"]:
        claims = row["contender"].startswith("packlight") and group["group"] in DTYPES
        if claims:
            # On CUDA the process's resident memory is not where a step works.
            for what in ("tensor", "resident") if group["device"] == "cpu" else ("tensor",):
                value = row[f"temporary_{what}_bytes"]
                made.append(_bound(group, f"{row['contender']}: temporary {what} bytes", value, MOST_TEMPORARY_BYTES))
        if claims and group["device"] == "cuda" and row["contender"] in (DEFAULT, *BLOCKS):
            value, limit = 1 / row["copy_bandwidth_fraction"], 1 / LEAST_COPY_BANDWIDTH_FRACTION
            made.append(_bound(group, f"{row['contender']} / the copy of as many bytes", value, limit))
    return made


def growth(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold the groups of `linear` against its claim: an element costs about the same in a tensor of any size.

    Args:
        groups: the records of all groups.

    Returns:
        One record, or none where `linear` was not measured: what an element costs at the largest size, as a multiple of
        what it costs at the second smallest. The smallest lies in a cache.
    """
    linear = sorted((group for group in groups if group["group"] == "linear"), key=lambda group: group["num_elements"])
    costs = {
        group["num_elements"]: row["nanoseconds_per_element"]
        for group in linear
        for row in group["rows"]
        if row["contender"] == DEFAULT
    }
    if len(costs) < 3:
        return []
    small, large = list(costs)[1], list(costs)[-1]
    claim = f"{DEFAULT}: an element of {large:,} / one of {small:,}"
    return [_bound(linear[-1], claim, costs[large] / costs[small], MOST_GROWTH)]


def _ratio_limits(name: str, device: str) -> Iterator[tuple[str, str, float]]:
    if name.startswith("small"):
        yield DEFAULT, BASELINE, 1.0
        for other in SMALL_PEERS if name == "small-matrices" else ():
            yield DEFAULT, other, 1.0
    elif name in DTYPES and device == "cpu":
        for ours in (DEFAULT, *BLOCKS):
            yield ours, BASELINE, 0.75 if ours == DEFAULT else 0.60
            for other in DEEPSPEED if name == "bf16" else DEEPSPEED[:1]:
                yield ours, other, 0.8
            for other in LOW_BIT_PEERS:
                yield ours, other, 1 / 40


def _bound(group: Mapping[str, Any], claim: str, value: float | None, limit: float) -> dict[str, Any]:
    holds = None if value is None else value <= limit
    where = {"group": group["group"], "dtype": group["dtype"]}
    return {**where, "claim": claim, "value": value, "limit": limit, "holds": holds}


def prediction_table(workload: Workload, rows: Rows) -> Table:
    """Lay out what is expected, before the rounds."""
    dtype = str(workload.dtype).removeprefix("torch.")
    table = _table(
        f"prediction, {_title(workload.name, len(workload.shapes), workload.shapes[0], dtype)}",
        ("contender", "bytes moved per parameter", "ms", "ratio to torch fused"),
    )
    for row in rows:
        facts = f"{row['predicted_seconds'] * 1e3:.3f}", f"{row['predicted_ratio']:.2f}"
        table.add_row(row["contender"], f"{row['moved_bytes_per_parameter']:.2f}", *facts)
    return table


def result_table(group: Mapping[str, Any]) -> Table:
    """Lay out what a group measured, and who is absent."""
    table = _table(
        _title(group["group"], group["num_tensors"], group["shape"], group["dtype"]),
        (
            "contender",
            "ms",
            "quartiles",
            "ns/element",
            "ratio",
            "predicted",
            "of copy",
            "state B",
            "temp. MiB",
            "RSS MiB",
        ),
    )
    for row in group["rows"]:
        times = 1 if row["measured_elements"] == row["num_elements"] else row["num_elements"] / row["measured_elements"]
        name = row["contender"] if times == 1 else f"{row['contender']} (1/{times:.0f}, scaled)"
        low, high = row["seconds_quartiles"]
        spans = f"{row['seconds'] * 1e3:.3f}", f"{low * 1e3:.3f}-{high * 1e3:.3f}"
        ratios = f"{row['ratio']:.3f}", f"{row['predicted_ratio']:.2f}", f"{row['copy_bandwidth_fraction']:.0%}"
        extra = (row.get(key) for key in ("temporary_tensor_bytes", "temporary_resident_bytes"))
        cells = ("" if each is None else f"{each * times / MIB:.2f}" for each in extra)
        state = f"{row['state_bytes_per_parameter']:.2f}"
        table.add_row(name, *spans, f"{row['nanoseconds_per_element']:.3f}", *ratios, state, *cells)
    for name in group["absent"]:
        table.add_row(name, "absent", style="dim")
    return table


def linear_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what an element costs at each size; below the caches' size it costs less."""
    table = _table("linear: nanoseconds per element", ("elements", BASELINE, DEFAULT, "ratio"))
    for group in groups:
        rows = {row["contender"]: row for row in group["rows"]}
        cells = [f"{rows[name]['nanoseconds_per_element']:.3f}" if name in rows else "" for name in (BASELINE, DEFAULT)]
        ratio = f"{rows[DEFAULT]['ratio']:.3f}" if DEFAULT in rows else "absent"
        table.add_row(f"{group['num_elements']:,}", *cells, ratio)
    return table


def bounds_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out the claims."""
    table = _table("claims", ("group", "claim", "value", "limit", "holds"))
    for each in records:
        value = "not measured" if each["value"] is None else f"{each['value']:.4g}"
        holds = {None: "?", True: "yes", False: "[red]no"}[each["holds"]]
        table.add_row(f"{each['group']} {each['dtype']}", each["claim"], value, f"{each['limit']:.4g}", holds)
    return table


def _title(name: str, num_tensors: int, shape: Sequence[int], dtype: str) -> str:
    return f"{name}: {num_tensors} x ({', '.join(map(str, shape))}), {dtype}"


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    return table


def _announce(console: Console, workload: Workload, rows: Rows) -> None:
    console.print(prediction_table(workload, rows))


def _versions() -> dict[str, str]:
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    return {peer: metadata.version(peer) for peer in PEERS if peer in installed}


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--elements", type=elements_of, metavar="N[K|M|G]", help="of the large tensors; 64M on the CPU, 1G on CUDA"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=21, show_default=True, help="rounds")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="other packages to measure, or none")
@click.option(
    "--group",
    "names",
    type=click.Choice(list(dict.fromkeys(sum(GROUPS.values(), ())))),
    multiple=True,
    help="only this group; may be repeated",
)
@click.option("--slow-share", type=click.Choice(SLOW_SHARES), default="4", help="slow peers get one n-th on the CPU")
@click.option("--json", "path", type=click.Path(path_type=Path), help="where to write the record")
def main(
    elements: int | None,
    device: str,
    repeats: int,
    peers: str,
    names: tuple[str, ...],
    slow_share: str,
    path: Path | None,
) -> None:
    """Measure every group, print it, and write the record."""
    console, groups, claims, load = Console(), [], [], os.getloadavg()[0]
    wanted = () if peers == "none" else tuple(peers.split(","))
    if unknown := {*wanted} - {*PEERS}:
        raise click.BadParameter(f"--peers {', '.join(unknown)} came, some of {', '.join(PEERS)} were wanted")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("--device cuda came, but torch sees no CUDA device here")
    if load > 0.5:
        console.print(f"load average {load:.1f}: something else runs here; these times say little", style="red")
    for name in names or GROUPS[device]:
        share = int(slow_share) if device == "cpu" else 1
        made = workloads(name, elements or ELEMENTS[device], device, share)
        part = list(_measured(made, repeats=repeats, peers=wanted, console=console))
        if name == "linear":
            console.print(linear_table(part))
        groups += part
        claims = [claim for group in groups for claim in bounds(group)] + growth(groups)
        if path is None:
            continue
        record = {
            "command": shlex.join(["python", "benchmarks/states.py", *sys.argv[1:]]),
            "environment": {**environment(), **_versions(), "load_averages": [load, os.getloadavg()[0]]},
            "bounds": claims,
            "groups": groups,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )  # a long run that is stopped leaves its part
    console.print(bounds_table(claims))


def _measured(
    made: Iterator[Workload], *, repeats: int, peers: Sequence[str], console: Console
) -> Iterator[dict[str, Any]]:
    """Measure and print the workloads of a group."""
    for workload in made:
        if 2 * workload.dtype.itemsize * workload.num_elements > available_bytes(workload.device):
            console.print(f"{workload.name}: {workload.num_elements} elements do not fit into memory", style="yellow")
            continue
        group = measure(workload, repeats=repeats, peers=peers, announce=functools.partial(_announce, console))
        free(workload.device)
        if workload.name != "linear":
            console.print(result_table(group))
        for contender, reason in group["absent"].items():
            console.print(f"absent: {contender}: {reason}", style="dim", markup=False)
        yield group


if __name__ == "__main__":
    main()
