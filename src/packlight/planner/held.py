"""What a storage group costs in another form: its bytes meanwhile, and the bytes that come back in backward.

A group that is encoded or moved dies its natural death in forward, like a recomputed one. What stands for it lives from
its first save to the release of its last; and the storage itself is there again for as long as backward uses it:

    forward    ...  born | 1 packed: codes are born | natural death ...
    backward   ...  2 unpacked: the storage is back | used for the last time | ... 3 released: the codes die

Backward takes views of a group out one by one; those that overlap share one storage.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from packlight.activations.compress import encoded_bytes
from packlight.step import Profile, Save

Span = tuple[int, int, int]
"""Bytes, and the events between which they live."""


EXACT_CODEC = "mask"
"""How groups are encoded that lose nothing by it."""


@dataclass(frozen=True)
class Group:
    """The saves of one storage that one choice can be made for.

    Attributes:
        name: the site of the first save.
        storage: its index.
        saves: indices of all saves of the storage, in the order in which they are made.
        exact: whether encoding it loses nothing.
        can_encode: whether it may be encoded; if not, only moved.
    """

    name: str
    storage: int
    saves: tuple[int, ...]
    exact: bool
    can_encode: bool


@dataclass(frozen=True)
class Treatment:
    """What is done with a group instead of keeping it.

    Attributes:
        choice: "compress", "offload" or "compress+offload".
        codec: how it is encoded, where it is.
    """

    choice: str
    codec: str = ""

    @property
    def is_lossy(self) -> bool:
        """Whether what comes back is rounded."""
        return self.choice != "offload" and self.codec != EXACT_CODEC

    @property
    def is_moved(self) -> bool:
        """Whether it goes to a tier."""
        return "offload" in self.choice


def find_groups(profile: Profile) -> list[Group]:
    """Return the groups of a profile; a storage that is also saved outside of the model has none, for it is kept."""
    by_storage: dict[int, list[int]] = {}
    for index, save in enumerate(profile.saves):
        by_storage.setdefault(save.storage, []).append(index)
    groups = []
    for storage, indices in by_storage.items():
        saves = [profile.saves[index] for index in indices]
        if saves[0].encoding and all(save.site for save in saves):
            signs = saves[0].encoding == "sign"
            kind = saves[min(signs, len(saves) - 1)].encoding  # of the first save that is held as the storage itself
            exact = kind in ("mask", "sign") and not (signs and len(saves) > 1)
            groups.append(Group(saves[0].site, storage, tuple(indices), exact, can_encode=kind not in ("bytes", "")))
    shared = _shared_sites(profile, groups)
    return [group for group in groups if shared.isdisjoint(profile.saves[at].site for at in group.saves)]


def _shared_sites(profile: Profile, groups: Sequence[Group]) -> set[str]:
    """Return the sites at which several groups are saved: where the model runs twice in a step."""
    sites = Counter(site for group in groups for site in {profile.saves[at].site for at in group.saves})
    return {site for site, number in sites.items() if number > 1}


def has_sign(profile: Profile, group: Group) -> bool:
    """Tell whether a ReLU saves a group for its sign alone."""
    return any(profile.saves[index].encoding == "sign" for index in group.saves)


def spans(profile: Profile, group: Group, treatment: Treatment, gone: Collection[int]) -> list[Span]:
    """Return what lives on the device because of a group and its treatment.

    Args:
        profile: the step.
        group: one of its groups.
        treatment: what is done with it.
        gone: indices of saves that are recomputed.

    Returns:
        Bytes, each with the events between which they live.
    """
    saves = [profile.saves[index] for index in group.saves if index not in gone]
    if not saves:
        return []
    num_bytes = profile.storages[group.storage].num_bytes
    if treatment.choice == "offload":
        return [(num_bytes, start, end) for start, end in merged((save.unpacked, save.used) for save in saves)]
    found = [span for part, codec in _parts(saves, treatment.codec) for span in _code_spans(part, codec, treatment)]
    for part, _ in _parts(saves, treatment.codec):
        found += [(num_bytes, start, end) for start, end in merged((save.unpacked, save.used) for save in part)]
    return found


def _parts(saves: Sequence[Save], codec: str) -> list[tuple[list[Save], str]]:
    """Divide the saves by what they are held as: the sign of a ReLU stands beside the storage."""
    signs = [save for save in saves[:1] if save.encoding == "sign"]
    others = list(saves[len(signs) :])
    masks = bool(others) and others[0].encoding == "mask"
    return [part for part in ((signs, "mask"), (others, "mask" if masks else codec)) if part[0]]


def _code_spans(saves: Sequence[Save], codec: str, treatment: Treatment) -> list[Span]:
    if treatment.is_moved:  # `moving.py` follows the codes
        return []
    num_bytes = encoded_bytes(codec, saves[0].num_elements)
    born = max(0, saves[0].packed - 1)  # before anything else happens: what the function was given lives still
    return [(num_bytes, born, max(save.released for save in saves))]


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans of events that overlap."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
