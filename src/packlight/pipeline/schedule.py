"""Pipeline schedules as plain lists of actions: what each rank does, in which order.

torch's schedules are classes that make their order inside, and have no offload. Here a schedule is data: one list for
each rank, made by a rule for how many forwards stay in flight (Wan et al., "PipeOffload", arXiv 2503.01328), checked
for any input, and followed in numbers (`simulate.py`).

Stage s of `num_ranks * num_chunks` lives on rank s % num_ranks. Letters are torch's: F is a forward, I the gradient of
its input, W that of its weights, B both at once.

    rank 0   F0 F1 F2 F3 | I0 W0 F4 | I1 W1 F5 | ...        a warm-up, then one forward for each backward

A rule says what is computed. Messages between ranks and copies to a tier are actions too, put between these where the
simulation says that they are due (`whole.py`):

    rank 1   RECV_F0 F0 SEND_F0 .. OFFLOAD0 ........ RELOAD0 .. RECV_B0 I0 SEND_B0 W0 RELEASE0
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

COMPUTE = ("F", "I", "W", "B")
"""Forward, gradient of the input, gradient of the weights, both gradients."""
COPIES = ("OFFLOAD", "RELOAD", "RELEASE")
"""What a microbatch holds in a stage is away on a tier from the first on; comes back; its place there is given up."""
MESSAGES = ("RECV_F", "SEND_F", "RECV_B", "SEND_B")
"""An activation from the stage before is awaited, one is sent to the stage after; the same for gradients, reversed."""


class ScheduleError(ValueError):
    """No schedule can be made of the input, or a schedule breaks a rule; the message says which, and what would do."""


class Action(NamedTuple):
    """One thing that a rank does: a letter of `COMPUTE` or a word of `COPIES`, for a stage and a microbatch."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        """Write it as torch does: stage, letter, microbatch."""
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """What each rank does in one step.

    Attributes:
        name: of the rule that made it.
        num_ranks, num_chunks, num_microbatches: its shape; a chunk is one of a rank's stages.
        orders: actions by rank.
    """

    name: str
    num_ranks: int
    num_chunks: int
    num_microbatches: int
    orders: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.num_ranks * self.num_chunks

    @property
    def is_whole(self) -> bool:
        """Whether it has its messages, or needs none; else it says what is computed, and nothing else."""
        return self.num_ranks == 1 or any(action.kind not in COMPUTE for order in self.orders for action in order)

    def computing(self, rank: int) -> list[Action]:
        """Return a rank's compute actions, in their order."""
        return [action for action in self.orders[rank] if action.kind in COMPUTE]


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Make 1F1B (Narayanan et al., arXiv 2006.09503): one stage a rank, `num_ranks - rank` forwards in flight."""
    check_positive(num_ranks, 1, num_microbatches)
    warm_ups = [num_ranks - rank for rank in range(num_ranks)]
    return _in_turn("1F1B", (num_ranks, 1, num_microbatches), 1, warm_ups, split=False)


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """Make interleaved 1F1B (Narayanan et al., arXiv 2104.04473), with groups as large as the ranks.

    Returns:
        The schedule.

    Raises:
        ScheduleError: a number below 1, or one of microbatches for which ranks would wait for each other.
    """
    check_positive(num_ranks, num_chunks, num_microbatches)
    ahead = num_ranks * (num_chunks - 1) + 1
    warm_ups = [ahead + 2 * (num_ranks - rank - 1) for rank in range(num_ranks)]

    def made(num: int) -> Schedule:
        return _in_turn("1F1B-I", (num_ranks, num_chunks, num), num_ranks, warm_ups, split=False)

    return made(num_microbatches) if num_microbatches % num_ranks == 0 else _or_nearest(made, num_microbatches)


def grouped(num_ranks: int, num_chunks: int, num_microbatches: int, *, group_size: int) -> Schedule:
    """Make the generalised interleaved schedule: the smaller the groups, the fewer forwards are in flight.

    Rank 0 has `group_size * (num_chunks - 1) + num_ranks` of them. With groups as large as the ranks this is GIS, with
    groups half as large GIS-H.

    Args:
        num_ranks: ranks.
        num_chunks: stages of each.
        num_microbatches: of a step; they are dealt out to groups as evenly as can be.
        group_size: ceil(num_ranks / 2) to num_ranks; a smaller group would be through before its first comes round.

    Returns:
        The schedule.

    Raises:
        ScheduleError: a group size out of range, a number below 1, or one of microbatches that leaves groups too small.
    """
    check_positive(num_ranks, num_chunks, num_microbatches)
    least = math.ceil(num_ranks / 2)
    if not least <= group_size <= num_ranks:
        raise ScheduleError(
            f"group_size={group_size} came; wanted {least} to {num_ranks} for {num_ranks} ranks; "
            f"the nearest is {min(max(group_size, least), num_ranks)}"
        )
    ahead = group_size * (num_chunks - 1)
    warm_ups = [ahead + num_ranks - rank for rank in range(num_ranks)]
    name = "GIS" if group_size == num_ranks else "GIS-H" if group_size == least else f"GIS-{group_size}"

    def made(num: int) -> Schedule:
        return _in_turn(name, (num_ranks, num_chunks, num), group_size, warm_ups, split=True)

    smallest = num_microbatches // math.ceil(num_microbatches / group_size)
    return made(num_microbatches) if smallest >= least else _or_nearest(made, num_microbatches)


def uniform(num_ranks: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """Make the schedule that repeats uniformly (PO): each microbatch goes the same way, one period after the last.

    A rank's three letters for each of its chunks fill a period. A forward takes one unit to the next rank and an
    input's gradient two to the one before, so that F, I and W follow each other on every rank; from chunk to chunk both
    wait for the next free place in the period. Chunk 0 is held longest, the last one shortest.

    Returns:
        The schedule.

    Raises:
        ScheduleError: a number below 1.
    """
    check_positive(num_ranks, num_chunks, num_microbatches)
    forwards = _laps(num_ranks, num_chunks)
    backwards = _laps(2 * num_ranks - 1, num_chunks)
    orders = []
    for rank in range(num_ranks):
        turn = forwards[-1] + num_ranks + 2 * (num_ranks - 1 - rank)
        timed: list[tuple[int, Action]] = []
        for at in range(num_microbatches):
            begin = 3 * num_chunks * at
            for chunk, forward in enumerate(forwards):
                stage, backward = chunk * num_ranks + rank, begin + turn + backwards[num_chunks - 1 - chunk]
                timed.append((begin + forward + rank, Action("F", stage, at)))
                timed.append((backward, Action("I", stage, at)))
                timed.append((backward + 1, Action("W", stage, at)))
        orders.append(tuple(action for _, action in sorted(timed)))
    return Schedule("PO", num_ranks, num_chunks, num_microbatches, tuple(orders))


def _laps(least: int, num_chunks: int) -> list[int]:
    """Return when a microbatch comes to each chunk: at least so much apart, and each in a place of the period its own.

    Places are 3 units wide, and there are as many as chunks. A step that shares a divisor with that number would come
    back to a place too early; then one place is left out.
    """
    step = math.ceil(least / 3)
    turn = num_chunks // math.gcd(num_chunks, step)
    return [3 * (step * chunk + chunk // turn) for chunk in range(num_chunks)]


def check_positive(num_ranks: int, num_chunks: int, num_microbatches: int) -> None:
    """Raise where a schedule's shape has a number below 1.

    Raises:
        ScheduleError: it has.
    """
    for name, number in (("ranks", num_ranks), ("chunks", num_chunks), ("microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"{number} {name} came; wanted 1 or more")


def _or_nearest(make: Callable[[int], Schedule], num_microbatches: int) -> Schedule:
    """Make a schedule; where its ranks would wait for each other, name the nearest numbers with which they do not."""
    made = make(num_microbatches)
    if not stuck(made):
        return made
    fewer = next((num for num in range(num_microbatches - 1, 0, -1) if not stuck(make(num))), None)
    more = next(num for num in range(num_microbatches + 1, 10 * num_microbatches) if not stuck(make(num)))
    nearest = " or ".join(str(num) for num in (fewer, more) if num is not None)
    raise ScheduleError(
        f"{made.name} with {made.num_ranks} ranks and {made.num_chunks} chunks cannot run {num_microbatches} "
        f"microbatches: they leave a group so small that ranks would wait for each other; the nearest is {nearest}"
    )


def _in_turn(
    name: str, shape: tuple[int, int, int], group_size: int, warm_ups: Sequence[int], *, split: bool
) -> Schedule:
    """Let each rank's forwards run ahead by its warm-up, then one backward for each forward."""
    num_ranks, num_chunks, num_microbatches = shape
    places = list(_places(num_chunks, num_microbatches, group_size))
    orders = []
    for rank, warm_up in enumerate(warm_ups):
        forwards = [Action("F", chunk * num_ranks + rank, at) for chunk, at in places]
        order = forwards[:warm_up]
        for number, (chunk, at) in enumerate(places):
            stage = (num_chunks - 1 - chunk) * num_ranks + rank
            order += [Action("I", stage, at), Action("W", stage, at)] if split else [Action("B", stage, at)]
            order += forwards[warm_up + number : warm_up + number + 1]
        orders.append(tuple(order))
    return Schedule(name, *shape, tuple(orders))


