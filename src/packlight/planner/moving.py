"""What moves to a tier and back in a step: which bytes are on the device meanwhile, and how long compute waits.

A tier copies while compute goes on, so what a move costs depends on all others. The engine keeps what is under way
within a window of bytes; here the same rules run on the events and the predicted seconds of a `Profile`:

    forward    1 put: waits until all that is under way, this group included, fits the window; a source lives until then
                 (codes and scales are put one after the other)
               2 the end of forward waits until everything has been moved
    backward   3 use: those that are used next are fetched ahead as far as the window has room, and live from then on
               4 compute waits for a group that is not back yet

Both queues are first in, first out. Bytes at an event do not depend on how fast the link is: at step 1 a source lives
until the window needs its room (a disk tier that is steady keeps to that; others may let go earlier), at step 3 a group
lives from the moment it is asked for. Seconds do depend on it.
"""

import functools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from packlight.activations.compress import encoded_parts
from packlight.activations.prefetch import MOST_AHEAD
from packlight.planner.held import Group, Span, Treatment, merged
from packlight.step import Link, Profile, Save

ONE_AT_A_TIME = 1
"""A window in bytes that every group fills."""


@dataclass(frozen=True)
class Move:
    """A group that moves, and the save that sends it there.

    Attributes:
        name: the group's.
        parts_bytes: of each tensor that the tier gets for it.
        is_encoded: whether these are codes.
        site: the first save's.
        first: that save.
        source_end: the event at which what moves would be gone, if its way out took no time.
    """

    name: str
    parts_bytes: tuple[int, ...]
    is_encoded: bool
    site: str
    first: Save
    source_end: int

    @functools.cached_property
    def num_bytes(self) -> int:
        """All that lies on the tier."""
        return sum(self.parts_bytes)


@dataclass(frozen=True)
class Use:
    """One save that backward asks for, of a group that moves or is encoded."""

    group: str
    save: Save
    back_until: int
    """The event until which the group, once back, stays for this save and for those that overlap it."""


class Stretched(NamedTuple):
    """A `Stretch` while plans are searched, where hundreds of thousands of them are made."""

    group: str
    num_bytes: int
    start: float
    end: float


@dataclass
class Moving:
    """What moves cost.

    Attributes:
        spans: bytes that live on the device because of them, each with its first and its last event.
        waiting_out_seconds: time that compute waits in forward.
        waiting_back_seconds: and in backward.
        stored_bytes: what lies on the tier at most.
        out, back: each copy, in the order of its queue; codes and scales go out one by one.
        waits_out, waits_back: each time that compute waits in forward, and in backward.
    """

    spans: list[Span] = field(default_factory=list)
    waiting_out_seconds: float = 0.0
    waiting_back_seconds: float = 0.0
    stored_bytes: int = 0
    out: list[Stretched] = field(default_factory=list)
    back: list[Stretched] = field(default_factory=list)
    waits_out: list[Stretched] = field(default_factory=list)
    waits_back: list[Stretched] = field(default_factory=list)

    @property
    def waiting_seconds(self) -> float:
        """Time that compute waits in forward and backward."""
        return self.waiting_out_seconds + self.waiting_back_seconds

    def slowness(self, profile: Profile) -> tuple[float, float]:
        """Return how many times slower than the link copies were out and back, where compute waited for them."""
        link = profile.link
        if link is None or not self.stored_bytes:
            return 1.0, 1.0
        forward = profile.forward_seconds
        out = (forward + self.waiting_out_seconds) * link.out_bytes_per_second / self.stored_bytes
        back = (profile.seconds - forward + self.waiting_back_seconds) * link.in_bytes_per_second / self.stored_bytes
        return max(1.0, out if self.waiting_out_seconds else 0), max(1.0, back if self.waiting_back_seconds else 0)


def simulate(
    profile: Profile,
    groups: Mapping[str, Group],
    treated: Mapping[str, Treatment],
    *,
    gone: Collection[int],
    window_bytes: int,
) -> Moving:
    """Follow all moves of one forward and backward.

    Args:
        profile: the step; its `link` is the way that groups take.
        groups: by name.
        treated: what is done with groups.
        gone: indices of saves that are recomputed.
        window_bytes: most that is under way in either direction; a larger group goes alone.

    Returns:
        What it costs.
    """
    link, made = profile.link, Moving()
    moves = [_move(profile, groups[name], treatment, gone) for name, treatment in treated.items() if treatment.is_moved]
    if link is None or not moves:
        return made
    moves.sort(key=lambda move: move.first.packed)
    made.stored_bytes = sum(move.num_bytes for move in moves)
    _go_out(profile, moves, made, link=link, window_bytes=window_bytes)
    uses = _uses(profile, groups, treated, gone)
    _come_back(uses, {move.name: move for move in moves}, made, link=link, window_bytes=window_bytes)
    return made


def order_of_use(profile: Profile, groups: Mapping[str, Group], treated: Mapping[str, Treatment]) -> tuple[str, ...]:
    """Return the sites of treated groups in the order in which backward asks for them."""
    return tuple(use.save.site for use in _uses(profile, groups, treated, ()))


def moved_bytes(profile: Profile, group: Group, treatment: Treatment) -> int:
    """Return what a group takes on the tier."""
    return sum(parts_bytes(profile, group, treatment))


def parts_bytes(profile: Profile, group: Group, treatment: Treatment) -> tuple[int, ...]:
    """Return the same for each tensor that the tier gets."""
    if treatment.choice == "offload":
        return (profile.storages[group.storage].num_bytes,)
    return encoded_parts(treatment.codec, profile.saves[group.saves[0]].num_elements)


