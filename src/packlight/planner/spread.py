"""Spreads what moves over equal blocks.

To the integer program a gigabyte that moves is the same wherever it is made, so it may move all groups of some layers
and recompute the next ones: copies queue up in the former and cease in the latter. The idea: what is done with one
block may be done with any equal one, so a plan's blocks are dealt out anew such that the bytes moved so far stay near
the line from nothing to all.

    moved by block    3 3 3 . . . . .    ->    . 3 . 3 . . 3 .

Whether that is faster, and whether it still fits, is judged as ever by `cost.py`.
"""

from collections.abc import Iterator, Mapping, Sequence

from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment
from packlight.planner.moving import moved_bytes

DEALS = ((0, 0.0), (0, 0.5), (2, 0.0))
"""Ways to deal out: how many of the last blocks stay as they are (their second runs come on top of everything that is
kept), and by which share of a block's mean the bytes run behind the line."""

Dealt = tuple[frozenset[str], dict[str, Treatment]]
"""Blocks to recompute, and what is done with groups."""


class Spread:
    """Deals plans out anew.

    Args:
        costs: of the profile.
    """

    def __init__(self, costs: StepCost) -> None:
        self._costs = costs
        self._groups: dict[str, list[str]] = {block: [] for block in costs.saving_blocks()}
        for name, group in costs.groups.items():
            block = costs.block_of(costs.profile.saves[group.saves[0]])
            if block in self._groups:
                self._groups[block].append(name)
        kinds: dict[object, list[str]] = {}
        for block in self._groups:
            kinds.setdefault(self._kind(block), []).append(block)
        self._kinds = [blocks for blocks in kinds.values() if len(blocks) > 1]

    def deals(self, recomputed: frozenset[str], treated: Mapping[str, Treatment]) -> Iterator[Dealt]:
        """Yield a plan's choices, dealt out in several ways; treatments that equal blocks cannot take are left out."""
        for num_fixed, behind in DEALS:
            made = dict(treated)
            again = set(recomputed)
            for blocks in self._kinds:
                dealt = blocks[: max(0, len(blocks) - num_fixed)]
                places = evenly([self._moved_bytes(block, treated) for block in dealt], behind=behind)
                again.difference_update(dealt)
                for name in (name for block in dealt for name in self._groups[block]):
                    made.pop(name, None)
                for block, like in zip(dealt, (dealt[place] for place in places), strict=True):
                    if like in recomputed:
                        again.add(block)
                    names = zip(self._groups[block], self._groups[like], strict=True)
                    made |= {name: treated[other] for name, other in names if other in treated}
            free = {group.name for group in self._costs.treatable(again)}
            yield frozenset(again), {name: treatment for name, treatment in made.items() if name in free}

    def _kind(self, block: str) -> object:
        """Return what equal blocks have in common."""
        costs = self._costs
        groups = [costs.groups[name] for name in self._groups[block]]
        saves = [tuple(costs.profile.saves[index] for index in at.saves) for at in groups]
        held = [(costs.group_bytes(at.name), at.exact, at.can_encode) for at in groups]
        kept = [tuple((save.num_elements, save.encoding) for save in each) for each in saves]
        return tuple(held), tuple(kept), sum(region.block == block for region in costs.profile.regions)

    def _moved_bytes(self, block: str, treated: Mapping[str, Treatment]) -> int:
        moved = [(name, treated[name]) for name in self._groups[block] if name in treated and treated[name].is_moved]
        return sum(moved_bytes(self._costs.profile, self._costs.groups[name], treatment) for name, treatment in moved)


def evenly(weights: Sequence[int], *, behind: float = 0.0) -> list[int]:
    """Order weights such that each sum of the first ones is near its share of the whole.

    Args:
        weights: numbers of which some differ.
        behind: the share of the mean weight by which the sums are to run behind.

    Returns:
        Their places; equal weights keep their order, and equal ones alone stay where they are.
    """
    left = list(range(len(weights)))
    mean = sum(weights) / max(1, len(weights))
    order, missing = list[int](), -behind * mean
    while left:
        missing += mean
        place = min(left, key=lambda at: (abs(weights[at] - missing), at))
        left.remove(place)
        missing -= weights[place]
        order.append(place)
    return order
