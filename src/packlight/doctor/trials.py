"""What packlight does itself, tried: a kernel is compiled, a page pinned, a file written and read, a step planned.

That a compiler is installed, a GPU listed or a folder writable does not say that they serve: a compiler may lack
OpenMP's runtime, a GPU may refuse its driver, a folder may lie in memory or refuse O_DIRECT. So each trial goes through
the code that a training run would go through, on a few MiB, and tells what came of it.
"""

import os
import shlex
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from packlight.activations.disk import DiskTier
from packlight.activations.pages import Pages
from packlight.activations.slabs import SLAB_BYTES
from packlight.activations.spill import is_in_memory
from packlight.budget import format_bytes
from packlight.doctor.findings import Finding, in_line, told
from packlight.numerics.cache import cache_folder
from packlight.numerics.compiler import find_compiler, load
from packlight.numerics.cpu import SOURCE, Kind
from packlight.numerics.formats import moment_formats
from packlight.numerics.suitability import kind_of
from packlight.optim.adamw import AdamW
from packlight.planner.apply import apply
from packlight.planner.plan import plan

NO_COMPILER = "optimiser steps on states in few bits run in plain PyTorch, many times slower; install g++, or set CXX"
NO_DISK = "tensors cannot wait on a disk (--disk); name another folder"
NO_GPU = "the CPU is the training device: its memory is the budget, and what is offloaded goes to a disk"
VECTORS = (
    ("__AVX512F__", "AVX-512"),
    ("__AVX2__", "AVX2"),
    ("__AVX__", "AVX"),
    ("__SSE2__", "SSE2"),
    ("__ARM_FEATURE_SVE", "SVE"),
    ("__ARM_NEON", "NEON"),
    ("__ALTIVEC__", "AltiVec"),
)
"""What compilers define where their code may use vectors, the widest first (gcc.gnu.org and arm.com: ACLE)."""
TRIAL_BYTES = 16 * 2**20
TRIAL_SHAPE = (64, 128)
"""Of a parameter that has states in few bits: more than the 4096 that stay in fp32."""


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what is warned about meanwhile; nothing of it is printed."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said.extend(in_line(each.message) for each in caught)


# The CPU's kernels


def compiler() -> Finding:
    """Build, or find, one of the CPU's kernels, and do a step with it."""
    command, version = find_compiler()
    first_line = next(iter(version.splitlines()), "")
    second = moment_formats("4bit", TRIAL_SHAPE)[1]
    kind = kind_of(second)
    assert kind is not None
    with _heard() as said:
        start = time.perf_counter()
        load(SOURCE, Kind(kind, bf16=False, rounding=0, moments=2, stochastic=True).macros())
        seconds, folder = time.perf_counter() - start, cache_folder()
        step_states(torch.device("cpu"))
    vectors = vector_set(command)
    kept = "kept nowhere" if folder is None else f"kept in {folder}"
    found = (
        f"{shlex.join(command)} ({first_line}), {vectors or 'no vectors'}; "
        f"a kernel was ready in {seconds:.2f} s, {kept}"
    )
    facts = {"command": list(command), "version": first_line, "vectors": vectors, "seconds": seconds}
    return Finding("C++ compiler", "limited" if said else "works", found, "; ".join(said), facts=facts)


def vector_set(command: tuple[str, ...]) -> str:
    """Ask a compiler for the widest vectors that its code for this processor uses.

    Args:
        command: the start of the compiler's command line.

    Returns:
        One of the names in `VECTORS`; empty where it defines none of them.
    """
    for flag in ("-march=native", "-mcpu=native"):
        asked = [*command, flag, "-dM", "-E", "-x", "c++", os.devnull]
        done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode == 0:
            defined = {words[1] for line in done.stdout.decode().splitlines() if len(words := line.split()) > 1}
            return next((name for macro, name in VECTORS if macro in defined), "")
    return ""


def step_states(device: torch.device) -> None:
    """Do a step of 4-bit states on a device.

    Args:
        device: where the parameter is.

    Raises:
        RuntimeError: the parameter has not moved as AdamW moves it.
    """
    parameter = nn.Parameter(torch.zeros(TRIAL_SHAPE, device=device))
    parameter.grad = torch.ones_like(parameter)
    AdamW([parameter], lr=0.5, weight_decay=0.0, state_format="4bit").step()
    # Equal gradients are equal to their block's maximum, which every format holds: a first step is lr, to rounding.
    moved = parameter.detach().neg().cpu()
    if not torch.allclose(moved, torch.full_like(moved, 0.5), rtol=1e-2):
        raise RuntimeError(f"a step of AdamW moved a parameter by {moved.min():g} to {moved.max():g}; wanted 0.5")


# GPUs


def gpus(root: Path) -> Iterator[Finding]:
    """Try each GPU: a computation, and a step of states in few bits.

    Args:
        root: the folder in which proc stands.

    Yields:
        A finding for each, or one that says why there is none.
    """
    if torch.version.cuda is None:
        yield Finding("CUDA", "missing", f"torch {torch.__version__} is built without it", NO_GPU)
        return
    driver = driver_version(root)
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        found = f"built for {torch.version.cuda}, driver {driver or 'not found'}: {in_line(error)}"
        yield Finding("CUDA", "missing", found, NO_GPU)
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index, driver)


