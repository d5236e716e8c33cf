"""Tells a plan's predicted step storage by storage: `cost.py`'s sums, with a name on each term.

`StepCost` asks how high a line is, thousands of times for one plan, and adds bytes up in tensors that know no names.
What a reader wants to see of the plan that was taken are the terms. They are written down here once, each by the rule
that `StepCost` counts it by, so that they add up to its peak and to its categories to the byte:

    storages of the first run   birth to end under the plan      second runs    their peak, and what they save again
    codes, copies, fetches      the spans that live meanwhile    beside         parameters, states, what the loop holds

What moves has seconds, too, which add up to the step's.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from packlight.lanes import Lanes, Stretch, joined
from packlight.memory import Held, Memory, Phase, condensed
from packlight.planner.cost import Cost, StepCost
from packlight.planner.held import Treatment, spans
from packlight.planner.moving import Stretched
from packlight.planner.replay import Replay
from packlight.step import OptimizerCost, Profile


def predicted(
    costs: StepCost,
    cost: Cost,
    *,
    recomputed: Collection[str],
    treated: Mapping[str, Treatment],
    optimizer: OptimizerCost | None,
) -> Memory:
    """Return what lives over a step under a plan.

    Args:
        costs: of the profile, for the window that the plan moves through.
        cost: what `costs` says that the plan costs.
        recomputed: blocks.
        treated: what is done with groups.
        optimizer: the state format; None where there is no optimiser.

    Returns:
        The record, whose peak is the cost's.
    """
    step, lives = costs.profile, _Lives(costs, frozenset(recomputed), treated)
    found = [*lives.first_run(), *lives.second_runs(), *lives.treated(), *lives.beside()]
    if optimizer is not None:
        found += lives.updating(optimizer)
    memory = condensed(found, num_events=lives.num_events, phases=_phases(step, optimizer), peak=cost.at)
    return replace(memory, lanes=_lanes(costs, frozenset(recomputed), treated, optimizer))


def _phases(step: Profile, optimizer: OptimizerCost | None) -> list[Phase]:
    """Return the parts of the line; the optimiser's step is one event at its end."""
    found = [
        Phase("forward", 0, step.forward_end),
        Phase("loss", step.forward_end, step.backward_start),
        Phase("backward", step.backward_start, step.num_events),
    ]
    return found if optimizer is None else [*found, Phase("optimizer", step.num_events, step.num_events + 1)]


def _lane(stretches: Iterable[Stretched]) -> tuple[Stretch, ...]:
    return joined([Stretch(*each) for each in stretches])


def _lanes(
    costs: StepCost, recomputed: frozenset[str], treated: Mapping[str, Treatment], optimizer: OptimizerCost | None
) -> Lanes | None:
    """Return when groups move; None where none does."""
    moving, step = costs.moving(recomputed, treated), costs.profile
    if not moving.out:
        return None
    unplaced_seconds = step.hook_seconds + sum(map(costs.recompute_seconds, recomputed))
    unplaced_seconds += sum(costs.treatment_seconds(name, treatment) for name, treatment in treated.items())
    return Lanes(
        out=_lane(moving.out),
        back=_lane(moving.back),
        waits_out=_lane(moving.waits_out),
        waits_back=_lane(moving.waits_back),
        forward_end=step.forward_seconds + moving.waiting_out_seconds,
        backward_end=step.seconds + moving.waiting_seconds,
        update_seconds=step.update_seconds(optimizer) if optimizer is not None else 0.0,
        unplaced_seconds=unplaced_seconds,
        num_microbatches=step.num_microbatches,
    )


