"""Does offloading to a disk give memory back to the machine, and what does it cost?

Live tensors tell nothing about that: the allocator may keep what is freed, and what is on its way is still here. So
the kernel is asked, in a process of its own for each variant: its resident peak (VmHWM) over some steps after warm-up,
once with glibc's malloc as it is and once with a fixed threshold, from which on it gives memory back at once. The
tier's file bypasses the page cache, which counts as nobody's resident memory anyway.

    fall of the peak <= bytes offloaded in a step - what is on its way when the peak is reached
    seconds          >= max(seconds without, bytes / bandwidth of writing + bytes / bandwidth of reading)
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.activations_steps import (
    Record,
    claim,
    compared,
    gpt,
    interleaved,
    peak_bytes,
    same,
    seconds,
    status_bytes,
)
from packlight.activations import Engine
from packlight.activations.disk import DiskTier
from packlight.activations.spill import SpillFile
from packlight.demo.train_gpt import Shape

LEAST_SHARE = 0.9  # of the bytes offloaded, by which the resident peak falls
WINDOWS = (16 * 2**20, 256 * 2**20)  # the second is the default
# From 64 KiB on each tensor is a mapping of its own; named, so that glibc does not move the threshold.
MALLOCS = {"glibc as it is": {}, "glibc, fixed threshold": {"MALLOC_MMAP_THRESHOLD_": str(2**16)}}
WARM_UP_STEPS, MEASURED_STEPS = 2, 3
PROBE_BYTES, PROBE_PARTS = 4 * 2**20, 64


@dataclass(frozen=True)
class Variant:
    """What one process measures.

    Attributes:
        shape, batch: of the GPT.
        window_bytes: most that may be in flight; None: nothing is offloaded.
        folder: of the file.
        num_threads: of torch.
    """

    shape: Shape
    batch: int
    window_bytes: int | None
    folder: Path
    num_threads: int


def disk(shape: Shape, *, batch: int, rounds: int, folder: Path | None = None) -> Record:
    """Measure a step without offloading, and with it for each of `WINDOWS`.

    Args:
        shape: of the GPT.
        batch: its windows.
        rounds: of the comparison of seconds.
        folder: of the file; None: the system's for temporary files.

    Returns:
        The record.
    """
    folder = folder or Path(tempfile.gettempdir())
    probe = _bandwidths(folder)
    rows, exact = _timed(shape, batch=batch, rounds=rounds, folder=folder)
    resident = []
    for malloc, settings in MALLOCS.items():
        variants = [Variant(shape, batch, window, folder, torch.get_num_threads()) for window in (None, *WINDOWS)]
        measured = [{"malloc": malloc, **_in_own_process(variant, settings)} for variant in variants]
        resident += [_with_fall(row, measured[0]) for row in measured]
    moved_bytes = next(row["bytes_out"] for row in resident if row["window_bytes"])
    carried = moved_bytes / probe["write_bytes_per_second"] + moved_bytes / probe["read_bytes_per_second"]
    return {
        "shape": vars(shape) | {"batch": batch},
        "disk": probe,
        "exact": exact,
        "predicted_seconds": max(rows[0]["seconds"], carried),
        "predicted_ratio": max(1.0, carried / rows[0]["seconds"]),
        "rows": rows,
        "resident": resident,
        "claims": [*_claims(resident), claim("loss and every gradient bit-equal", float(exact), 1, at_least=True)],
    }


def resident_peak(variant: Variant) -> Record:
    """Measure a variant in this process.

    Args:
        variant: what to measure.

    Returns:
        Resident bytes before, most resident bytes during the steps, seconds and bytes moved of a step, most live bytes.
    """
    torch.set_num_threads(variant.num_threads)
    work = gpt(variant.shape, batch=variant.batch)
    with _offloaded(work.model, variant.window_bytes, variant.folder) as tier:
        for _ in range(WARM_UP_STEPS):
            work.step()
        work.model.zero_grad(set_to_none=True)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: VmHWM starts anew (man 5 proc)
        before_bytes, before = status_bytes("VmRSS"), None if tier is None else tier.traffic()
        spent = [seconds(work.step) for _ in range(MEASURED_STEPS)]
        found: Record = {"window_bytes": variant.window_bytes, "resident_before_bytes": before_bytes}
        found["resident_peak_bytes"] = status_bytes("VmHWM")
        found["seconds"] = statistics.median(spent)
        found |= {"bytes_out": 0, "bytes_in": 0}
        if tier is not None and before is not None:
            after = tier.traffic()
            found["bytes_out"] = (after.bytes_out - before.bytes_out) // MEASURED_STEPS
            found["bytes_in"] = (after.bytes_in - before.bytes_in) // MEASURED_STEPS
            found["most_stored_bytes"], found["direct"] = after.most_stored_bytes, tier.direct
            found["write_bytes_per_second"] = after.bytes_out / after.seconds_out
            found["read_bytes_per_second"] = after.bytes_in / after.seconds_in
        return found | {"live_peak_bytes": peak_bytes(work.step)}


@contextlib.contextmanager
def _offloaded(model: torch.nn.Module, window_bytes: int | None, folder: Path) -> Iterator[DiskTier | None]:
    if window_bytes is None:
        yield None
        return
    tier = DiskTier(device=torch.device("cpu"), folder=folder, max_in_flight_bytes=window_bytes)
    with Engine(model, {"*": "offload"}, tier=tier):
        yield tier


def _in_own_process(variant: Variant, settings: dict[str, str]) -> Record:
    """Measure in a process whose malloc has settings; glibc reads them where a process begins."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(resident_peak, variant).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _with_fall(row: Record, plain: Record) -> Record:
    """Add by how much the peaks are lower than without offloading, and by how much they should be."""
    if row["window_bytes"] is None:
        return row
    fall_bytes = plain["resident_peak_bytes"] - row["resident_peak_bytes"]
    out_bytes = max(1, row["bytes_out"])  # a tensor that is freed before it was written is not
    return row | {
        "fall_bytes": fall_bytes,
        "fall_share": fall_bytes / out_bytes,
        "live_fall_share": (plain["live_peak_bytes"] - row["live_peak_bytes"]) / out_bytes,
        "predicted_fall_bytes": max(0, out_bytes - row["window_bytes"]),
        "predicted_fall_share": max(0.0, 1 - row["window_bytes"] / out_bytes),
    }