def driver_version(root: Path) -> str:
    """Return the version of NVIDIA's driver as its kernel module tells it; empty where there is none.

    Args:
        root: the folder in which proc stands.
    """
    try:
        first_line = (root / "proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in first_line.split() if word[0].isdigit() and "." in word), first_line)


def _gpu(index: int, driver: str) -> Finding:
    name, device = f"CUDA {index}", torch.device("cuda", index)
    try:
        properties = torch.cuda.get_device_properties(device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        found = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, {format_bytes(total_bytes)}, "
            f"{format_bytes(free_bytes)} free, CUDA {torch.version.cuda}, driver {driver or 'not told'}"
        )
        (torch.ones(256, 256, device=device) @ torch.ones(256, 256, device=device)).sum().item()
    except RuntimeError as error:
        return Finding(name, "missing", in_line(error), "this GPU cannot be used")
    facts = {"total_bytes": total_bytes, "free_bytes": free_bytes, "driver": driver, "cuda": torch.version.cuda}
    try:
        step_states(device)
    except Exception as error:  # Triton's compiler, ptxas and the driver have errors of their own
        cost = f"optimiser states stay in fp32 on it: {told(error)}"
        return Finding(name, "limited", found, cost, facts=facts)
    return Finding(name, "works", found, facts=facts)


def pinned_memory() -> Finding:
    """Tell how much memory may be locked, and pin a slab of the host tier where there is a GPU."""
    limit_bytes = locked_limit_bytes()
    limit = "no limit" if limit_bytes is None else format_bytes(limit_bytes)
    found, facts = f"limit (ulimit -l): {limit}", {"limit_bytes": limit_bytes}
    if not torch.cuda.is_available():
        return Finding("pinned memory", "works", f"{found}; there is no GPU to pin for", facts=facts)
    with _heard() as said:
        start = time.perf_counter()
        pages = Pages(SLAB_BYTES, torch.device("cuda", torch.cuda.current_device()))
        pages.close()
    found += f"; {format_bytes(SLAB_BYTES)} were pinned in {time.perf_counter() - start:.3f} s"
    return Finding("pinned memory", "limited" if said else "works", found, "; ".join(said), facts=facts)


def locked_limit_bytes() -> int | None:
    """Return how many bytes this process may lock in memory; None where there is no limit."""
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


# The disk tier


def disk(folder: str | None) -> Finding:
    """Write to the disk tier in a folder, and read back.

    Args:
        folder: in which tensors would wait; None for the folder for temporary files.

    Returns:
        The finding: limited where that frees no memory, or takes some for the page cache.
    """
    path, named = Path(folder or tempfile.gettempdir()).absolute(), folder is not None
    with _heard() as said:
        seconds, is_direct = _through_disk(path)
    space, in_memory = os.statvfs(path), is_in_memory(path)
    total_bytes, free_bytes = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    found = (
        f"{path}: {format_bytes(free_bytes)} free of {format_bytes(total_bytes)}, "
        f"{'in memory (tmpfs)' if in_memory else 'O_DIRECT' if is_direct else 'no O_DIRECT'}; "
        f"{format_bytes(TRIAL_BYTES)} were written and read back in {seconds:.3f} s"
    )
    facts = {"folder": str(path), "total_bytes": total_bytes, "free_bytes": free_bytes, "seconds": seconds}
    facts |= {"direct": is_direct, "in_memory": in_memory}
    if not (is_direct or in_memory):
        said.append("files go through the page cache, which takes memory, too")
    return Finding("disk tier", "limited" if said else "works", found, "; ".join(said), named, facts)


def _through_disk(folder: Path) -> tuple[float, bool]:
    """Put bytes on the disk and get them; return what that took, in seconds, and whether it was without page cache."""
    values = torch.randint(256, (TRIAL_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tier = DiskTier(device=torch.device("cpu"), folder=folder)
    try:
        start, stored = time.perf_counter(), tier.put(values.clone())
        tier.flush()
        read = stored.get()
        seconds = time.perf_counter() - start
        if not torch.equal(read, values):
            raise RuntimeError(f"{folder} gave back other bytes than were written; do not trust that disk")
        return seconds, tier.direct
    finally:
        tier.close()


# A plan


def planning() -> Finding:
    """Plan the training of a small model, train it for some steps, and compare its peak with the plan's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    model, batch = nn.Sequential(*blocks).to(device), torch.ones(512, 64, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    with _heard() as said:
        made = plan(model, batch, optimizer, budget="1GiB", loss=lambda output, _: output.square().mean())
        with apply(made, model, optimizer) as handle:
            for _ in range(3):
                optimizer.zero_grad()
                output = model(batch)  # held until the next one, as the plan takes it to be
                output.square().mean().backward()
                optimizer.step()
            assert handle.measurement is not None
            measured_bytes = handle.measurement.device_peak_bytes
    predicted_bytes = made.estimate.device_peak_bytes
    found = (
        f"a small model was planned and trained on {device}: predicted peak {format_bytes(predicted_bytes)}, "
        f"measured {format_bytes(measured_bytes)}"
    )
    facts = {"predicted_bytes": predicted_bytes, "measured_bytes": measured_bytes}
    return Finding("plan and run", "limited" if said else "works", found, "; ".join(said), essential=True, facts=facts)
