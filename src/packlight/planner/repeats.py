"""Finds the blocks whose forward cannot be run again, so that nobody plans to recompute them.

`torch.utils.checkpoint` tells of such a block in backward, when the step is lost. Here forward and backward run once on
fake tensors with every block recomputed, as a rehearsal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from packlight.activations.blocks import find_blocks
from packlight.activations.recompute import recompute
from packlight.planner.answers import Answers
from packlight.planner.known_hardware import Hardware
from packlight.planner.loop import Call, Seen
from packlight.planner.tensors import flat_tensors
from packlight.planner.trace import Trace
from packlight.step import Profile


def without_unrepeatable(
    step: Profile, model: nn.Module, call: Call, *, hardware: Hardware | None, answers: Answers | None
) -> Profile:
    """Take blocks that cannot be run again out of a profile's choices: what they save is kept.

    Args:
        step: the profile.
        model: the module that it was made of.
        call: how it was called.
        hardware: the device that it was made for.
        answers: of a real forward, where there was one.

    Returns:
        The profile, with a note where there are such blocks.
    """
    blocks = list(dict.fromkeys(at.block for at in step.regions))
    return _without(step, unrepeatable(model, call, blocks, hardware=hardware, answers=answers))


def unrepeatable(
    model: nn.Module,
    call: Call,
    blocks: Sequence[str],
    *,
    hardware: Hardware | None = None,
    answers: Answers | None = None,
) -> dict[str, str]:
    """Return for each block that cannot be run again the reason, by its path; see `without_unrepeatable`."""
    rehearsal = _Rehearsal(model, call, hardware, answers)
    if not blocks or rehearsal.error(blocks) is None:
        return {}
    kinds: dict[type, list[str]] = {}
    modules = {block.path: model.get_submodule(block.module_path) for block in find_blocks(model)}
    for path in blocks:
        kinds.setdefault(type(modules[path]), []).append(path)
    errors = ((paths, rehearsal.error(paths)) for paths in kinds.values())
    return {path: error for paths, error in errors if error is not None for path in paths}


class _Rehearsal:
    """Runs blocks twice on fake tensors."""

    def __init__(self, model: nn.Module, call: Call, hardware: Hardware | None, answers: Answers | None) -> None:
        self._model, self._call, self._hardware, self._answers = model, call, hardware, answers

    def error(self, blocks: Sequence[str]) -> str | None:
        """Run forward and backward with some blocks recomputed; return what went wrong."""
        trace = Trace(self._model, None, Seen(), hardware=self._hardware, answers=self._answers)
        around = None
        if self._answers is not None:
            self._answers.begin()
            around = self._answers.around
        with torch.random.fork_rng(devices=[]), trace.active(), recompute(trace.model, blocks, around=around):
            fake = trace.fake_call(self._call)
            try:
                return _run(trace.model, fake, blocks)
            except Exception as error:
                return f"{type(error).__name__}: {str(error).splitlines()[0]}"


@torch.enable_grad()
def _run(model: nn.Module, call: Call, blocks: Sequence[str]) -> str | None:
    before = _attributes(model, blocks)
    with call.autocasting():
        output = model(*call.args, **call.kwargs)
    changed = [key for key, value in _attributes(model, blocks).items() if before.get(key) != value]
    if changed:
        return f"its forward changes the attribute {changed[0][1]!r}"
    sum(at.sum() for at in flat_tensors(output) if at.requires_grad).backward()  # type: ignore[union-attr]
    return None


def _attributes(model: nn.Module, blocks: Sequence[str]) -> dict[tuple[int, str], Any]:
    """Return what tells whether plain attributes inside blocks have changed; a second run would change them again."""
    own = vars(nn.Module())
    paths = {block.path: block.module_path for block in find_blocks(model)}
    owners = {id(owner): owner for path in blocks for owner in model.get_submodule(paths[path]).modules()}
    plain = (int, float, str, type(None))
    return {
        (key, name): value if isinstance(value, plain) else (id(value), len(value) if hasattr(value, "__len__") else 0)
        for key, owner in owners.items()
        for name, value in vars(owner).items()
        if name not in own and not isinstance(value, torch.Tensor | nn.Module)
    }


def _without(step: Profile, reasons: Mapping[str, str]) -> Profile:
    """Take blocks out of a profile's choices: what they save is kept."""
    if not reasons:
        return step
    kept = [at for at, region in enumerate(step.regions) if region.block not in reasons]
    places = {at: place for place, at in enumerate(kept)}
    path, reason = next(iter(reasons.items()))
    return replace(
        step,
        regions=tuple(step.regions[at] for at in kept),
        saves=tuple(replace(save, region=places.get(save.region, -1)) for save in step.saves),
        notes=(*step.notes, f"{len(reasons)} blocks ({path}, ...) cannot be recomputed: {reason}"),
    )
