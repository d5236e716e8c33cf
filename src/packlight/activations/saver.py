"""What is done with each tensor that one forward saves.

A tensor that the engine takes becomes a view of a storage group; one that it leaves is kept as an alias, or goes to the
hooks below. What is left and taken at the same time would be held twice, so the first save of a storage decides for
all. The sign of a ReLU is held beside its storage; where that turns out to be kept, the site is left alone after.

What a function saves that compares it with its result may not be rounded (`compress`), but has no name yet when it is
saved. In autograd's generated code, and mostly elsewhere, the order is

    1 inputs are saved, and encoded as any tensor       2 the function runs, while the caller holds its inputs
    3 its result is saved: that names the function, and its node has what step 1 returned
    4 groups in there become aliases of the originals, which still live; their sites are left alone after

The inputs of a recomputed block are not rounded either, nor does what was encoded before stay so when they are.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from packlight.activations.compress import Compared, Encoded, encoded, sign_of_relu, views_of
from packlight.activations.devices import TierByDevice
from packlight.activations.groups import Group, Held, SavedElsewhere, SavedParts, SavedView, flat_of, keep, unpack
from packlight.activations.offload import Tier
from packlight.activations.prefetch import Forward
from packlight.activations.resident import Resident, is_dense, is_plain, parts_of
from packlight.activations.sites import INPUTS, CallStack, Rules, Site
from packlight.numerics.group_operators import MASK

# A view of a small part of a storage is no reason to move or encode the whole.
LEAST_SHARE = 1 / 16

_Key = tuple[int, int, torch.dtype]
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Source(NamedTuple):
    """What a group of codes was made of.

    Attributes:
        codes: what it holds.
        site: where its first save is.
        original: the tensor; it lives at least as long as the function that saves it runs.
    """

    codes: Encoded
    site: Site
    original: "weakref.ref[Tensor]"


class Saver:
    """One forward of the model: which modules are running, and which groups it made.

    Args:
        rules: the choice for each site.
        resident: what lives on anyway.
        forward: notes the order of use.
        codec: how tensors are compressed.
        tier: where offloaded tensors go.
        min_bytes: smaller storages are kept.
        useless: sites where taking a tensor saved nothing, in all forwards.
    """

    def __init__(
        self,
        rules: Rules,
        resident: Resident,
        forward: Forward,
        *,
        codec: str,
        tier: TierByDevice | None,
        min_bytes: int,
        useless: set[Site],
    ) -> None:
        self.stack, self.rules = CallStack(), rules
        self._resident, self._forward = resident, forward
        self._codec, self._tier, self._min_bytes = codec, tier, min_bytes
        self._rounds = any((named or codec) != MASK for named in rules.codecs)
        self._groups: weakref.WeakValueDictionary[_Key, Group] = weakref.WeakValueDictionary()
        self._left: dict[_Key, StorageWeakRef] = {}  # an address that is referred to is not used again
        self._taken: dict[_Key, tuple[Site, StorageWeakRef]] = {}
        self._useless = useless
        self._codes: weakref.WeakKeyDictionary[Group, _Source] = weakref.WeakKeyDictionary()
        self._compared = Compared()

    def take(self, tensor: Tensor, choice: str, site: Site, *, whole: Tensor | None = None) -> Any:
        """Hold a tensor as its choice says.

        Args:
            tensor: what autograd saves, or a part of it.
            choice: "offload", "compress" or "compress+offload", with a codec after a colon or the engine's.
            site: where it is saved.
            whole: what autograd saves, if the tensor is a part of it.

        Returns:
            What autograd is to hold instead; None where the tensor stays as it is.
        """
        if "offload" in choice and self._tier is not None:
            if not self._tier.takes(tensor.device, tells=tensor.numel() > 1):  # Python's numbers are on the CPU
                return None
        parts = parts_of(tensor)
        if parts is not None:
            if self._resident.holds(tensor):
                return None
            packed = {name: self.take(part, choice, site, whole=tensor) for name, part in parts.tensors.items()}
            if any(each is None for each in packed.values()):
                return None
            return SavedParts(type(tensor), packed, parts.others, parts.context, tensor.size(), tensor.stride())
        if site in self._useless or not is_plain(tensor) or self._resident.holds(tensor):
            return None
        group = self._group(tensor, choice, site, tensor if whole is None else whole)
        return None if group is None else self._view(tensor, group, site)

    def again(self, tensor: Tensor, site: Site) -> SavedView | None:
        """Return what autograd is to hold where the tensor's storage was taken at an earlier save.

        The choice is made for a storage, at its first save: kept now, it would be held twice.
        """
        group = self._groups.get(_key(tensor)) if self._groups and is_dense(tensor) else None
        return None if group is None or not is_plain(tensor) else self._view(tensor, group, site)

    def take_back(self, tensor: Tensor) -> None:
        """Hold exactly what a function that compares has saved so far, if a tensor is what it returned (step 4)."""
        if not self._rounds:
            return
        for packed in self._compared.saved_beside(tensor):
            for view in views_of(packed):
                self._hold_exactly(view.group)

    def _hold_exactly(self, group: Group, tensor: Tensor | None = None) -> None:
        source = self._codes.get(group)
        if source is None or not source.codes.is_rounded:
            return
        self._useless.add(source.site)
        tensor = source.original() if tensor is None else tensor
        if tensor is not None:
            source.codes.take_back(flat_of(tensor))

    def _view(self, tensor: Tensor, group: Group, site: Site) -> SavedView:
        if _is_input(site):
            self._hold_exactly(group, tensor)
        use = functools.partial(self._forward.use, site)
        source = self._codes.get(group)
        if source is not None:
            use = functools.partial(_use_unchanged, use, source.codes)
        return SavedView(group, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, use)

    def leave(self, tensor: Tensor) -> None:
        """Note that a tensor is kept; this happens most often, so as little as possible is asked of the tensor."""
        if self.rules.keeps_all or not is_dense(tensor):
            return
        key = _key(tensor)
        if key in self._left or self._resident.has(key[0]):
            return
        self._left[key] = StorageWeakRef(tensor.untyped_storage())
        if key in self._taken:
            self._useless.add(self._taken[key][0])

    def _group(self, tensor: Tensor, choice: str, site: Site, whole: Tensor) -> Group | None:
        key, storage = _key(tensor), tensor.untyped_storage()
        known = self._groups.get(key)
        if known is not None or key in self._left or not is_worth_it(tensor, min_bytes=self._min_bytes):
            return known
        flat = flat_of(tensor)
        kind, _, codec = choice.partition(":")
        codec = MASK if _is_input(site) else codec or self._codec
        tier = None if kind == "compress" else self._tier
        sign = None if kind == "offload" or key in self._taken else sign_of_relu(whole, flat, tier=tier)
        held = sign or self._held(tensor, flat, "" if kind == "offload" else codec, tier, whole)
        if held is None:
            return None
        group = Group(storage, held)
        if sign is None:
            self._groups[key] = group  # the sign alone is nobody else's
            if isinstance(held, Encoded) and held.is_rounded:
                self._codes[group] = _Source(held, site, weakref.ref(tensor))
        self._taken[key] = site, StorageWeakRef(storage)
        self._forward.make(site, group)
        return group

    def _held(self, tensor: Tensor, flat: Tensor, codec: str, tier: Tier | None, whole: Tensor) -> Held | None:
        if codec:
            return encoded(tensor, flat, codec, whole=whole, tier=tier)
        assert tier is not None
        return tier.put(flat)


def _is_input(site: Site) -> bool:
    """Tell whether a block is run again from what is saved here: all that it computes would change with it."""
    return site.module.endswith(INPUTS)


def _use_unchanged(use: Callable[[], None], codes: Encoded) -> None:
    codes.check()
    use()


class SaveHooks:
    """The hooks of one forward, or of a recomputed block's first run in it.

    Args:
        saver: of the forward.
        below: the hooks that lie below.
        pattern: the one by which the block is recomputed; "" outside of such blocks.
        taken: where to note for each save of the block whether it was taken from checkpoint.
    """

    def __init__(
        self, saver: Saver, below: Hooks | None, *, pattern: str = "", taken: list[bool] | None = None
    ) -> None:
        self._saver, self._below, self._pattern, self._taken = saver, below, pattern, taken
        self.is_over_checkpoint = bool(pattern)

    def pack(self, tensor: Tensor) -> Any:
        """Return what autograd is to hold."""
        saver = self._saver
        saver.take_back(tensor)
        site, choice = saver.rules.next_save(saver.stack.calls[-1], self._pattern)
        packed: Any = None
        if choice == "keep":
            packed = saver.again(tensor, site)
            if packed is None:
                packed = keep(tensor) if self._below is None or self._pattern else None
                saver.leave(tensor)
        elif choice != "recompute":
            packed = saver.take(tensor, choice, site)
        if self._taken is not None:
            self._taken.append(packed is not None)
        if packed is not None:
            return packed
        if self._below is None:
            saver.leave(tensor)
            return keep(tensor)
        return SavedElsewhere(self._below[1], self._below[0](tensor))


class SecondRun:
    """The context of a recomputed block's second run, which can be entered once for each backward.

    Args:
        taken: for each save of the first run whether it was taken; then checkpoint did not count it.
    """

    def __init__(self, taken: list[bool]) -> None:
        self._taken = taken
        self._hooks: list[saved_tensors_hooks | None] = []

    def __enter__(self) -> None:
        below, marks = top_hooks(), iter(self._taken)

        def pack(tensor: Tensor) -> Any:
            if below is None or next(marks, False):
                return keep(tensor)  # as checkpoint does: the block may go through its own graph in forward
            return SavedElsewhere(below[1], below[0](tensor))

        self._hooks.append(saved_tensors_hooks(pack, unpack) if any(self._taken) else None)
        if self._hooks[-1] is not None:
            self._hooks[-1].__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        hooks = self._hooks.pop()
        if hooks is not None:
            hooks.__exit__(*exc_info)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def top_hooks() -> Hooks | None:
    """Return the saved-tensor hooks that are on top of the stack; None where there are none."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found


def is_worth_it(tensor: Tensor, *, min_bytes: int) -> bool:
    """Tell whether a tensor's storage is large enough to be taken, and the tensor not a small part of it."""
    num_bytes = tensor.untyped_storage().nbytes()
    return num_bytes >= min_bytes and tensor.numel() * tensor.element_size() >= num_bytes * LEAST_SHARE


def _key(tensor: Tensor) -> _Key:
    return tensor.untyped_storage()._cdata, tensor._version, tensor.dtype