def _claims(resident: Sequence[Record]) -> list[Record]:
    """Hold the smaller window against the claim: of the larger one the window itself is more than a tenth."""
    return [
        claim(
            f"{row['malloc']}, window {row['window_bytes'] // 2**20} MiB: fall of the resident peak / bytes offloaded",
            row["fall_share"],
            LEAST_SHARE,
            at_least=True,
        )
        for row in resident
        if row["window_bytes"] == WINDOWS[0]
    ]


def _timed(shape: Shape, *, batch: int, rounds: int, folder: Path) -> tuple[list[Record], bool]:
    plain = gpt(shape, batch=batch)
    expected, exact = plain.results(), True
    steps = {"nothing offloaded": plain.step}
    with ExitStack() as stack:
        for window in WINDOWS:
            work = plain.twin()
            stack.enter_context(_offloaded(work.model, window, folder))
            exact = exact and same(work.results(), expected)
            steps[f"disk, window {window // 2**20} MiB"] = work.step
        return compared(interleaved(steps, rounds=rounds), "nothing offloaded"), exact


def _bandwidths(folder: Path) -> Record:
    """Write and read a file as the tier does, one part after another, and nothing else."""
    file = SpillFile(folder)
    with mmap.mmap(-1, PROBE_BYTES) as pages, memoryview(pages) as part:
        pages[:] = os.urandom(PROBE_BYTES)
        spent = []
        for move in (file.write, file.write, file.read):  # the first gives the file its blocks
            start = time.perf_counter()
            for index in range(PROBE_PARTS):
                move(index * PROBE_BYTES, part)
            spent.append(time.perf_counter() - start)
    file.close()
    moved_bytes = PROBE_BYTES * PROBE_PARTS
    return {
        "folder": str(folder),
        "direct": file.direct,
        "first_write_bytes_per_second": moved_bytes / spent[0],
        "write_bytes_per_second": moved_bytes / spent[1],
        "read_bytes_per_second": moved_bytes / spent[2],
    }
