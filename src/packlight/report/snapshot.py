"""Tells what a memory snapshot of torch says: what was asked for, by which line, and what could be done.

`torch.cuda.memory._dump_snapshot` writes every block of the allocator with the stack that asked for it, and a web page
draws them. Which kind of tensor took the memory, how much was reserved for nothing, and what would have been enough,
nobody says. The idea: the stack tells the kind. An optimiser's block was asked for in torch/optim, one of forward under
a function of this name, one of backward by autograd's engine.

The file is a pickle of plain data, and is read as that: no object in it is made. Fields are those of torch 2.11 to 2.13
(`torch.cuda.memory._snapshot`).
"""

import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from packlight.budget import format_bytes
from packlight.shortage import Shortage, changes

NUM_LARGEST = 10
_ENGINE = "torch::autograd::Engine"
KINDS = ("parameters", "optimizer_states", "gradients", "activations", "other")


@dataclass(frozen=True)
class Asker:
    """A line of code, and the blocks in use that it asked for."""

    line: str
    kind: str
    num_blocks: int
    num_bytes: int


@dataclass(frozen=True)
class Failure:
    """An allocation that could not be made: its bytes, what the device had left, and the line."""

    num_bytes: int
    device_free_bytes: int | None
    line: str


@dataclass(frozen=True)
class DeviceSnapshot:
    """What the allocator of a device held.

    Attributes:
        device: its index.
        reserved_bytes: of all segments.
        allocated_bytes: of blocks that tensors have.
        waiting_bytes: of blocks that another stream has not finished with.
        largest_free_bytes: the largest free block.
        by_kind: allocated bytes by `KINDS`; all "other" where no stacks were recorded.
        askers: the lines that asked for most.
        failure: the last allocation that failed.
        has_stacks: whether stacks were recorded.
    """

    device: int
    reserved_bytes: int
    allocated_bytes: int
    waiting_bytes: int
    largest_free_bytes: int
    by_kind: Mapping[str, int]
    askers: tuple[Asker, ...]
    failure: Failure | None
    has_stacks: bool

    def shortage(self) -> Shortage:
        """Return how things stood, for `changes`."""
        asked = None if self.failure is None else self.failure.num_bytes
        return Shortage(self.by_kind, asked_bytes=asked, reserved_bytes=self.reserved_bytes)


