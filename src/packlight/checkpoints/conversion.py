"""From one checkpoint to another: read, recode the optimiser's states, write, read again, compare.

    1 find out what the checkpoint is, by what is in it       4 write the whole, as the target's library does
    2 find the optimiser in it, names, shapes, formats        5 read it again, compare bit by bit
    3 recode each parameter's state into files (`scratch`)    6 rename it to its place

What is not the optimiser's states is passed on as it is. The largest tensor's fp32 form is the most that is in memory.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from packlight.checkpoints import output
from packlight.checkpoints.naming import named
from packlight.checkpoints.recode import Recoder
from packlight.checkpoints.refusal import CheckpointError, UnclearNames, refused
from packlight.checkpoints.results import Result
from packlight.checkpoints.scratch import SEGMENT_BYTES, Scratch
from packlight.checkpoints.sources import Source, model_in, read_model
from packlight.checkpoints.states import States, states_of
from packlight.checkpoints.targets import DCP, TARGETS, TORCH, UNIVERSAL, Target, optimizer_for
from packlight.checkpoints.tree import at, nbytes, replaced, tensors_in

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes:
        num_parameters: of the optimiser.
        num_tensors: of their states, as they are now.
        states_before_bytes: of the states' tensors that came.
        states_after_bytes: of those that were written.
        notes: what is not as it was, each a sentence.
    """

    num_parameters: int
    num_tensors: int
    states_before_bytes: int
    states_after_bytes: int
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    target: str,
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    tell: Tell = lambda done, total: None,
) -> Summary:
    """Write a checkpoint in another format; on an error or an interrupt there is nothing new on the disk, or all of it.

    Args:
        source: a file of torch.save with an optimiser's state dict in it, a folder of torch.distributed.checkpoint, or
            one of DeepSpeed's, universal or as its ranks wrote it.
        target: one of `TARGETS`.
        out: the file or folder to write.
        model: a file with the model's state dict, of torch.save or safetensors, where `source` has none.
        overwrite: whether what is at `out` is replaced, at the very end.
        tell: called after each parameter with how many are done, and of how many.

    Returns:
        What was done.

    Raises:
        CheckpointError: the checkpoint cannot be read, or not be represented as asked.
        OSError: a file cannot be read or written.
    """
    place, path = Path(source), Path(out)
    if target not in TARGETS:
        raise CheckpointError(f"target {target!r} came, one of {', '.join(TARGETS)} was wanted")
    came = Source.of(place)
    wanted = Target(target, _container(target, came))
    output.check_place(place, path, overwrite=overwrite)
    given = None if model is None else read_model(Path(model))
    with refused(str(place)), output.beside(path) as folder:
        folder.mkdir(mode=0o700)
        output.check_room(folder, 2 * came.nbytes() if came.kind != TORCH else 0)
        tree = came.read(folder)
        optimizer_path = came.optimizer_path(tree)
        found = states_of(at(tree, optimizer_path))
        weights = given if given is not None else model_in(tree, found)
        states = _named(found, weights, needed=given is not None)
        _check_room(folder, wanted, states, tree)
        recoder = Recoder(states.kind, Scratch(folder))
        optimizer = optimizer_for(wanted, states, recoder, tell)
        result = Result(wanted, replaced(tree, optimizer_path, optimizer), optimizer_path, states, weights or {})
        made = folder / "made"
        result.write(made, recoder.scratch)
        result.check(made, recoder.scratch)
        output.put(made, path)
    before, after = ([each for _, each in tensors_in(one["state"])] for one in (at(tree, optimizer_path), optimizer))
    came_bytes, made_bytes = (sum(each.nbytes for each in one) for one in (before, after))
    return Summary(len(states.parameters), len(after), came_bytes, made_bytes, _notes(wanted, recoder))


def _named(found: States, weights: Mapping[str, Tensor] | None, *, needed: bool) -> States:
    """Return states with the names that can be known; a target that wants them says so where they cannot."""
    try:
        return named(found, weights)
    except UnclearNames:
        if needed:
            raise
        return found


def _container(target: str, came: Source) -> str:
    if target in (TORCH, DCP, UNIVERSAL):
        return target
    if came.kind == TORCH or came.kind == DCP:
        return came.kind
    raise CheckpointError(
        f"{came.path} is DeepSpeed's, whose checkpoints hold fp32 moments, and --to {target} was asked for. Optimisers "
        "of packlight read universal checkpoints as they are (--to deepspeed-universal); or use --to torch, and then "
        f"--to {target} on the result."
    )


def _check_room(folder: Path, wanted: Target, states: States, tree: Any) -> None:
    states_bytes = sum(wanted.bytes_of(each, states.moments) for each in states.parameters)
    largest = max((math.prod(each.shape or ()) for each in states.parameters), default=0)
    output.check_room(folder, 2 * states_bytes + nbytes(tree) + 8 * largest + SEGMENT_BYTES)


def _notes(wanted: Target, recoder: Recoder) -> tuple[str, ...]:
    notes = []
    if wanted.name == DCP and recoder.num_rounded:
        notes.append(
            f"{recoder.num_rounded} states were rounded anew, because their rows are no whole blocks and are padded so "
            "that they can be cut"
        )
    if recoder.num_error_bits:
        notes.append(f"error bits of {recoder.num_error_bits} bf16 parameters have no place there and were left out")
    return tuple(notes)
