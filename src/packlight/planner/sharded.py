"""A profile of a whole model, as a rank sees the step that holds a share of it.

The step is traced as if the model were whole: a trace on fake tensors knows no other processes. What an engine gathers,
reduces and lets go is then put onto the line of events:

```
forward     | gathered unit u: from the event before its region begins until its end (or until backward) |
backward    | gathered unit u: from its first save until its last release | ahead of it, the next unit's |
            | whole gradients of u: from birth to the end of u's backward |
            | the buffer of the reduction of u: from there to the end of the next unit's backward        |
            | this rank's share of these gradients: from there on                                        |
```
A unit that is no block of the profile counts from the begin of forward to the end of backward.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from packlight.optim.shares import fragment_bytes, rows_bytes
from packlight.optim.state import STEP_BYTES
from packlight.sharding import Sharding, Share, Unit
from packlight.step import OptimizerCost, Profile, Region, Storage


def on_rank(step: Profile, sharding: Sharding, *, resident: Mapping[str, int] | None = None) -> Profile:
    """Return the profile of a step on the rank with the largest share.

    Args:
        step: of the whole model.
        sharding: what a rank holds.
        resident: bytes by category that were measured to live on this rank; None: as the sharding says.
    """
    lines = _Lines(step, sharding)
    held = dict(step.resident_bytes)
    if sharding.engine != "ddp":  # else they are as they were, with what an allocator adds to each
        held["parameters"] = sharding.parameter_bytes + sharding.master_bytes
    held["gradients"] = math.ceil(held.get("gradients", 0) * sharding.gradient_share) + sharding.kept_gradient_bytes
    held["other"] = held.get("other", 0) + sharding.buffer_bytes + sharding.persistent_bytes
    at_stage_3 = sharding.engine == "zero" and sharding.stage == 3
    return replace(
        step,
        saves=tuple(replace(save, encoding="") for save in step.saves) if at_stage_3 else step.saves,
        notes=(*step.notes, *[ONLY_RECOMPUTED] * at_stage_3),
        resident_bytes=held | dict(resident or {}),
        storages=(*lines.gradients(), *lines.gathered(), *lines.reduced()),
        optimizers=_optimizers(step, sharding),
    )


ONLY_RECOMPUTED = (
    "under ZeRO-3 blocks are recomputed or kept: DeepSpeed puts functions of its own in the place of layers', and what "
    "these save is not encoded or moved"
)


@dataclass(frozen=True)
class _Use:
    """A unit on the line: where it runs in forward, and in backward from `unpacked` to `end`."""

    unit: Unit
    start: int
    stop: int
    unpacked: int
    end: int


class _Lines:
    """Storages that cutting changes or adds."""

    def __init__(self, step: Profile, sharding: Sharding) -> None:
        self._step, self._sharding = step, sharding
        regions: dict[str, list[Region]] = {}
        for region in step.regions:
            regions.setdefault(region.block, []).append(region)
        self._uses = sorted(
            (use for unit in sharding.units for use in self._uses_of(unit, regions)), key=lambda use: -use.unpacked
        )  # in the order of backward

    def _uses_of(self, unit: Unit, regions: Mapping[str, Sequence[Region]]) -> list[_Use]:
        within = [
            region
            for block, found in regions.items()
            if unit.module and (block == unit.module or block.startswith((f"{unit.module}.", f"{unit.module}[")))
            for region in found
        ]
        if not within:
            return [_Use(unit, 0, self._step.forward_end, self._step.backward_start, self._step.num_events)]
        if all(region.block == unit.module for region in within):
            return [self._use(unit, [region]) for region in within]
        return [self._use(unit, within)]

    def _use(self, unit: Unit, regions: Sequence[Region]) -> _Use:
        start, stop = min(at.start for at in regions), max(at.end for at in regions)
        unpacked, end = min(at.unpacked for at in regions), max(at.released for at in regions)
        return _Use(unit, max(0, start - 1), stop, unpacked, min(end, self._step.num_events))

    def gradients(self) -> list[Storage]:
        """Return the profile's storages; gradients that a unit reduces end with it."""
        return [self._until_reduced(each) if each.is_gradient else each for each in self._step.storages]

    def _until_reduced(self, gradient: Storage) -> Storage:
        use = self._reducing(gradient)
        if use is not None:
            end = max(use.end, gradient.born + 1)
        elif self._sharding.gradient_share < 1:  # copied into a bucket at once
            end = gradient.born + 1
        else:
            return gradient
        return replace(gradient, died=min(gradient.died, end), is_gradient=False)

    def _reducing(self, storage: Storage) -> _Use | None:
        """Return the unit whose backward makes a gradient: the last that has begun, or what stands around all."""
        begun = [use for use in self._uses if use.unit.module and use.unpacked <= storage.born]
        if self._sharding.engine != "fsdp":
            return None
        inner = min(begun, key=lambda use: storage.born - use.unpacked, default=None)
        if inner is not None and storage.born <= self._last_birth(inner):
            return inner
        return next((use for use in self._uses if not use.unit.module), None)

    def _last_birth(self, use: _Use) -> int:
        """Return the last event at which a gradient can be this unit's: a few come when its saves are released."""
        following = [each.unpacked for each in self._uses if each.unpacked > use.unpacked and each.unit.module]
        return min([use.end + _AFTER, *following])

    def gathered(self) -> list[Storage]:
        """Return what is gathered, and buffers of the gathering."""
        made = []
        for use, following in itertools.zip_longest(self._uses, self._uses[1:]):
            unit, kept = use.unit, use.unit.is_kept or use.stop >= use.unpacked
            made.append(Storage(unit.gathered_bytes, use.start, use.end if kept else use.stop, "forward"))
            made.append(Storage(unit.extra_bytes, use.start, use.stop, "forward"))
            if not kept:
                made.append(Storage(unit.gathered_bytes, use.unpacked, use.end, "backward"))
            if following is not None and not following.unit.is_kept and following.unpacked > use.unpacked:
                made.append(Storage(following.unit.gathered_bytes, use.unpacked, following.unpacked, "backward"))
        return self._within(made)

    def reduced(self) -> list[Storage]:
        """Return the buffers of reductions, and this rank's shares of gradients."""
        made = []
        last, first = self._step.num_events, self._step.backward_start
        made.append(Storage(self._sharding.backward_bytes, first, last, "backward"))
        made.append(Storage(self._sharding.partition_bytes, self._first_reduced(), last, "backward", is_gradient=True))
        for use, following in itertools.zip_longest(self._uses, self._uses[1:]):
            stop = following.end if following is not None else last
            made.append(Storage(use.unit.gradient_bytes, use.end, max(stop, use.end + 1), "backward"))
        for storage in self._step.storages:
            if storage.is_gradient and (use := self._reducing(storage)) is not None:
                num_bytes = math.ceil(storage.num_bytes * self._sharding.gradient_share)
                born = min(max(use.end, storage.born + 1), self._step.num_events)
                made.append(replace(storage, num_bytes=num_bytes, born=born))
        return self._within(made)

    def _first_reduced(self) -> int:
        """Return the event at which the first bucket of gradients is full."""
        held = 0
        for storage in sorted((each for each in self._step.storages if each.is_gradient), key=lambda each: each.born):
            held += storage.num_bytes
            if held > self._sharding.bucket_bytes:
                return min(storage.born, self._step.num_events - 1)
        return self._step.num_events - 1

    def _within(self, made: Sequence[Storage]) -> list[Storage]:
        last = self._step.num_events
        ended = (replace(each, died=min(each.died, last)) for each in made if each.num_bytes)
        return [each for each in ended if each.died > each.born]


