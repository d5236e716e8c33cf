"""Storage groups: what autograd saves, held in another way than as it was, once for all views of a storage.

Queries, keys and values are three views of one storage, an activation is saved by the function that made it and by
the one that reads it; hooks see each save alone. A group is the root storage as one flat tensor, so that it is moved
or encoded once, and every save keeps nothing but its own size, strides and offset:

    1 pack     the first save of a storage makes its group; later ones of the same storage and version share it
    2          the storage itself is let go of; a weak reference keeps its address from being used again
    3 unpack   the first view brings the flat tensor back; views that come while it lives share it
    4          the group goes with its last save, and what it holds with it

Where a model runs on several streams of a GPU, step 3 may happen on another one than step 1, and a later view on a
third. So a group notes how far the stream had come when it was made, and again when the tensor was back; other streams
wait for that.

A version that rose between pack and unpack is an error where the tensor itself was kept, as it is in autograd, which
does not look at it where hooks are set.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from packlight.activations.copies import Moment, moment, reading, share


class Held(Protocol):
    """A flat tensor in another place or another form; it is freed by garbage collection."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes that it takes."""

    def get(self) -> Tensor:
        """Return it as it was: 1-D, of the same dtype and length; may be called more than once."""

    def prefetch(self) -> bool:
        """Begin to bring it back; False where there is no room for that."""


class Group:
    """One storage at one version, held for all saves of its views.

    Args:
        storage: the root storage.
        held: what holds it.
    """

    __slots__ = ("__weakref__", "_back", "_counter", "_held", "_lock", "_made", "_original", "_restored")

    def __init__(self, storage: torch.UntypedStorage, held: Held) -> None:
        self._held, self._original = held, StorageWeakRef(storage)  # step 2
        self._restored: StorageWeakRef | None = None
        self._counter: Tensor | None = None
        self._made = moment(storage.device)
        self._back: Moment | None = None
        self._lock = threading.Lock()

    def view(self, size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
        """Return a view of the storage as it was when it was saved (step 3)."""
        with self._lock:
            storage = self._present()
            if storage is None or self._counter is None:
                with reading(self._made):
                    flat = self._held.get()
                storage, self._back = flat.untyped_storage(), moment(flat.device)
                self._restored, self._counter = StorageWeakRef(storage), flat.new_empty(0)
            made = self._counter.detach()  # all views of one restored storage share one version
            made.data = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)
            return share(made, self._back)

    def prefetch(self) -> bool:
        """Begin to bring it back, unless it is here."""
        if self._restored is not None and not self._restored.expired():
            return True
        return self._held.prefetch()

    def _present(self) -> torch.UntypedStorage | None:
        """Return the storage if it lives, and no function's backward wrote to what it had saved."""
        if self._restored is None or self._counter is None or self._counter._version:
            return None
        return torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)


class SavedView(NamedTuple):
    """What autograd holds for one save of a group: the geometry of the view."""

    group: Group
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    use: Callable[[], None]

    def take(self) -> Tensor:
        """Return the tensor that was saved."""
        self.use()
        return self.group.view(self.size, self.stride, self.offset, self.dtype)


class SavedParts(NamedTuple):
    """What autograd holds for one save of a tensor that consists of others, such as a DTensor."""

    kind: type
    parts: dict[str, Any]
    others: dict[str, Any]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]

    def take(self) -> Tensor:
        """Put it together again."""
        parts = {name: unpack(packed) for name, packed in self.parts.items()}
        made: Tensor = self.kind.__tensor_unflatten__(parts | self.others, self.context, self.size, self.stride)  # type: ignore[attr-defined]
        return made.detach()


class SavedElsewhere(NamedTuple):
    """What autograd holds for one save that was left to the hooks around ours: the user's, or a checkpoint's."""

    unpack: Callable[[Any], Tensor]
    packed: Any

    def take(self) -> Tensor:
        """Ask them for it."""
        return self.unpack(self.packed)


def keep(tensor: Tensor) -> tuple[Tensor, int]:
    """Return what autograd holds for a save that is kept: an alias without history, and the version."""
    return tensor.detach(), tensor._version


def unpack(packed: Any) -> Tensor:
    """Return the tensor that was saved; the hook of all that is packed in this module.

    Raises:
        RuntimeError: a kept tensor was written to since.
    """
    if type(packed) is tuple:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
                "instead. Hint: torch.autograd.set_detect_anomaly(True) finds the operation."
            )
        return tensor  # type: ignore[no-any-return]
    made: Tensor = packed.take()
    return made


def flat_of(tensor: Tensor) -> Tensor:
    """Return the whole storage of a tensor as one, 1-D, of the tensor's dtype; an alias that shares its version."""
    num_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((num_elements,), (1,), 0)
