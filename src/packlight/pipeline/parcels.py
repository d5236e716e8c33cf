"""Parcels: what one microbatch holds in one stage leaves a device, and comes back, as a whole and when it is told to.

The engine moves each tensor when it is saved and fetches it when it is about to be used; a schedule says when a whole
chunk is away. Between the two stands a tier that begins to copy what it is given, so that the link is busy while the
forward still runs, and otherwise obeys: a tensor stays where it is until its parcel leaves, and is asked for when its
parcel is fetched, not when backward comes near it.

    F          put, and the copy out begins, into the parcel that is open
    OFFLOAD    Parcel.leave      the copies are waited for; nothing of the parcel is on the device then
    RELOAD     Parcel.fetch      the copies back begin; backward waits for them where it uses them
    RELEASE    Parcel.give_up    what autograd has not let go of by itself
"""

import weakref

import torch
from torch import Tensor

from packlight.activations.offload import Stored, Tier, Traffic
from packlight.activations.tier import Witness


class Held:
    """One tensor of a parcel.

    Args:
        flat: the tensor, 1-D.
        stored: where it goes; None where its parcel stays.
    """

    def __init__(self, flat: Tensor, stored: Stored | None) -> None:
        self.num_bytes = flat.nbytes
        self._tensor: Tensor | None = flat
        self._stored, self._witnesses = stored, [Witness(flat)]

    def get(self) -> Tensor:
        """Return it; it stays on the device as long as autograd has use for it.

        It is the same one each time, so what a backward writes to it is refused when it is wanted again.
        """
        if self._tensor is None:
            assert self._stored is not None
            self._tensor = self._stored.get()
            self._witnesses.append(Witness(self._tensor))
        for witness in self._witnesses:
            witness.check()
        return self._tensor

    def prefetch(self) -> bool:
        """Say that nothing more need be done: its parcel is fetched in time."""
        return True

    def leave(self) -> None:
        """Give the device's memory up when the copy has ended."""
        if self._stored is not None:
            self._stored.drain()
            self._tensor = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._stored is not None and self._tensor is None:
            self._stored.prefetch()

    def drain(self) -> None:
        """Leave it where it is; its parcel tells it when to go."""

    def free(self) -> None:
        """Give everything up."""
        self._tensor = None
        if self._stored is not None:
            self._stored.free()


class Parcel:
    """What a microbatch holds in a stage; autograd owns its tensors, and they go when it lets go of them.

    Args:
        moves: whether it is ever away.
    """

    def __init__(self, *, moves: bool) -> None:
        self.moves, self._held = moves, list[weakref.ref[Held]]()

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors that live."""
        return sum(held.num_bytes for held in self._living())

    def add(self, held: Held) -> None:
        """Note a tensor."""
        self._held.append(weakref.ref(held))

    def leave(self) -> None:
        """Give the device's memory up, when the copies have ended."""
        for held in self._living():
            held.leave()

    def fetch(self) -> None:
        """Begin to bring everything back."""
        for held in self._living():
            held.fetch()

    def give_up(self) -> None:
        """Give up what is left of it."""
        for held in self._living():
            held.free()
        self._held.clear()

    def _living(self) -> list[Held]:
        return [held for each in self._held if (held := each()) is not None]


class Parcels:
    """A tier that puts tensors into the parcel that is open.

    Args:
        inner: where they go; None where everything stays.
        device: where they live.
    """

    def __init__(self, inner: Tier | None, device: torch.device) -> None:
        self.name = "host" if inner is None else inner.name
        self.device = torch.empty(0, device=device).device  # with its index
        self._inner = inner
        self.open = Parcel(moves=False)

    def put(self, flat: Tensor) -> Held:
        """Begin to move a tensor out, if its parcel is to move."""
        moves = self.open.moves and self._inner is not None
        held = Held(flat, self._inner.put(flat) if moves and self._inner is not None else None)
        self.open.add(held)
        return held

    def flush(self) -> None:
        """Do nothing: parcels are told when to go."""

    def drain(self) -> None:
        """Do nothing: parcels are told when to go."""

    def close(self) -> None:
        """Leave the tier to whoever made it: several stages share it."""

    def traffic(self) -> Traffic:
        """Return what the tier moved."""
        return Traffic(0, 0, 0.0, 0.0, 0, 0) if self._inner is None else self._inner.traffic()
