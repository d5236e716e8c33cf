"""The order of use: what backward is going to ask for next, learned from the step before.

Backward asks for saves in about the reverse order in which forward made them, but not quite, and not at all where
microbatches interleave. The idea: each site remembers which site was asked for after it. A first step that nobody has
told the order fetches nothing ahead: a wrong guess would hold bytes that nobody counted on.
"""

import weakref
from collections.abc import Sequence
from itertools import pairwise

from packlight.activations.groups import Group
from packlight.activations.sites import Site

# Enough to cover a layer; the tier's window, which is in bytes, ends it earlier.
MOST_AHEAD = 16


class Order:
    """Which site is asked for after which; shared by all forwards of an engine.

    Args:
        uses: names of sites in the order in which they will be asked for, as far as that is known.
    """

    def __init__(self, uses: Sequence[str] = ()) -> None:
        sites = [Site.named(name) for name in uses]
        self.after: dict[Site, Site] = dict(pairwise(sites))


class Forward:
    """The groups of one forward, as backward asks for them.

    Args:
        order: of the engine.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._groups: weakref.WeakValueDictionary[Site, Group] = weakref.WeakValueDictionary()
        self._used: Site | None = None

    def make(self, site: Site, group: Group) -> None:
        """Note that a group was made at a site."""
        self._groups[site] = group

    def use(self, site: Site) -> None:
        """Note that a group is asked for, and fetch what comes after it."""
        if site == self._used:
            return
        if self._used is not None:
            self._order.after[self._used] = site
        self._used = site
        for _ in range(MOST_AHEAD):
            if site not in self._order.after:
                return
            site = self._order.after[site]
            group = self._groups.get(site)
            if group is not None and not group.prefetch():
                return
