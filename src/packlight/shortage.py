"""What to change where memory has run out: a few changes, ranked by the bytes that each would free.

torch's error tells how many bytes were asked for, and how many there were. What a user wants to know is which change
would have been enough. What lives, by category, tells that well enough to rank them: each change frees a known share of
one category, and that share is arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from packlight.budget import format_bytes

NUM_CHANGES = 3
"""So many are told."""

LOW_BIT_BYTES = 1.19
"""What `4bit` states of an element of a large matrix take at most; fp32 ones take 8. Source: `optim.state`."""


@dataclass(frozen=True)
class Shortage:
    """How things stood when memory ran out.

    Attributes:
        live: bytes by category (`records.CATEGORIES`).
        asked_bytes: what could not be had; None where that is not known.
        reserved_bytes: what the device's allocator holds; None where it counts nothing.
        budget_bytes: of the plan in force; None where there is none.
        is_low_bit: whether states are kept in few bits already, or may not be.
        num_elements: of the parameters that are stepped; None where that is not known, and states are taken as fp32.
    """

    live: Mapping[str, int]
    asked_bytes: int | None = None
    reserved_bytes: int | None = None
    budget_bytes: int | None = None
    is_low_bit: bool = False
    num_elements: int | None = None

    @property
    def live_bytes(self) -> int:
        """All that lives."""
        return sum(self.live.values())

    @property
    def unused_bytes(self) -> int:
        """What the allocator holds, and no tensor has."""
        return max(0, (self.reserved_bytes or 0) - self.live_bytes)


@dataclass(frozen=True)
class Change:
    """Something that a user can do, and what it would free; at most, where the text says so."""

    freed_bytes: int
    text: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.text}: {format_bytes(self.freed_bytes)}"


def changes(shortage: Shortage) -> list[Change]:
    """Return what would free most, the largest effect first.

    Args:
        shortage: how things stood.

    >>> live = {"parameters": 4 * 2**30, "optimizer_states": 8 * 2**30, "activations": 3 * 2**30}
    >>> for change in changes(Shortage(live, reserved_bytes=16 * 2**30)):
    ...     print(change)
    4-bit optimiser states (at most; lossy; packlight.AdamW, or a budget without --exact): 6.81 GiB
    recomputing what forward saves, as packlight run --budget 10.50GiB plans it (at most): 3.00 GiB
    half the rows of a batch, in twice as many microbatches: 1.50 GiB
    """
    live, states = shortage.live, shortage.live.get("optimizer_states", 0)
    saved = live.get("activations", 0)
    found = [Change(saved // 2, "half the rows of a batch, in twice as many microbatches")]
    if shortage.unused_bytes:
        text = "expandable segments (PYTORCH_ALLOC_CONF=expandable_segments:True), against what is reserved and unused"
        found.append(Change(shortage.unused_bytes, text))
    if not shortage.is_low_bit:
        text = "4-bit optimiser states (at most; lossy; packlight.AdamW, or a budget without --exact)"
        elements = states / 8 if shortage.num_elements is None else shortage.num_elements
        found.append(Change(round(states - LOW_BIT_BYTES * elements), text))
    found.append(_smaller_budget(shortage, saved))
    ranked = sorted((each for each in found if each.freed_bytes > 0), key=lambda each: -each.freed_bytes)
    return ranked[:NUM_CHANGES]


def _smaller_budget(shortage: Shortage, saved_bytes: int) -> Change:
    """Return a plan for less: what else is on the device takes its bytes, too."""
    if shortage.budget_bytes is None:
        wanted = 0.7 * shortage.live_bytes
        text = "recomputing what forward saves, as packlight run --budget {} plans it (at most)"
        return Change(saved_bytes, text.format(_as_option(wanted)))
    short = shortage.asked_bytes or round(0.1 * shortage.budget_bytes)
    held = min(shortage.live_bytes, shortage.budget_bytes)
    wanted = max(held - short, held // 2)
    return Change(held - wanted, f"a smaller budget, --budget {_as_option(wanted)}")


def _as_option(num_bytes: float) -> str:
    return format_bytes(num_bytes).replace(" ", "")