def is_snapshot(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a pickle; records are JSON."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def read_snapshot(path: str | os.PathLike[str]) -> list[DeviceSnapshot]:
    """Read a snapshot.

    Args:
        path: what `torch.cuda.memory._dump_snapshot` wrote.

    Returns:
        Each device that holds something, or where an allocation failed.

    Raises:
        ValueError: the file is damaged, holds more than plain data, or is no snapshot.
    """
    try:
        found = _Plain(io.BytesIO(Path(path).read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as a memory snapshot ({error}); is it whole?") from error
    if not isinstance(found, dict) or not isinstance(found.get("segments"), list):
        raise ValueError(
            f"{path} is a pickle, and no memory snapshot: it has no segments; wanted what "
            "torch.cuda.memory._dump_snapshot(path) writes"
        )
    try:
        return list(_devices(found))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is a memory snapshot without {error}; wanted one of torch 2.11 or newer") from error


class _Plain(pickle.Unpickler):
    """Makes dicts, lists, tuples, strings and numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds an object, {module}.{name}, which a snapshot does not")


def _devices(found: Mapping[str, Any]) -> Iterator[DeviceSnapshot]:
    segments: dict[int, list[Mapping[str, Any]]] = {}
    for segment in found["segments"]:
        segments.setdefault(int(segment.get("device", 0)), []).append(segment)
    traces = found.get("device_traces") or []
    failures = {at: failure for at, trace in enumerate(traces) if (failure := _failure(trace)) is not None}
    for device in sorted({*segments, *failures}):
        trace = traces[device] if device < len(traces) else []
        recorded = {entry.get("addr") for entry in trace if entry.get("action") == "alloc"}
        yield _device(device, segments.get(device, []), failures.get(device), recorded=recorded)


def _device(
    device: int, segments: Sequence[Mapping[str, Any]], failure: Failure | None, *, recorded: set[Any]
) -> DeviceSnapshot:
    blocks = [block for segment in segments for block in segment["blocks"]]
    used = [block for block in blocks if block["state"] == "active_allocated"]
    free = [block["size"] for block in blocks if block["state"] == "inactive"]
    has_stacks = any(_frames(block) for block in used)
    kinds, askers = dict.fromkeys(KINDS, 0), dict[tuple[str, str], list[int]]()
    for block in used:
        kind = _kind(_frames(block), is_recorded=block.get("address") in recorded) if has_stacks else "other"
        kinds[kind] += block["size"]
        askers.setdefault((_line(_frames(block)), kind), []).append(block["size"])
    ranked = sorted(askers.items(), key=lambda item: -sum(item[1]))[:NUM_LARGEST]
    return DeviceSnapshot(
        device=device,
        reserved_bytes=sum(segment["total_size"] for segment in segments),
        allocated_bytes=sum(block["size"] for block in used),
        waiting_bytes=sum(block["size"] for block in blocks if block["state"] not in ("active_allocated", "inactive")),
        largest_free_bytes=max(free, default=0),
        by_kind=kinds,
        askers=tuple(Asker(line, kind, len(sizes), sum(sizes)) for (line, kind), sizes in ranked),
        failure=failure,
        has_stacks=has_stacks,
    )


def _failure(trace: Sequence[Mapping[str, Any]]) -> Failure | None:
    failed = [entry for entry in trace if entry.get("action") == "oom"]
    if not failed:
        return None
    left = failed[-1].get("device_free")
    return Failure(int(failed[-1]["size"]), None if left is None else int(left), _line(_frames(failed[-1])))


def _frames(block: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the stack that asked, the innermost call first."""
    return block.get("frames") or []


def _kind(frames: Sequence[Mapping[str, Any]], *, is_recorded: bool) -> str:
    """Tell what a block is for by the stack that asked for it; of one older than the recording nothing is known."""
    if not frames and not is_recorded:
        return "other"
    names, files = {frame["name"] for frame in frames}, [frame["filename"] for frame in frames]
    if any("/torch/optim/" in file or "/packlight/optim/" in file for file in files):
        return "optimizer_states"
    if not frames or "_engine_run_backward" in names or any(_ENGINE in name for name in names):
        return "gradients"  # autograd's threads have no stack of Python, and one of C++ where that was asked for
    if "forward" in names:
        return "activations"
    in_module = {frame["name"] for frame in frames if frame["filename"].endswith("/torch/nn/modules/module.py")}
    made = any(frame["name"] == "__init__" and "/torch/nn/" in frame["filename"] for frame in frames)
    return "parameters" if made or in_module & {"_apply", "to", "cuda"} else "other"


def _line(frames: Sequence[Mapping[str, Any]]) -> str:
    """Return the innermost line that is neither torch's nor packlight's."""
    for frame in frames:
        file = frame["filename"]
        if file.endswith(".py") and "/torch/" not in file and "/packlight/" not in file:
            return f"{file}:{frame['line']} in {frame['name']}"
    return "autograd's engine, or no stack recorded" if not frames else "torch's own code"


def show_snapshot(devices: Sequence[DeviceSnapshot], *, console: Console | None = None) -> None:
    """Print a snapshot.

    Args:
        devices: what `read_snapshot` returned.
        console: where to print; None: standard output.
    """
    out = console or Console(emoji=False)
    if not devices:
        out.print("the snapshot holds nothing: no device had any memory reserved", markup=False)
    for device in devices:
        out.print(_facts(device), markup=False)
        out.print(_kinds(device), markup=False)
        out.print(_askers(device), markup=False)
        for at, change in enumerate(changes(device.shortage()), 1):
            out.print(f"{at}. {change}", markup=False, highlight=False, soft_wrap=True)


def _facts(device: DeviceSnapshot) -> Table:
    table = Table(title=f"device {device.device}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    if device.failure is not None:
        failure, left = device.failure, device.failure.device_free_bytes
        had = "" if left is None else f", the device had {format_bytes(left)} left"
        table.add_row("memory ran out", f"{format_bytes(failure.num_bytes)} asked for{had}; {failure.line}")
    table.add_row("allocated", format_bytes(device.allocated_bytes))
    table.add_row("reserved", format_bytes(device.reserved_bytes))
    unused_bytes = device.reserved_bytes - device.allocated_bytes - device.waiting_bytes
    table.add_row(
        "reserved, unused", f"{format_bytes(unused_bytes)}, the largest piece {format_bytes(device.largest_free_bytes)}"
    )
    if device.waiting_bytes:
        table.add_row("waiting for a stream", format_bytes(device.waiting_bytes))
    if not device.has_stacks:
        table.add_row("stacks", "none recorded: torch.cuda.memory._record_memory_history() before the step")
    return table


def _kinds(device: DeviceSnapshot) -> Table:
    table = Table(title="by what asked for it", title_justify="left")
    table.add_column("category")
    table.add_column("allocated", justify="right")
    for kind, num_bytes in sorted(device.by_kind.items(), key=lambda item: -item[1]):
        table.add_row(kind.replace("_", " "), format_bytes(num_bytes))
    return table


def _askers(device: DeviceSnapshot) -> Table:
    table = Table(title="the lines that asked for most", title_justify="left")
    table.add_column("line", overflow="fold")
    table.add_column("category")
    for title in ("blocks", "bytes"):
        table.add_column(title, justify="right")
    for asker in device.askers:
        table.add_row(asker.line, asker.kind.replace("_", " "), str(asker.num_blocks), format_bytes(asker.num_bytes))
    return table