def _places(num_chunks: int, num_microbatches: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Yield chunk and microbatch in the order of forwards: a group through every chunk, then the next group."""
    num_groups = math.ceil(num_microbatches / group_size)
    start = 0
    for group in range(num_groups):
        size = num_microbatches // num_groups + (group < num_microbatches % num_groups)
        for chunk in range(num_chunks):
            for at in range(start, start + size):
                yield chunk, at
        start += size


def needs(action: Action, num_stages: int) -> Action | None:
    """Return the kind, stage and microbatch that an action of another stage has to be sent from; I stands for B too."""
    kind, stage, at = action
    if kind == "F":
        return Action("F", stage - 1, at) if stage else None
    if kind in ("I", "B"):
        return Action("I", stage + 1, at) if stage < num_stages - 1 else None
    return None


def stuck(schedule: Schedule) -> list[Action]:
    """Return the actions at which ranks wait for each other for ever; none where a schedule runs to its end."""
    done, at = set[Action](), [0] * schedule.num_ranks
    waiting: dict[Action, int] = {}
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        order = schedule.orders[rank]
        while at[rank] < len(order):
            action = order[at[rank]]
            needed = needs(action, schedule.num_stages)
            if needed is not None and needed not in done:
                waiting[needed] = rank
                break
            at[rank] += 1
            if action.kind in ("F", "I", "B"):
                told = Action("F" if action.kind == "F" else "I", action.stage, action.microbatch)
                done.add(told)
                if told in waiting and waiting[told] != rank:
                    ready.append(waiting.pop(told))
    return [order[done] for order, done in zip(schedule.orders, at, strict=True) if done < len(order)]


def check(schedule: Schedule) -> None:
    """Hold a schedule against the rules of every schedule.

    Each stage and microbatch has one F, then one B or one I and one W, on the rank that the stage lives on. OFFLOAD
    comes after F, RELOAD after OFFLOAD and before I or B, RELEASE after W or B, each once or none of them. The last
    stage's forwards are in the order of microbatches, as torch's losses are. No rank waits for ever. Messages have
    rules of their own (`whole.check_messages`).

    Raises:
        ScheduleError: a rule is broken; the message names the rank and the action.
    """
    for rank, order in enumerate(schedule.orders):
        places: dict[tuple[int, int], dict[str, int]] = {}
        for place, action in enumerate(order):
            seen = places.setdefault((action.stage, action.microbatch), {})
            is_here = action.stage % schedule.num_ranks == rank and 0 <= action.stage < schedule.num_stages
            if not is_here or action.kind not in (*COMPUTE, *COPIES, *MESSAGES) or action.kind in seen:
                raise ScheduleError(f"rank {rank} has {action}, which is unknown, twice there, or another rank's")
            seen[action.kind] = place
        for (stage, at), seen in places.items():
            if not _in_order(seen):
                raise ScheduleError(f"rank {rank} does {' '.join(seen)} for stage {stage}, microbatch {at}")
        last = [each.microbatch for each in order if (each.kind, each.stage) == ("F", schedule.num_stages - 1)]
        if last != sorted(last):
            raise ScheduleError(f"rank {rank} does the last stage's forwards in the order {last[:8]}; wanted 0, 1, ...")
        if len(places) != schedule.num_chunks * schedule.num_microbatches:
            raise ScheduleError(
                f"rank {rank} has {len(places)} of {schedule.num_chunks * schedule.num_microbatches} forwards"
            )
    refuse_waits(stuck(schedule))


def refuse_waits(actions: Sequence[Action]) -> None:
    """Raise where there are actions at which ranks wait for each other.

    Raises:
        ScheduleError: there are; the message names the first ones.
    """
    if actions:
        raise ScheduleError(f"ranks wait for each other for ever, at {', '.join(map(str, actions[:4]))}")


def _in_order(seen: Mapping[str, int]) -> bool:
    backward = ("B",) if "B" in seen else ("I", "W")
    moved = any(kind in seen for kind in COPIES)
    wanted = ("F", "OFFLOAD", "RELOAD", *backward, "RELEASE") if moved else ("F", *backward)
    if {kind for kind in seen if kind not in MESSAGES} != set(wanted):
        return False
    places = [seen[kind] for kind in wanted]
    around = ("RECV_F", "F", "SEND_F"), ("RECV_B", backward[0], "SEND_B")
    messages = [[seen[kind] for kind in kinds if kind in seen] for kinds in around]
    return all(each == sorted(each) for each in (places, *messages))
