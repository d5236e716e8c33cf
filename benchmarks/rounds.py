"""How one optimiser step is measured: its time in rounds with others, and what it allocates while it runs.

A round times everyone once, and the order turns from round to round: what the machine does meanwhile, and what the
one before has left in the caches, falls on everyone alike.
"""

import ctypes
import functools
import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from contenders import PEERS, Contender, Step, Storage, contenders, stored_bytes
from torch.profiler import ProfilerActivity, profile

BASELINE = "torch fused"
COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}  # of fp32: far more than any cache holds
NUM_COPIES = 9
WARM_UP_STEPS = 3  # make the states, compile, and once as it will be

Shapes = Sequence[tuple[int, ...]]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """What one group of rounds steps on.

    Attributes:
        name: of the group.
        shapes: of the tensors.
        dtype: of parameters and gradients.
        device: "cpu" or "cuda".
        names: the contenders asked for; empty: all.
        calls: steps per sample.
        allocations: measure what a step allocates too.
        slow_share: contenders that shrink get one n-th of the elements of a lone tensor.
    """

    name: str
    shapes: Shapes
    dtype: torch.dtype
    device: str
    names: tuple[str, ...] = ()
    calls: int = 1
    allocations: bool = False
    slow_share: int = 1

    @property
    def num_elements(self) -> int:
        """Return the elements of all tensors together."""
        return sum(map(math.prod, self.shapes))

    @property
    def small(self) -> bool:
        """Return whether low-bit optimisers keep these tensors' states in fp32."""
        return math.prod(self.shapes[0]) <= 4096

    def share(self, contender: Contender) -> int:
        """Return n where a contender gets one n-th of the elements."""
        return self.slow_share if contender.shrinks and len(self.shapes) == 1 else 1

    def shapes_for(self, contender: Contender) -> Shapes:
        """Return the shapes of a contender's tensors."""
        if contender.flat:
            return [(math.prod(shape),) for shape in self.shapes]
        share = self.share(contender)
        return self.shapes if share == 1 else [matrix(self.num_elements // share)]


def matrix(num_elements: int) -> tuple[int, int]:
    """Return a shape as square as powers of two allow."""
    rows = 2 ** ((num_elements.bit_length() - 1) // 2)
    return rows, num_elements // rows


def measure(
    workload: Workload, *, repeats: int, peers: Sequence[str], announce: Callable[[Workload, Rows], None]
) -> dict[str, Any]:
    """Predict the step of every contender, time the rounds, and measure allocations.

    Args:
        workload: the tensors.
        repeats: rounds.
        peers: other packages to measure.
        announce: gets the predictions before the first round.

    Returns:
        The group's record: `rows`, one per contender; `absent`, the reason of everyone who did not run.
    """
    running, absent = _started(workload, peers)
    copy, copied_bytes = _copy_step(workload.device)
    copies = [seconds(copy, device=workload.device) for _ in range(NUM_COPIES + WARM_UP_STEPS)][WARM_UP_STEPS:]
    before = copied_bytes / statistics.median(copies)
    rows = [_predicted(contender, workload, before) for contender, _ in running.values()]
    announce(workload, rows)
    steps = {name: step for name, (_, step) in running.items()} | {"copy": copy}
    samples = _rounds(steps, workload, repeats)
    copy_bytes_per_second = copied_bytes / statistics.median(samples["copy"])
    baseline = statistics.median(samples[BASELINE])
    for row in rows:
        step = steps[row["contender"]]
        row |= _timed(row, samples[row["contender"]], copy_bytes_per_second, baseline)
        row["state_bytes_per_parameter"] = stored_bytes(step) / row["measured_elements"]
        if workload.allocations:
            row |= temporaries(step, device=workload.device)
    return {
        "group": workload.name,
        "device": workload.device,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "num_elements": workload.num_elements,
        "num_tensors": len(workload.shapes),
        "shape": list(workload.shapes[0]),
        "steps_per_sample": workload.calls,
        "copy_bytes_per_second_before": before,
        "copy_bytes_per_second": copy_bytes_per_second,
        "rows": rows,
        "absent": absent,
    }


def free(device: str) -> None:
    """Give back what the last workload held.

    Args:
        device: "cpu" or "cuda".
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled steps (torchao) may hold on to what they were compiled for
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _started(workload: Workload, peers: Sequence[str]) -> tuple[dict[str, tuple[Contender, Step]], dict[str, str]]:
    """Make and warm up the contenders of a workload: who runs, and the reason of everyone who does not."""
    storage = Storage(workload.num_elements, dtype=workload.dtype, device=workload.device)
    running: dict[str, tuple[Contender, Step]] = {}
    absent: dict[str, str] = {}
    for contender in contenders(workload.dtype):
        if workload.names and contender.name not in workload.names:
            continue
        outcome = _start(contender, workload, storage, peers)
        if isinstance(outcome, str):
            absent[contender.name] = outcome
        else:
            running[contender.name] = (contender, outcome)
    return running, absent


def _start(contender: Contender, workload: Workload, storage: Storage, peers: Sequence[str]) -> Step | str:
    """Return a warmed-up step, or why there is none."""
    if contender.package in PEERS and contender.package not in peers:
        return "not asked for (--peers)"
    # Two fp32 states and torch foreach's temporaries take up to 20 bytes, slow peers on the CPU up to 48.
    slow = contender.shrinks and workload.device == "cpu"
    needed_bytes = (48 if slow else 20) * workload.num_elements // workload.share(contender)
    if needed_bytes > (free_bytes := available_bytes(workload.device)):
        return f"needs up to {needed_bytes / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} GiB are free"
    try:
        step = contender.make(storage.parameters(workload.shapes_for(contender)))
        for _ in range(WARM_UP_STEPS):
            step()
    except Exception as error:  # a peer may fail in any way; its words stand beside its name
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return step


def _rounds(steps: Mapping[str, Step], workload: Workload, repeats: int) -> dict[str, list[float]]:
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            calls = 1 if name == "copy" else workload.calls
            samples[name].append(seconds(steps[name], device=workload.device, calls=calls))
    return samples


def _predicted(contender: Contender, workload: Workload, copy_bytes_per_second: float) -> dict[str, Any]:
    """Return a row with the floor: the bytes that a step moves at least, at the bandwidth of a copy."""
    moved_bytes = contender.moved_bytes(workload.dtype, small=workload.small)
    baseline_bytes = contenders(workload.dtype)[0].moved_bytes(workload.dtype, small=workload.small)
    return {
        "contender": contender.name,
        "num_elements": workload.num_elements,
        "measured_elements": workload.num_elements // workload.share(contender),
        "moved_bytes_per_parameter": moved_bytes,
        "predicted_seconds": moved_bytes * workload.num_elements / copy_bytes_per_second,
        "predicted_ratio": moved_bytes / baseline_bytes,
    }


def _timed(
    row: Mapping[str, Any], samples: Sequence[float], copy_bytes_per_second: float, baseline_seconds: float
) -> dict[str, Any]:
    """Return what the samples of a contender say, scaled to all elements of the workload."""
    scaled = [sample * row["num_elements"] / row["measured_elements"] for sample in samples]
    median = statistics.median(scaled)
    moved_bytes = row["moved_bytes_per_parameter"] * row["num_elements"]
    return {
        "seconds": median,
        "seconds_quartiles": statistics.quantiles(scaled, n=4)[::2] if len(scaled) > 1 else [median, median],
        "nanoseconds_per_element": median * 1e9 / row["num_elements"],
        "ratio": median / baseline_seconds,
        "copy_bandwidth_fraction": moved_bytes / median / copy_bytes_per_second,
        "sample_seconds": list(samples),
    }


def seconds(step: Step, *, device: str, calls: int = 1) -> float:
    """Time a step.

    Args:
        step: does one step.
        device: "cpu" or "cuda"; on cuda the time lies between two events on the current stream, so it has the wait
            for launches in it.
        calls: steps to do in a row.

    Returns:
        Seconds per step.
    """
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _copy_step(device: str) -> tuple[Step, int]:
    """Return a copy of a large tensor, to measure what the memory gives.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The call, and the bytes it reads and writes. A CPU may read what it is about to overwrite too; that is not
        counted, so a step in place can come out above this bandwidth.
    """
    source = torch.ones(COPY_ELEMENTS[device], device=device)
    target = torch.zeros_like(source)
    return functools.partial(target.copy_, source), 2 * source.nbytes


def temporaries(step: Step, *, device: str) -> dict[str, Any]:
    """Measure what a step allocates beyond what was there before it.

    Args:
        step: does one step; its states exist already.
        device: "cpu" or "cuda".

    Returns:
        temporary_tensor_bytes: peak bytes of torch's allocator; temporary_resident_bytes: rise of the process's
        resident peak; resident_by: how that was read.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        tensor_bytes = torch.cuda.max_memory_allocated() - before
    else:
        tensor_bytes = _allocated_peak_bytes(step)
    return {"temporary_tensor_bytes": tensor_bytes, **_resident_rise(step)}


def _allocated_peak_bytes(step: Step) -> int:
    """Add up the CPU allocator's own events; it reports allocations of C++ code too, which no dispatch mode sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = cast(Any, profiler.profiler).kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    live_bytes = peak_bytes = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        live_bytes += change
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def _resident_rise(step: Step) -> dict[str, Any]:
    """Read the kernel's high-water mark of resident memory, after setting it to what is resident now."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else a temporary may fit into memory that was freed but not given back
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: resets VmHWM (man 5 proc)
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return {"temporary_resident_bytes": rise * 1024, "resident_by": "ru_maxrss, a lower bound"}
    before = _kernel_bytes("/proc/self/status", "VmRSS")
    step()
    return {"temporary_resident_bytes": _kernel_bytes("/proc/self/status", "VmHWM") - before, "resident_by": "VmHWM"}


def available_bytes(device: str) -> int:
    """Return the memory that can still be allocated.

    Args:
        device: "cpu" or "cuda".

    Returns:
        Bytes.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _kernel_bytes("/proc/meminfo", "MemAvailable")


def _kernel_bytes(path: str, field: str) -> int:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
