"""Offload, recomputation and codecs on a GPU, beside what others have: seconds, device peak, host bytes.

Two shapes: one whose offload takes less time than its compute, and one whose offload takes more. Which is which says

    k = (bytes out / bandwidth out + bytes in / bandwidth in) / seconds without offload

(Wan et al., "PipeOffload", arXiv 2503.01328): with k <= 1 all that is offloaded can hide behind compute, which here is
predicted half by half, a forward being a third of a step:

    seconds >= max(1/3 of those without, bytes / bandwidth out) + max(2/3, bytes / bandwidth in)

Each contender is timed in rounds with the plain step and then taken off, so that only one holds host memory. Before,
its loss and gradients are compared with the plain step's by `torch.equal`, with deterministic kernels on both sides.
"""

import contextlib
import functools
import gc
import importlib
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic; read once

import torch
from torch.autograd.graph import save_on_cpu
from torch.nn.attention import SDPBackend, sdpa_kernel

import packlight
from benchmarks.activations_steps import (
    Record,
    Work,
    checkpoint_blocks,
    claim,
    compared,
    gpt,
    interleaved,
    peak_bytes,
    relative_error,
    same,
    seconds,
    status_bytes,
)
from packlight.activations import Engine, make_tier
from packlight.activations.compress import CODECS
from packlight.activations.offload import Traffic
from packlight.demo.train_gpt import Shape

PLAIN = "plain"
PROBE_BYTES, PROBE_ROUNDS = 2**28, 9
#: In bfloat16. An H100 moves some 53 GB/s to the host and back, and multiplies at some 600 TFLOP/s: k is about .7 at a
#: width of 16,384 and 7 at 1,024.
SHAPES = {
    "k <= 1": (Shape(context=2048, width=16384, num_layers=2, num_heads=128), 1),
    "k > 1": (Shape(context=1024, width=1024, num_layers=12, num_heads=16), 16),
}
DRY_SHAPES = {"dry run": (Shape(context=64, width=64, num_layers=2, num_heads=2), 4)}
MOST_RATIO_HIDDEN = 1.05  # of packlight.offload where k <= 1


@dataclass(frozen=True)
class Contender:
    """Something that is done to a model's saved tensors.

    Attributes:
        name: in tables.
        start: changes a twin, and returns the work to do; what undoes it goes onto the stack.
        lossy: gradients differ.
    """

    name: str
    start: Callable[[Work, ExitStack], Work]
    lossy: bool = False


def gpu(*, rounds: int, device: str = "cuda") -> Record:
    """Measure every contender on each shape.

    Args:
        rounds: of each comparison.
        device: "cuda", or "cpu" for a dry run, with a disk in place of the host.

    Returns:
        The record.
    """
    bandwidths = _bandwidths(device)
    shapes = SHAPES if device == "cuda" else DRY_SHAPES
    groups = [_group(name, *each, rounds=rounds, device=device, bandwidths=bandwidths) for name, each in shapes.items()]
    claims = [each for group in groups for each in group.pop("claims")]
    return {"bandwidths": bandwidths, "groups": groups, "claims": claims}


def contenders(device: str) -> tuple[list[Contender], dict[str, str]]:
    """Return who can run here, and why the others cannot.

    Args:
        device: "cuda" or "cpu".

    Returns:
        Contenders, and reasons by name.
    """
    tier, pinned = ("host", True) if device == "cuda" else ("disk", False)
    saved = functools.partial(save_on_cpu, pin_memory=pinned)
    found = [
        Contender("packlight.offload", lambda work, stack: _offload(work, stack, tier)),
        Contender("packlight.offload, wide window", lambda work, stack: _offload(work, stack, tier, window=2)),
        Contender("torch save_on_cpu, pinned", lambda work, _: replace(work, around=saved)),
        Contender("packlight.recompute", _recompute),
        Contender("torch checkpoint", lambda work, _: _checkpoint(work)),
        # As transformers 5.23's activation_checkpointing_enable(offload=True) does for its own layers.
        Contender("torch checkpoint in save_on_cpu", lambda work, _: replace(_checkpoint(work), around=saved)),
        *(Contender(f"packlight.compress {name}", functools.partial(_compress, codec=name), True) for name in CODECS),
        Contender("packlight fp8 + offload", lambda work, stack: _compress_and_offload(work, stack, tier), True),
    ]
    absent = {}
    for module in ("torchtune.training", "trl.models.activation_offloading"):
        name = f"{module.partition('.')[0]} OffloadActivations"
        try:
            kind = importlib.import_module(module).OffloadActivations
        except Exception as error:  # a package may fail in any way; its words stand beside its name
            absent[name] = f"{type(error).__name__}: {error}"
        else:
            make = functools.partial(kind, use_pin_memory=pinned, use_streams=pinned)
            found.append(Contender(name, functools.partial(_around, make=make)))
    return found, absent


def _offload(work: Work, stack: ExitStack, tier: str, *, window: int = 0) -> Work:
    """Offload all, with the default window or with one for so many of the largest tensors."""
    room: dict[str, Any] = {}
    if window:
        width, itemsize = work.model.token.embedding_dim, work.model.token.weight.itemsize  # type: ignore[union-attr, operator]
        room = {"max_in_flight_bytes": window * work.inputs.numel() * 4 * width * itemsize}  # type: ignore[operator]
    return replace(work, tier=stack.enter_context(packlight.offload(work.model, tier=tier, **room)).tier)


def _recompute(work: Work, stack: ExitStack) -> Work:
    stack.enter_context(packlight.recompute(work.model))
    return work


def _checkpoint(work: Work) -> Work:
    checkpoint_blocks(work.model)
    return work


