"""What a plan costs: the step's peak and its seconds, by arithmetic on the intervals of a `Profile`.

Running a step to learn its peak needs the memory that may not be there. Here a plan's line of live bytes is summed up
from intervals. A kept storage lives from its birth until autograd releases it; a recomputed one dies its natural
death in forward and is born again when its block's backward begins:

```
forward           ... | block b runs: births, natural deaths | ...
backward of b     1 the events of b up to its last save are replayed on top of what lives then
                  2 what b saves stays from then until each save is released
                  3 b's inputs live from forward until the last of these releases
```
This file adds up; what a technique allocates is written in the technique's own file.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch

from packlight.planner.held import Group, Span, Treatment, find_groups, merged, spans
from packlight.planner.moving import Moving, parts_bytes, simulate
from packlight.planner.replay import Replay, replay_of
from packlight.records import CATEGORIES
from packlight.step import OptimizerCost, Profile, Region, Save


@dataclass(frozen=True)
class Cost:
    """Peak bytes of a plan on the device, where and of what, and the seconds of a step.

    Attributes:
        at: the event at which the peak stands; `Profile.num_events` for the optimiser's step.
    """

    peak_bytes: int
    moment: str
    by_category: dict[str, int]
    seconds: float
    at: int


NUM_PEAKS = 8
"""So many peaks are looked at beside the highest."""


class StepCost:
    """Prices plans for one profile; built once, asked often."""

    def __init__(self, profile: Profile) -> None:
        """Prepare what does not depend on the plan."""
        self.profile = profile
        self._known_ends: dict[frozenset[str], torch.Tensor] = {}
        self.resident_bytes = sum(profile.resident_bytes.values())
        storages, saves = profile.storages, profile.saves
        self._sizes = torch.tensor([storage.num_bytes for storage in storages], dtype=torch.int64)
        self._born = torch.tensor([storage.born for storage in storages], dtype=torch.int64)
        self._died = torch.tensor([storage.died for storage in storages], dtype=torch.int64)
        self._is_gradient = torch.tensor([storage.is_gradient for storage in storages], dtype=torch.bool)
        self._goes_ahead = torch.tensor([at.phase in ("forward", "loss") for at in storages], dtype=torch.bool)
        self._saved = torch.tensor([save.storage for save in saves], dtype=torch.int64)
        self._released = torch.tensor([save.released for save in saves], dtype=torch.int64)
        self._save_regions = torch.tensor([save.region for save in saves], dtype=torch.int64)
        by_region: dict[int, list[Save]] = {}
        for save in saves:
            by_region.setdefault(save.region, []).append(save)
        replays = (replay_of(profile, region, by_region.get(at, [])) for at, region in enumerate(profile.regions))
        self.replays = [replay for replay in replays if replay.saved]
        self.blocks = list(dict.fromkeys(replay.region.block for replay in self.replays))
        self.groups = {group.name: group for group in find_groups(profile)}
        self.window_bytes = 0
        self._spans: list[Span] = []
        self._moving, self._staging_bytes = Moving(), 0
        self._lasting: torch.Tensor | None = None

    def through(self, window_bytes: int) -> Self:
        """Return prices for a tier's window of this size."""
        made = copy.copy(self)
        made.window_bytes = window_bytes
        return made

    def price(
        self,
        recomputed: Collection[str],
        optimizer: OptimizerCost | None,
        *,
        treated: Mapping[str, Treatment] | None = None,
    ) -> Cost:
        """Compute the peak and the time of a step.

        Args:
            recomputed: paths of the blocks that are recomputed.
            optimizer: the state format; None where there is no optimiser.
            treated: what is done with groups, by name; the others are kept.

        Returns:
            What the plan costs.
        """
        chosen = frozenset(recomputed)
        replays, ends, live = self._line(chosen, treated or {})
        at, replayed = int(live.argmax()), None
        peak_bytes = int(live[at])
        for replay in replays:
            with_replay = int(live[replay.before]) + replay.peak_bytes
            if with_replay > peak_bytes:
                at, peak_bytes, replayed = replay.before, with_replay, replay
        seconds = self.profile.seconds * self.profile.num_microbatches + sum(map(self.recompute_seconds, chosen))
        seconds += self.profile.hook_seconds if treated else 0.0
        seconds += sum(self.treatment_seconds(name, treatment) for name, treatment in (treated or {}).items())
        seconds += self._moving.waiting_seconds * self.profile.num_microbatches
        cost = Cost(peak_bytes, self._moment(at), self._by_category(at, ends, replays, replayed), seconds, at)
        return cost if optimizer is None else self._with_optimizer(cost, ends, optimizer)

    def _line(
        self, chosen: frozenset[str], treated: Mapping[str, Treatment]
    ) -> tuple[list[Replay], torch.Tensor, torch.Tensor]:
        """Return the second runs, where each storage of the first run ends, and the live bytes after each event."""
        replays = [replay for replay in self.replays if replay.region.block in chosen]
        ends = self._ends(chosen)
        self._spans, self._moving = [], self.moving(chosen, treated)
        self._staging_bytes = self.staging_bytes(treated)
        if treated:
            ends, gone = self.find_ends(chosen, treated), self.gone(chosen)
            for name, treatment in treated.items():
                self._spans += spans(self.profile, self.groups[name], treatment, gone)
            self._spans += self._moving.spans
        return replays, ends, self._live_bytes(ends, replays)

    def moving(self, recomputed: Collection[str], treated: Mapping[str, Treatment]) -> Moving:
        """Follow what moves to the tier and back."""
        if not any(treatment.is_moved for treatment in treated.values()):
            return Moving()
        gone = self.gone(recomputed)
        return simulate(self.profile, self.groups, treated, gone=gone, window_bytes=self.window_bytes)

    def staging_bytes(self, treated: Mapping[str, Treatment]) -> int:
        """Return what copies to the tier need for themselves on the device; a GPU's are in host memory."""
        moves = any(treatment.is_moved for treatment in treated.values())
        return self.profile.staging_bytes if moves else 0

    def gone(self, recomputed: Collection[str]) -> set[int]:
        """Return the saves that are made inside of recomputed blocks."""
        return {at for at, save in enumerate(self.profile.saves) if self.block_of(save) in recomputed}

    def treatable(self, recomputed: Collection[str]) -> list[Group]:
        """Return the groups that have nothing to do with recomputed blocks: no save inside, and no input of one."""
        return [group for group in self.groups.values() if self.blocks_of(group).isdisjoint(recomputed)]

    # What `program.py` writes rows from

    def blocks_of(self, group: Group) -> set[str]:
        """Return the blocks that save a group's storage, or take it as an input."""
        saving = (self.block_of(self.profile.saves[index]) for index in group.saves)
        taking = (region.block for region in self.profile.regions if group.storage in region.inputs)
        return {block for block in (*saving, *taking) if block is not None}

    def constant_bytes(self, event: int) -> int:
        """Return what lives at an event whatever is chosen for saves: nothing that lives only because of them."""
        alive = (self._born <= event) & (self._died > event)
        carried = self._carried(self._ends(frozenset())) if event < self.profile.forward_end else 0
        carried += self.profile.carried_bytes if event < self.profile.backward_start else 0
        return self.resident_bytes + carried + int(self._sizes[alive].sum())

    def alive_by_choice(self, event: int) -> list[int]:
        """Return the storages that may live at an event because of a save, or as the input of a recomputed block."""
        lasting = self._last_reasons()
        found = (self._born <= event) & (self._died <= event) & (lasting > event)
        indices: list[int] = found.nonzero().flatten().tolist()
        return indices

    def replay_bytes(self, replay: Replay, event: int) -> int:
        """Return what lives at an event because of a second run."""
        region = replay.region
        num_bytes = region.copied_bytes if region.start <= event < region.released else 0
        num_bytes += replay.peak_bytes if event == replay.before else 0
        again = self._saved_again(replay) if event >= region.unpacked else []
        return num_bytes + sum(size for size, used in again if used > event)

    def peaks(self, recomputed: Collection[str], treated: Mapping[str, Treatment], *, above_bytes: int) -> list[int]:
        """Return the events of the highest peaks above a number of bytes, the highest first."""
        replays, _, live = self._line(frozenset(recomputed), treated)
        for replay in replays:
            live[replay.before] += replay.peak_bytes
        end = torch.ones(1, dtype=torch.bool)
        rises, falls = torch.cat([end, live[1:] > live[:-1]]), torch.cat([live[:-1] >= live[1:], end])
        (events,) = torch.where(rises & falls & (live > above_bytes))
        order = live[events].argsort(descending=True, stable=True)[:NUM_PEAKS]
        highest: list[int] = events[order].tolist()
        return highest

    def _last_reasons(self) -> torch.Tensor:
        if self._lasting is None:
            self._lasting = self._ends(frozenset()).clone()
            for replay in self.replays:
                inputs = torch.tensor(replay.region.inputs, dtype=torch.int64)
                self._lasting[inputs] = self._lasting[inputs].clamp(min=replay.region.released)
        return self._lasting

    def held_bytes(self, block: str, *, at: int | None = None) -> int:
        """Return what lives only because a block's saves keep it: at an event, or in all."""
        kept, alone = self._ends(frozenset()), self._ends(frozenset((block,)))
        spared = alone < kept
        if at is not None:
            spared = spared & (alone <= at) & (kept > at)
        return int(self._sizes[spared].sum())

    def saving_blocks(self) -> list[str]:
        """Return the blocks whose recomputation spares bytes."""
        return [block for block in self.blocks if self.held_bytes(block) > 0]

    def recompute_seconds(self, block: str) -> float:
        """Return what recomputing a block adds to a step."""
        regions = (replay.region for replay in self.replays if replay.region.block == block)
        return sum(map(self.profile.second_run_seconds, regions)) * self.profile.num_microbatches

    def treatment_seconds(self, name: str, treatment: Treatment) -> float:
        """Return what a group adds to a step by itself; it comes back anew for each use that overlaps no other."""
        group, link = self.groups[name], self.profile.link
        num_elements = self.profile.saves[group.saves[0]].num_elements
        uses = merged((save.unpacked, save.used) for save in (self.profile.saves[at] for at in group.saves))
        times = (1 + len(uses)) / 2
        seconds = times * self.profile.engine.call_seconds
        if treatment.choice != "offload":
            seconds += times * num_elements * self.profile.engine.codec_seconds.get(treatment.codec, 0.0)
        if treatment.is_moved and link is not None:
            parts = parts_bytes(self.profile, group, treatment)
            each = sum(parts) * link.busy_seconds_per_byte + len(parts) * link.busy_seconds_per_copy
            seconds += 2 * times * each
        return seconds * self.profile.num_microbatches

    def group_bytes(self, name: str) -> int:
        """Return what a group holds for backward if it is kept."""
        return self.profile.storages[self.groups[name].storage].num_bytes

    def _ends(self, chosen: frozenset[str]) -> torch.Tensor:
        """Return the event at which each storage of the first run ends, int64 of shape (num_storages,)."""
        if chosen not in self._known_ends:
            self._known_ends[chosen] = self.find_ends(chosen)
        return self._known_ends[chosen]

    def block_of(self, save: Save) -> str | None:
        """Return the block that a save is made in; None outside of blocks."""
        return self.profile.regions[save.region].block if save.region >= 0 else None

    def find_ends(self, chosen: frozenset[str], treated: Collection[str] = ()) -> torch.Tensor:
        """Return likewise, where groups are treated, too."""
        ends = self._died.clone()
        regions = self.profile.regions
        for replay in self.replays:
            if replay.region.block in chosen and replay.region.drops_side_outputs:
                ends = self._without_side_outputs(ends, replay.region)
        gone = [at for at, region in enumerate(regions) if region.block in chosen]
        kept = ~torch.isin(self._save_regions, torch.tensor(gone, dtype=torch.int64))
        kept[[index for name in treated for index in self.groups[name].saves]] = False
        ends.scatter_reduce_(0, self._saved[kept], self._released[kept], "amax")
        for replay in self.replays:
            if replay.region.block in chosen:
                inputs = torch.tensor(replay.region.inputs, dtype=torch.int64)
                ends[inputs] = ends[inputs].clamp(min=replay.region.released)
        return ends

    def _without_side_outputs(self, ends: torch.Tensor, region: Region) -> torch.Tensor:
        side = (self._born >= region.start) & (self._born < region.end) & (ends > region.end)
        side[torch.tensor(region.outputs, dtype=torch.int64)] = False
        return torch.where(side, region.end, ends)

    def _live_bytes(self, ends: torch.Tensor, replays: list[Replay]) -> torch.Tensor:
        """Return the live bytes after each event, int64 of shape (num_events + 1,)."""
        num_events = self.profile.num_events
        change = torch.zeros(num_events + 1, dtype=torch.int64)
        change[0] += self.resident_bytes + self._staging_bytes
        change.index_add_(0, self._born, self._sizes)
        change.index_add_(0, ends, -self._sizes)
        held = [*self._spans, (self._carried(ends), 0, min(self.profile.forward_end, num_events))]
        held.append((self.profile.carried_bytes, 0, min(self.profile.backward_start, num_events)))
        for replay in replays:
            region = replay.region
            held.append((region.copied_bytes, region.start, region.released))
            held += [(num_bytes, region.unpacked, used) for num_bytes, used in self._saved_again(replay)]
        sizes, starts, stops = torch.tensor(held, dtype=torch.int64).unbind(1)
        change.index_add_(0, starts, sizes)
        change.index_add_(0, stops, -sizes)
        return change.cumsum(0)[:-1] if num_events else change.cumsum(0)

    def _saved_again(self, replay: Replay) -> list[tuple[int, int]]:
        """Return the bytes of what a second run saves, each with the event at which backward lets go of it."""
        made = [(self.profile.storages[index].num_bytes, used) for index, used in replay.saved.items()]
        return [*made, *replay.region.saved_copies]

    def _carried(self, ends: torch.Tensor) -> int:
        """Return the bytes of outputs that the loop still holds when the next step begins, until it makes new ones."""
        if not self.profile.carries_outputs:
            return 0
        return max(int(self._sizes[self._outliving(ends)].sum()), self.profile.carried_before_bytes)

    def carried_bytes(self, recomputed: Collection[str], treated: Mapping[str, Treatment]) -> int:
        """Return what of the model's outputs the loop takes along into the next step."""
        _, ends, _ = self._line(frozenset(recomputed), treated)
        return self._carried(ends)

    def _outliving(self, ends: torch.Tensor) -> torch.Tensor:
        return (ends >= self.profile.num_events) & ~self._is_gradient

    def _moment(self, at: int) -> str:
        return (
            "forward" if at < self.profile.forward_end else "loss" if at < self.profile.backward_start else "backward"
        )

    def _by_category(
        self, at: int, ends: torch.Tensor, replays: list[Replay], replayed: Replay | None
    ) -> dict[str, int]:
        """Divide the live bytes at an event; an activation is a storage that outlives the pass that made it."""
        divided = dict.fromkeys(CATEGORIES, 0) | dict(self.profile.resident_bytes)
        divided["other"] += self._staging_bytes
        crosses = self._goes_ahead & (ends > self.profile.backward_start)
        is_activation, is_temporary = crosses & ~self._is_gradient, ~(crosses | self._is_gradient)
        kinds = {"gradients": self._is_gradient, "activations": is_activation, "temporaries": is_temporary}
        is_alive = (self._born <= at) & (ends > at)
        for name, is_of_kind in kinds.items():
            divided[name] += int(self._sizes[is_alive & is_of_kind].sum())
        for replay in replays:
            if replay.region.start <= at < replay.region.released:
                divided["activations"] += replay.region.copied_bytes
            if replay.region.unpacked <= at:
                divided["activations"] += sum(num_bytes for num_bytes, used in self._saved_again(replay) if used > at)
        divided["activations"] += sum(num_bytes for num_bytes, start, end in self._spans if start <= at < end)
        divided["activations"] += replayed.peak_bytes if replayed else 0
        divided["other"] += self._carried(ends) if at < self.profile.forward_end else 0
        divided["other"] += self.profile.carried_bytes if at < self.profile.backward_start else 0
        return divided

    def _with_optimizer(self, cost: Cost, ends: torch.Tensor, optimizer: OptimizerCost) -> Cost:
        """Add the states, which live through the whole step, and hold the peak against the optimiser's own."""
        seconds = cost.seconds + self.profile.update_seconds(optimizer)
        states = {"optimizer_states": optimizer.state_bytes}
        num_events = self.profile.num_events
        gradients = int(self._sizes[self._is_gradient & (self._died >= num_events)].sum())
        held = int(self._sizes[self._outliving(ends)].sum())
        temporaries = max(optimizer.temporary_bytes, self.profile.after_backward_bytes)
        in_step = dict.fromkeys(CATEGORIES, 0) | dict(self.profile.resident_bytes) | states
        in_step["gradients"] += gradients
        in_step["other"] += self._staging_bytes
        in_step["activations"] += held + self.profile.carried_bytes
        in_step["temporaries"] += temporaries
        step_bytes = sum(in_step.values())
        if step_bytes > cost.peak_bytes + optimizer.state_bytes:
            return Cost(step_bytes, "optimizer", in_step, seconds, num_events)
        return Cost(cost.peak_bytes + optimizer.state_bytes, cost.moment, cost.by_category | states, seconds, cost.at)
