"""Says what lived when memory ran out, where, and what would free most.

torch's error names the bytes that were asked for. By the time a user reads it, what held the others is gone. Here it is
looked at before the failed calls let go of anything: storage by storage in steps that are followed, and else by what
parameters, gradients and states take, beside the largest of the step that was followed and had the highest peak.
"""

import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from packlight.budget import format_bytes, parse_bytes
from packlight.memory import Held
from packlight.planner.cut import stepped_by
from packlight.planner.measure import StepWatch
from packlight.records import CATEGORIES, Plan
from packlight.shortage import Shortage, changes

NUM_LARGEST = 10
_BEGIN = "packlight: out of memory"
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMG]iB)?")


@dataclass(frozen=True)
class Exhausted:
    """How things stood when an allocation failed.

    Attributes:
        error: the allocator's.
        where: "forward", "backward", "the optimiser's step", or what else was going on.
        step: the number of the step, from 1.
        live: bytes by category.
        largest: the largest storages, the largest first.
        seen_in: the step at whose peak these lived; 0 where they did now.
        reserved_bytes: what a GPU's allocator held.
        num_elements: of the parameters that are stepped.
    """

    error: BaseException
    where: str
    step: int
    live: Mapping[str, int]
    largest: tuple[Held, ...] = ()
    seen_in: int = 0
    reserved_bytes: int | None = None
    num_elements: int | None = None

    @property
    def live_bytes(self) -> int:
        """All that lived."""
        return sum(self.live.values())

    @property
    def asked_bytes(self) -> int | None:
        """What was asked for; None where the error does not say."""
        found = _ASKED.search(str(self.error))
        return None if found is None else parse_bytes(f"{found[1]}{found[2] or ''}".removesuffix("bytes"))

    def told(self, plan: Plan | None, *, tried: str = "") -> str:
        """Say it, and what can be done.

        Args:
            plan: the plan in force.
            tried: what was tried before the error went up.

        Returns:
            Some lines: the moment, the categories, the largest storages, three changes.
        """
        asked, under = self.asked_bytes, "" if plan is None else f", under a plan for {format_bytes(plan.budget_bytes)}"
        wanted = "" if asked is None else f", where {format_bytes(asked)} were asked for"
        lines = [f"{_BEGIN} in {self.where} of step {self.step}{wanted}{under}"]
        lines[0] += f"; {tried}" if tried else ""
        live = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in self.live.items() if size)
        held = (
            "" if self.reserved_bytes is None else f"; the allocator had {format_bytes(self.reserved_bytes)} reserved"
        )
        lines.append(f"Live then: {live}{held}")
        if self.largest:
            lines.append(f"The largest{f', at the peak of step {self.seen_in}' if self.seen_in else ''}:")
            lines += [f"  {_line(each)}" for each in self.largest]
        lines.append("What would free most (what else is on the device has its bytes, too):")
        lines += [f"  {at}. {change}" for at, change in enumerate(changes(self._shortage(plan)), 1)]
        return "\n".join(lines)

    def _shortage(self, plan: Plan | None) -> Shortage:
        formats = set(plan.state_formats.values()) if plan is not None else set()
        return Shortage(
            self.live,
            asked_bytes=self.asked_bytes,
            reserved_bytes=self.reserved_bytes,
            budget_bytes=None if plan is None else plan.budget_bytes,
            is_low_bit=bool(plan is not None and (plan.exact or formats - {"fp32", "as is"})),
            num_elements=self.num_elements,
        )


def exhausted(error: BaseException, watch: StepWatch, *, where: str = "") -> Exhausted:
    """Look at what lives, as long as the error's frames hold it.

    Args:
        error: the allocator's.
        watch: what has followed the steps.
        where: what was going on; "": read off the error's frames.

    Returns:
        How things stand.
    """
    live, largest, seen_in = _living(watch)
    return Exhausted(
        error=error,
        where=where or _where(error),
        step=watch.num_steps + 1,
        live=live,
        largest=largest,
        seen_in=seen_in,
        reserved_bytes=torch.cuda.memory_reserved() if watch.line.device_type == "cuda" else None,
        num_elements=sum(each.numel() for each in stepped_by(watch.optimizers)),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is an allocator's, on CUDA or the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def tell_once(error: BaseException, watch: StepWatch, plan: Plan | None) -> None:
    """Add to an allocator's error how things stand, unless that was said when it came up; to others nothing."""
    said = any(note.startswith(_BEGIN) for note in getattr(error, "__notes__", ()))
    if not is_out_of_memory(error) or said:
        return
    try:
        error.add_note(exhausted(error, watch).told(plan))
    except Exception as other:  # the script's error is the one that its user has to see
        error.add_note(f"{_BEGIN}; what lived could not be looked at: {type(other).__name__}: {other}")


def _living(watch: StepWatch) -> tuple[dict[str, int], tuple[Held, ...], int]:
    """Return what lives by category, the largest, and the step in which these were seen (0: now)."""
    if not watch.is_measuring:
        memory = watch.lived.now()[1]
        largest = () if memory is None else tuple(memory.alive(memory.peak)[:NUM_LARGEST])
        return watch.live_bytes(), largest, 0 if memory is None else memory.step
    watch.lived.name_gradients()  # their names come with the optimiser's step, which may not have come
    watch.lived.name_states()
    line, live = watch.line, dict.fromkeys(CATEGORIES, 0)
    found = [entry for entry in line.entries if entry.died is None]
    for entry in found:
        live[line.category_of(entry)] += entry.num_bytes
    held = (
        Held(each.num_bytes, each.born, line.now(), line.category_of(each), each.site, each.code)
        for each in sorted(found, key=lambda entry: -entry.num_bytes)[:NUM_LARGEST]
    )
    return live, tuple(held), 0


def _line(held: Held) -> str:
    places = "  ".join(filter(None, [held.site, held.code]))
    return f"{format_bytes(held.num_bytes):>12}  {held.category.replace('_', ' ')}  {places}".rstrip()


def _where(error: BaseException) -> str:
    """Read off an error's frames what was going on."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "_engine_run_backward" for frame in frames):
        return "backward"
    if any("/optim/" in frame.filename for frame in frames):
        return "the optimiser's step"
    return "forward" if any(frame.name == "_call_impl" for frame in frames) else "the loop around the model"