_AFTER = 64
"""Events after a block's last release in which gradients of its first layers may still come."""


def _optimizers(step: Profile, sharding: Sharding) -> tuple[OptimizerCost, ...]:
    """Return the state formats that a rank may have; where shares are in host memory, those that it has kernels for."""
    on_device = [cost for cost in step.optimizers if not cost.host_bytes]
    if not sharding.host_bytes:
        return tuple(_optimizer(cost, sharding) for cost in on_device)
    on_host = {cost.own_format: cost for cost in step.optimizers if cost.host_bytes}
    pairs = [(cost, on_host[cost.own_format]) for cost in on_device if cost.own_format in on_host]
    return tuple(_in_host_memory(cost, sharding, seconds=host.host_seconds + host.seconds) for cost, host in pairs)


def _in_host_memory(cost: OptimizerCost, sharding: Sharding, *, seconds: float) -> OptimizerCost:
    """Return what an optimiser costs that steps shares in host memory, with what all of it takes there."""
    return replace(
        cost,
        state_bytes=0,
        temporary_bytes=0,
        alone_bytes=0,
        seconds=0.0,
        host_bytes=sharding.host_bytes + state_bytes(cost, sharding),
        host_seconds=seconds * sharding.state_share,
    )


def _optimizer(cost: OptimizerCost, sharding: Sharding) -> OptimizerCost:
    """Return what an optimiser costs on a rank; its states are cut with what it steps, and lie beside it."""
    share = sharding.state_share
    stepped = share * sharding.widening  # it copies what it steps
    return replace(
        cost,
        state_bytes=state_bytes(cost, sharding),
        temporary_bytes=max(math.ceil(cost.temporary_bytes * stepped), sharding.step_bytes),
        seconds=cost.seconds * share,
        alone_bytes=math.ceil(cost.alone_bytes * stepped),
    )


def state_bytes(cost: OptimizerCost, sharding: Sharding) -> int:
    """Return the bytes of the rank that has most; torch keeps one state for a flat partition, packlight one a share."""
    if sharding.state_share == 1.0 and not sharding.num_flats:
        return cost.state_bytes
    formats, names = cost.formats, {share.name for shares in sharding.shares for share in shares if share.name}
    if cost.own_format == "as is" or not names.issubset(formats):
        return math.ceil(cost.state_bytes * sharding.state_share)
    if sharding.num_flats and set(formats.values()) == {"fp32"}:
        return STEP_BYTES * sharding.num_flats + 8 * max(sum(each.numel for each in own) for own in sharding.shares)
    if not sharding.num_flats and sharding.widening == 1.0 and set(formats.values()) == {"fp32"}:
        return max(_as_traced(cost, shares) for shares in sharding.shares)
    return max(sum(_share_bytes(share, formats) for share in shares) for shares in sharding.shares)


def _as_traced(cost: OptimizerCost, shares: Sequence[Share]) -> int:
    """Return the bytes of states that an optimiser makes itself: torch's are in the dtype of what it steps."""
    whole, here = sum(math.prod(share.shape) for share in shares), sum(share.numel for share in shares)
    for step_bytes in (0, STEP_BYTES * len(shares)):  # on the host, or each a tensor on the device
        if whole and (cost.state_bytes - step_bytes) % whole == 0:
            return step_bytes + (cost.state_bytes - step_bytes) // whole * here
    return math.ceil(cost.state_bytes * here / max(1, whole))


def _share_bytes(share: Share, formats: Mapping[str, str]) -> int:
    name = formats.get(share.name, "fp32")
    if share.is_fragment:
        return fragment_bytes(share.shape, share.numel, name)
    return rows_bytes(share.shape, share.local_shape, share.dtype, name)