class _Lives:
    """The terms of one plan's line."""

    def __init__(self, costs: StepCost, recomputed: frozenset[str], treated: Mapping[str, Treatment]) -> None:
        self._costs, self._recomputed, self._treated = costs, recomputed, treated
        self._step, self._last = costs.profile, costs.profile.num_events
        self.num_events = self._last + 1
        self._names = _names(self._step)

    def first_run(self) -> Iterator[Held]:
        """Yield what the step makes; of what outlives it only gradients are still called by their kind then."""
        ends = self._costs.find_ends(self._recomputed, self._treated).tolist()
        for at, (storage, end) in enumerate(zip(self._step.storages, ends, strict=True)):
            crosses = storage.phase in ("forward", "loss") and end > self._step.backward_start
            kind = "gradients" if storage.is_gradient else "activations" if crosses else "temporaries"
            name = self._names.get(at, ("", ""))
            lasts = end >= self._last and (not storage.is_gradient or storage.died >= self._last)
            is_one = lasts and kind != "temporaries"
            until = self.num_events if is_one else min(end, self._last)
            yield Held(storage.num_bytes, storage.born, until, kind, *name)
            if lasts and not is_one:
                yield Held(storage.num_bytes, self._last, self.num_events, "activations", *name)

    def second_runs(self) -> Iterator[Held]:
        """Yield what recomputed blocks make."""
        highest: dict[int, Replay] = {}
        for replay in self._costs.replays:
            region = replay.region
            if region.block not in self._recomputed:
                continue
            again = f"{region.block}, computed again"
            yield Held(region.copied_bytes, region.start, region.released, "activations", f"buffers of {region.block}")
            for index, used in replay.saved.items():
                site, code = self._names.get(index, ("", ""))
                num_bytes = self._step.storages[index].num_bytes
                yield Held(num_bytes, region.unpacked, used, "activations", f"{site or again}, again", code)
            for num_bytes, used in region.saved_copies:
                yield Held(num_bytes, region.unpacked, used, "activations", f"buffers of {region.block}")
            if replay.peak_bytes > (highest[replay.before].peak_bytes if replay.before in highest else 0):
                highest[replay.before] = replay
        for event, replay in highest.items():
            site = f"{replay.region.block}, computed again"
            yield Held(replay.peak_bytes, event, event + 1, "activations", site)

    def treated(self) -> Iterator[Held]:
        """Yield codes, what comes back of them, and what is on its way to a tier or from it."""
        gone = self._costs.gone(self._recomputed)
        for name, treatment in self._treated.items():
            group = self._costs.groups[name]
            _, code = self._names.get(group.storage, ("", ""))
            site = f"{name}, {treatment.codec or 'back from the tier'}"
            for num_bytes, start, end in spans(self._step, group, treatment, gone):
                yield Held(num_bytes, start, end, "activations", site, code)
        for num_bytes, start, end in self._costs.moving(self._recomputed, self._treated).spans:
            yield Held(num_bytes, start, end, "activations", "on its way to the tier or back")

    def beside(self) -> Iterator[Held]:
        """Yield what lives beside the step."""
        for category, num_bytes in self._step.resident_bytes.items():
            yield Held(num_bytes, 0, self.num_events, category, f"all {category} from before the step")
        staging_bytes = self._costs.staging_bytes(self._treated)
        yield Held(staging_bytes, 0, self.num_events, "other", "copies to the tier")
        carried_bytes = self._costs.carried_bytes(self._recomputed, self._treated)
        yield Held(carried_bytes, 0, self._step.forward_end, "other", "outputs of the step before")
        yield Held(self._step.carried_bytes, 0, self._step.backward_start, "other", "the loss of the step before")

    def updating(self, optimizer: OptimizerCost) -> list[Held]:
        """Return the states, and what their step allocates."""
        last, end = self._last, self.num_events
        temporary_bytes = max(optimizer.temporary_bytes, self._step.after_backward_bytes)
        return [
            Held(optimizer.state_bytes, 0, end, "optimizer_states", f"states as {optimizer.state_format}"),
            Held(self._step.carried_bytes, last, end, "activations", "the loss"),
            Held(temporary_bytes, last, end, "temporaries", "the optimiser's step"),
        ]


def _names(step: Profile) -> dict[int, tuple[str, str]]:
    """Return site and line of storages; where the model saves one, its site is the first save's."""
    found = {index: (place.site, place.code) for place in step.places for index in place.storages}
    for save in reversed(step.saves):
        if save.site:
            site = f"the model{save.site}" if save.site.startswith(":") else save.site
            found[save.storage] = (site, found.get(save.storage, ("", ""))[1])
    return found