def _compress(work: Work, stack: ExitStack, *, codec: str) -> Work:
    stack.enter_context(packlight.compress(work.model, codec))
    return work


def _compress_and_offload(work: Work, stack: ExitStack, tier: str) -> Work:
    made = make_tier(tier, device=work.inputs.device)
    stack.enter_context(Engine(work.model, {"*": "compress+offload"}, codec="fp8", tier=made))
    return replace(work, tier=made)


def _around(work: Work, stack: ExitStack, *, make: Callable[[], AbstractContextManager[Any]]) -> Work:
    made = make()  # once for all steps, as both packages do
    return replace(work, around=lambda: made)


def _group(name: str, shape: Shape, batch: int, *, rounds: int, device: str, bandwidths: Record) -> Record:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain = gpt(shape, batch=batch, device=device, dtype=dtype)
    with _deterministic():
        exact = plain.results()
        repeatable = same(plain.results(), exact)
    rows, (able, absent) = [_row(PLAIN, plain, plain, rounds, device)], contenders(device)
    for contender in able:
        try:
            rows.append(_measured(contender, plain, exact, rounds=rounds, device=device))
        except Exception as error:  # as above; a contender may be out of memory, too
            absent[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        _free(device)
    for row in rows:
        row |= _predicted(row, rows[0]["seconds"], bandwidths)
    return {
        "group": name,
        "shape": vars(shape) | {"batch": batch},
        "dtype": str(dtype),
        "plain_step_is_repeatable": repeatable,
        "rows": rows,
        "absent": absent,
        "claims": list(_claims(name, rows)),
    }


def _measured(contender: Contender, plain: Work, exact: list[torch.Tensor], *, rounds: int, device: str) -> Record:
    with ExitStack() as stack:
        work = contender.start(plain.twin(), stack)
        with _deterministic():
            found = work.results()
        row = {"exact": same(found, exact), "gradient_error": relative_error(found[1:], exact[1:])}
        del found
        return _row(contender.name, work, plain, rounds, device) | row | {"lossy": contender.lossy}


def _row(name: str, work: Work, plain: Work, rounds: int, device: str) -> Record:
    before = status_bytes("VmRSS")
    if device == "cuda":
        torch.cuda.reset_peak_host_memory_stats()
    for _ in range(2):
        work.step()
    start = _traffic(work)
    work.model.zero_grad(set_to_none=True)
    row: Record = {"contender": name, "peak_bytes": peak_bytes(work.step, device)}
    if (end := _traffic(work)) is not None and start is not None:
        row |= {"bytes_out": end.bytes_out - start.bytes_out, "bytes_in": end.bytes_in - start.bytes_in}
        row["most_stored_bytes"] = end.most_stored_bytes
    row["resident_rise_bytes"] = status_bytes("VmRSS") - before
    if device == "cuda":
        row["pinned_by_torch"] = {
            key: value for key, value in torch.cuda.host_memory_stats().items() if key.startswith("allocated_bytes")
        }
    steps = {PLAIN: plain.step} if name == PLAIN else {PLAIN: plain.step, name: work.step}
    return row | compared(interleaved(steps, rounds=rounds, device=device), PLAIN)[-1]


def _traffic(work: Work) -> Traffic | None:
    if work.tier is None:
        return None
    work.tier.flush()
    if work.inputs.is_cuda:
        torch.cuda.synchronize()  # what comes back is counted when it is there
    return work.tier.traffic()


def _predicted(row: Record, plain_seconds: float, bandwidths: Record) -> Record:
    """Predict the seconds of what moves bytes, from the bytes that it moved."""
    if "bytes_out" not in row or "out_bytes_per_second" not in bandwidths:
        return {}
    out = row["bytes_out"] / bandwidths["out_bytes_per_second"]
    back = row["bytes_in"] / bandwidths["in_bytes_per_second"]
    floor = max(plain_seconds / 3, out) + max(plain_seconds * 2 / 3, back)
    return {"k": (out + back) / plain_seconds, "predicted_ratio": floor / plain_seconds}


def _claims(group: str, rows: list[Record]) -> Iterator[Record]:
    found = {row["contender"]: row for row in rows}
    for row in rows[1:]:
        if not row["lossy"]:
            text = f"{group}, {row['contender']}: loss and every gradient bit-equal"
            yield claim(text, float(row["exact"]), 1, at_least=True)
    ours = found.get("packlight.offload, wide window")
    if ours and ours.get("k", 2) <= 1:
        yield claim(f"{group}: packlight.offload, wide window / plain", ours["paired_ratio"], MOST_RATIO_HIDDEN)
    for name in ("torch save_on_cpu, pinned", "torchtune OffloadActivations", "trl OffloadActivations"):
        if ours and name in found:
            yield claim(f"{group}: packlight.offload, wide window / {name}", ours["ratio"] / found[name]["ratio"], 1.0)
            peaks = ours["peak_bytes"] / found[name]["peak_bytes"]
            yield claim(f"{group}: device peak, packlight.offload / {name}", peaks, 1.0)


def _bandwidths(device: str) -> Record:
    """Copy pinned memory to the GPU and back, and nothing else."""
    if device != "cuda":
        return {}
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    moves = {"out": functools.partial(host.copy_, there), "in": functools.partial(there.copy_, host)}
    spent = {name: [seconds(move, device) for _ in range(PROBE_ROUNDS)] for name, move in moves.items()}
    return {f"{name}_bytes_per_second": PROBE_BYTES / statistics.median(each) for name, each in spent.items()}


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # with warn_only flash attention would not be
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # cuDNN's is not, though it only warns of that
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()