def _move(profile: Profile, group: Group, treatment: Treatment, gone: Collection[int]) -> Move:
    first = profile.saves[next(index for index in group.saves if index not in gone)]
    is_encoded = treatment.choice != "offload"
    return Move(
        name=group.name,
        parts_bytes=parts_bytes(profile, group, treatment),
        is_encoded=is_encoded,
        site=first.site,
        first=first,
        source_end=max(0, first.packed - 1) if is_encoded else profile.storages[group.storage].died,
    )


def _go_out(profile: Profile, moves: Sequence[Move], made: Moving, *, link: Link, window_bytes: int) -> None:
    """Steps 1 and 2."""
    under_way: deque[tuple[float, Move, int]] = deque()
    under_way_bytes, finished, late = 0, 0.0, 0.0
    for move, part_bytes in [(each, size) for each in moves for size in each.parts_bytes]:
        now = move.first.packed_seconds + late
        while under_way and under_way_bytes + part_bytes > window_bytes:
            arrived, other, other_bytes = under_way.popleft()
            under_way_bytes -= other_bytes
            if now < arrived:
                made.waits_out.append(Stretched(other.name, 0, now, arrived))
                now = arrived
            _live_until(other, other_bytes, move.first.packed, made)
        late = now - move.first.packed_seconds
        began = max(now, finished)
        finished = began + part_bytes / link.out_bytes_per_second
        made.out.append(Stretched(move.name, part_bytes, began, finished))
        under_way.append((finished, move, part_bytes))
        under_way_bytes += part_bytes
    for _, other, other_bytes in under_way:
        _live_until(other, other_bytes, profile.forward_end, made)
    if (forward_end := profile.forward_seconds + late) < finished:
        made.waits_out.append(Stretched(moves[-1].name, 0, forward_end, finished))
    made.waiting_out_seconds = max(late, finished - profile.forward_seconds)


def _live_until(move: Move, num_bytes: int, event: int, made: Moving) -> None:
    if move.source_end < event:
        made.spans.append((num_bytes, move.source_end, event))


def _uses(
    profile: Profile, groups: Mapping[str, Group], treated: Mapping[str, Treatment], gone: Collection[int]
) -> list[Use]:
    """Return what backward asks for, in its order."""
    found = []
    for name in treated:
        saves = [profile.saves[index] for index in groups[name].saves if index not in gone]
        ends = merged((save.unpacked, save.used) for save in saves)
        for save in saves:
            back_until = next(end for start, end in ends if start <= save.unpacked <= end)
            found.append(Use(name, save, back_until))
    return sorted(found, key=lambda use: use.save.unpacked)


class _Reader:
    """The way back: one queue, and a window for what is fetched ahead of its use; it knows no waits of forward."""

    def __init__(self, link: Link, window_bytes: int, made: Moving) -> None:
        self._link, self._window_bytes, self._made = link, window_bytes, made
        self._ahead: dict[str, tuple[int, float]] = {}
        self._partly: dict[str, int] = {}  # codes or scales alone may have found room, from this event on
        self._ahead_bytes, self._finished = 0, 0.0

    def fetch_ahead(self, move: Move, event: int, now: float) -> bool:
        """Begin to read, unless that was done; False where the window is full."""
        if move.name not in self._ahead:
            if self._ahead_bytes + move.num_bytes > self._window_bytes:
                if move.is_encoded:
                    self._partly.setdefault(move.name, event)
                return False
            self._ahead[move.name] = event, self._read(move, now)
            self._ahead_bytes += move.num_bytes
        return True

    def take(self, move: Move, event: int, now: float) -> float:
        """Wait for a group; return how long."""
        if move.name in self._ahead:
            began, finished = self._ahead.pop(move.name)
            self._ahead_bytes -= move.num_bytes
        else:
            began, finished = event, self._read(move, now)
        began = min(began, self._partly.pop(move.name, began))
        end = event + 1 if move.is_encoded else event  # codes live until the tensor is decoded
        if began < end:
            self._made.spans.append((move.num_bytes, began, end))
        if now < finished:
            late = self._made.waiting_out_seconds
            self._made.waits_back.append(Stretched(move.name, 0, late + now, late + finished))
        return max(0.0, finished - now)

    def _read(self, move: Move, now: float) -> float:
        began, late = max(now, self._finished), self._made.waiting_out_seconds
        self._finished = began + move.num_bytes / self._link.in_bytes_per_second
        self._made.back.append(Stretched(move.name, move.num_bytes, late + began, late + self._finished))
        return self._finished


def _come_back(uses: Sequence[Use], moves: Mapping[str, Move], made: Moving, *, link: Link, window_bytes: int) -> None:
    """Steps 3 and 4."""
    reader, late, site = _Reader(link, window_bytes, made), 0.0, ""
    back_until = dict.fromkeys(moves, -1)
    for at, use in enumerate(uses):
        event, now = use.save.unpacked, use.save.unpacked_seconds + late
        following = uses[at + 1 : at + 1 + MOST_AHEAD] if use.save.site != site else ()
        site = use.save.site
        for other in following:
            move = moves.get(other.group)
            if move is None or move.site != other.save.site or back_until[other.group] > event:
                continue
            if not reader.fetch_ahead(move, event, now):
                break
        if use.group in moves and back_until[use.group] <= event:
            waiting = reader.take(moves[use.group], event, now)
            late += waiting
            made.waiting_back_seconds += waiting
            back_until[use.group] = use.back_until
