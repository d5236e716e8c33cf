"""Who is in an optimiser's param groups: the parameters that it was built with, or what has been put in their place.

Formats are decided when a parameter is added, and stand in its group. DeepSpeed's ZeRO then replaces all parameters of
a group by a flat partition; stage 3 even puts one sub-group after the other there, in every step. So the parameters are
remembered, and a tensor that is none of them is a flat partition of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from packlight.optim.flat import Flat, Origin, flat_layout, shape_of
from packlight.optim.layout import Layout, layout_of

Group = dict[str, Any]
NUMBER = "group_number"
"""Of a group: ZeRO steps them one by one, as if there were no others."""


class Member(NamedTuple):
    """A parameter in a group.

    Attributes:
        param: it, or a flat partition.
        lies: how its state lies.
        group: its group.
        place: among the parameters of all groups, also of those that are out of sight.
    """

    param: Tensor
    lies: Layout | Flat
    group: Group
    place: int


class Members:
    """The parameters of an optimiser's groups, and how their states lie."""

    def __init__(self) -> None:
        self._origins: list[list[Origin]] = []
        self._flats: dict[int, tuple[Tensor, Flat]] = {}

    def add(self, group: Group) -> None:
        """Note the parameters of a new group, and their formats; and in the group, which one it is."""
        pairs = zip(group["params"], group["state_formats"], strict=True)
        group[NUMBER] = len(self._origins)
        self._origins.append([Origin.of(param, state_format) for param, state_format in pairs])

    def placed(self, groups: Sequence[Group]) -> Iterator[Member]:
        """Yield the parameters that groups have now.

        Parameters that have taken the place of others of the same shapes, one by one, have their formats: FSDP2's.

        Raises:
            ValueError: a parameter came that is none of a group's, and no flat partition of them.
        """
        for group in groups:
            before = sum(map(len, self._origins[: group[NUMBER]]))
            for index, (param, lies) in enumerate(self.of_group(group), before):
                yield Member(param, lies, group, index)

    def of_group(self, group: Group) -> Iterator[tuple[Tensor, Layout | Flat]]:
        """Yield those of one group, and how their states lie."""
        origins = self._origins[group[NUMBER]]
        if [shape_of(param) for param in group["params"]] == [origin.shape for origin in origins]:
            for param, origin in zip(group["params"], origins, strict=True):
                yield param, layout_of(param, origin.state_format)
        else:
            for param in group["params"]:
                yield param, self._flat(param, origins)

    def _flat(self, flat: Tensor, origins: Sequence[Origin]) -> Flat:
        known = self._flats.get(id(flat))
        if known is None or known[0] is not flat:
            known = self._flats[id(flat)] = flat, flat_layout(flat, origins)
        return known[1]
