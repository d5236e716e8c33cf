"""Compress: a saved tensor is held as low-bit codes, and decoded when backward asks for it.

COAT saves FP8 codes out of its own modules, one for each architecture. A hook sees any module's tensors, but not what
they mean, and not all of them may be rounded. Most that may not are results that autograd does not differentiate, as
random states, so only tensors with a history are rounded. Those that have one are told by the functions around them:

    what made it     Results that must sum up to 1, or that others are divided by, stay exact, their copies and views
                     too (`STATISTICS`); but not what is computed with them, as the dropout of a softmax.
    what saves it    Attention saves queries and keys beside the log-sum-exp of their products, a maximum its input
                     beside its result: rounded, they do not fit one another, and backward gives anything. All that such
                     a function saves stays exact (`COMPARING`). It has a name only when its result is saved; what it
                     saved before is taken back then, while the original still lives (`Compared`).
    where it lies    Bytes around it that are part of no function's result may be anything, and would decide about the
                     scale: a tensor is rounded only if its storage is filled by it, or by the result it is a view of.

What backward divides by does not become zero (`numerics.groups`), so gradients of log, pow and division are finite. But
they are as wrong as the codes: where a denominator is far below the largest number of its group, its error is large.
The same holds for a softmax that is written out as exp and sum, for functions with a pole elsewhere than at 0 (log1p,
atanh, logit), which rounding may hit, and for a function of one's own that saves logits and their log-sum-exp, but not
its result: the choice for such sites is "keep".

Two kinds of masks are held exactly in one bit an element: a bool tensor, and the result of a ReLU as the ReLU itself
saves it, which is asked for its sign only. A dropout's noise on the CPU is a float tensor of zeros and one other
number: bits, too.

Source: Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 5: FP8 with a scale for each 16 elements, or one scale
for the whole input of a linear layer; queries, keys and values stay in 16 bits.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from packlight.activations.groups import SavedParts, SavedView, keep, unpack
from packlight.activations.resident import COPYING, plain_parts
from packlight.activations.tier import Stored, Tier
from packlight.numerics.group_operators import MASK, decode, decode_mask, encode
from packlight.numerics.groups import GROUP_FORMATS, num_mask_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODECS = (*GROUP_FORMATS, MASK)
# Functions whose results are no activations but numbers to divide by; softmax of any kind counts as one, too.
_NORMS = ("Norm", "LinalgVectorNorm", "Std", "StdMean", "Var", "VarMean", "Sqrt", "Rsqrt")
STATISTICS = frozenset(("Logsumexp", *_NORMS))
# Functions that compare or divide what they were given with what they returned, or a sum of exponentials of it.
_REDUCTIONS = ("Amax", "Amin", "Aminmax", "Max", "Min", "Median", "Nanmedian", "Norm", "Prod", "Logsumexp")
_REDUCTIONS_IN_PARTS = ("ScatterReduce", "IndexReduce", "SegmentReduce", "Cumprod", "Logcumsumexp")
_DISTANCES = ("Dist", "EuclideanDist", "CdistForward", "PdistForward")
COMPARING = frozenset((*_REDUCTIONS, *_REDUCTIONS_IN_PARTS, *_DISTANCES, "CtcLoss"))
# Parts of the names of others: decompositions and norms, and all attention, PyTorch's or other libraries'.
COMPARING_PARTS = ("linalg", "attention", "flashattn", "flash_attn", "fmha")
_COPYING = frozenset((*COPYING, "Expand", "Squeeze", "Unsqueeze", "ClampMin"))
MOST_COPIES = 8  # scores are cast, given an axis, expanded, copied and reshaped before they are multiplied
# The first elements tell most tensors from a mask without reading the others.
SAMPLE_ELEMENTS = 64


class Encoded:
    """A flat tensor as codes.

    Args:
        flat: 1-D, contiguous, of one of `FLOATS`, or bool for a mask.
        codec: one of `CODECS`.
        value: what a set bit of a mask stands for.
        tier: where the codes go; None: they stay.
    """

    def __init__(self, flat: Tensor, codec: str, *, value: float = 1.0, tier: Tier | None = None) -> None:
        self._codec, self._value, self._numel, self._dtype = codec, value, flat.numel(), flat.dtype
        parts = encode(flat, codec)
        self._parts: list[Tensor | Stored] = [part if tier is None else tier.put(part) for part in parts]
        self.num_bytes = sum(part.nbytes for part in parts)
        self._exact: Any = None

    @property
    def is_rounded(self) -> bool:
        """Tell whether something is lost."""
        return self._codec != MASK and self._exact is None

    def get(self) -> Tensor:
        """Return the tensor, decoded: 1-D, of the same dtype and length."""
        if self._exact is not None:
            return unpack(self._exact)
        parts = [part if isinstance(part, Tensor) else part.get() for part in self._parts]
        if self._codec == MASK:
            return decode_mask(parts[0], self._numel, self._dtype, self._value)
        return decode(tuple(parts), self._codec, self._numel, self._dtype)

    def prefetch(self) -> bool:
        """Begin to bring the codes back."""
        return all([isinstance(part, Tensor) or part.prefetch() for part in self._parts])

    def check(self) -> None:
        """Raise what autograd raises if the tensor itself is held, and was written to since."""
        if self._exact is not None:
            unpack(self._exact)

    def take_back(self, flat: Tensor) -> None:
        """Hold the tensor itself instead of its codes.

        Args:
            flat: what was encoded, unchanged since.
        """
        self._exact, self._parts, self.num_bytes = keep(flat), [], 0


def encoded(
    tensor: Tensor, flat: Tensor, codec: str, *, whole: Tensor | None = None, tier: Tier | None = None
) -> Encoded | None:
    """Encode a saved tensor, where that is allowed.

    Args:
        tensor: what autograd saves, or a part of it.
        flat: its storage.
        codec: one of `CODECS`; "mask" encodes what loses nothing only.
        whole: what autograd saves, if that is a DTensor, whose parts have no history.
        tier: where the codes go; None: they stay.

    Returns:
        The codes; None where the tensor is to stay as it is.
    """
    whole = tensor if whole is None else whole
    kind = encoding_of(whole)
    if kind == "mask":
        return Encoded(flat, MASK, tier=tier)
    if kind == "codes":
        return None if codec == MASK else Encoded(flat, codec, tier=tier)
    value = _other_value(flat) if tensor.dtype in FLOATS and not whole.requires_grad else None
    return None if value is None else Encoded(flat, MASK, value=value, tier=tier)


def encoding_of(tensor: Tensor) -> str:
    """Tell how a saved tensor may be encoded, without a look at its values.

    What a function saves that compares is told later, by `Compared`.

    Args:
        tensor: what autograd saves.

    Returns:
        "codes": rounded to any codec; "mask": bits, exactly; "": not at all, but for a dropout's noise.
    """
    if tensor.dtype == torch.bool:
        return "mask"
    if tensor.dtype not in FLOATS or not tensor.requires_grad:
        return ""
    return "codes" if _is_alone(tensor) and not _is_statistic(tensor) else ""


def encoded_bytes(codec: str, num_elements: int) -> int:
    """Return the bytes of encoded elements."""
    return sum(encoded_parts(codec, num_elements))


def encoded_parts(codec: str, num_elements: int) -> tuple[int, ...]:
    """Return the bytes of each tensor that encoded elements are, in the order in which a tier gets them."""
    if codec == MASK:
        return (num_mask_bytes(num_elements),)
    code_bytes = GROUP_FORMATS[codec].num_code_bytes(num_elements)
    return code_bytes, GROUP_FORMATS[codec].num_bytes(num_elements) - code_bytes


def sign_of_relu(tensor: Tensor, flat: Tensor, *, tier: Tier | None = None) -> Encoded | None:
    """Encode the result of a ReLU for the ReLU itself, which wants to know where it is above zero.

    Args:
        tensor: what autograd saves.
        flat: its storage.
        tier: where the bits go; None: they stay.

    Returns:
        One bit an element; None where the tensor is no such result, or another function saves it.
    """
    return Encoded(flat, MASK, tier=tier) if is_relu(tensor) else None


def is_relu(tensor: Tensor) -> bool:
    """Tell whether a ReLU is saving its own result now: its node, which will hold it, holds nothing yet."""
    node: Any = tensor.grad_fn
    if tensor.dtype not in FLOATS or node is None or node.name() != "ReluBackward0":
        return False
    own = node._raw_saved_result
    return own.data is None and own.unpack_hook is None


class Compared:
    """Finds what the functions of one forward hold that compare it with their results; it may not be rounded."""

    def __init__(self) -> None:
        self._node: Any = None
        self._num_saves = 0

    def saved_beside(self, tensor: Tensor) -> list[Any]:
        """Return what pack hooks gave autograd to hold for such functions, before the save that is happening now.

        Args:
            tensor: what autograd saves.

        Returns:
            What hooks returned, in any order, some of it perhaps again; nothing where the tensor is no such result.
        """
        found = self._saved_behind()
        node: Any = tensor.grad_fn
        if node is not None and _compares(node.name()):
            saves = _saves_of(node)
            found += saves
            if hasattr(node, "_raw_saved_tensors"):
                self._node, self._num_saves = node, len(saves) - 1
        return [save.data for save in found if save.data is not None]

    def _saved_behind(self) -> list[Any]:
        """Return the saves of the last function written in Python: it may save inputs behind its result."""
        if self._node is None:
            return []
        saves = _saves_of(self._node)
        if len(saves) == self._num_saves:
            self._node = None  # the save before this one was another function's
        self._num_saves = len(saves)
        return saves


def views_of(packed: Any) -> list[SavedView]:
    """Return the views of groups in what the engine's hook gave autograd to hold."""
    if isinstance(packed, SavedParts):
        return [view for part in packed.parts.values() for view in views_of(part)]
    return [packed] if isinstance(packed, SavedView) else []


@functools.lru_cache(maxsize=2**12)
def _compares(name: str) -> bool:
    return name.partition("Backward")[0] in COMPARING or any(part in name.lower() for part in COMPARING_PARTS)


def _saves_of(node: Any) -> list[Any]:
    """Return the saves of a node; a field of it may have several, or none."""
    kind: Any = type(node)
    fields = [getattr(node, name) for name in _names_of_saves(kind)]
    listed = [field if isinstance(field, tuple | list) else [field] for field in fields]
    return [save for saves in listed for save in saves if save is not None]


@functools.lru_cache(maxsize=2**10)
def _names_of_saves(kind: Hashable) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _is_statistic(tensor: Tensor) -> bool:
    """Tell whether a tensor, or what it is a view or a copy of, is a result that must not be rounded."""
    made = tensor if tensor._base is None else tensor._base
    node: Any = made.grad_fn
    if node is None or _compares(node.name()):
        return node is not None
    output = made.output_nr
    for _ in range(MOST_COPIES):
        function = node.name().partition("Backward")[0]
        if function in STATISTICS or function.endswith("Softmax"):  # Softmax, LogSoftmax, SafeSoftmax, ...
            return True
        if output > 0 and function.endswith("Norm"):  # a norm's mean and deviation
            return True
        if function not in _COPYING:
            return False
        node, output = node.next_functions[0]
        if node is None:
            return False
    return False


def _is_alone(tensor: Tensor) -> bool:
    """Tell whether nothing but a function's result lies in a tensor's storage: itself, or what it is a view of."""
    if _fills(tensor):
        return True
    base: Any = tensor._base
    if base is None or not _fills(base) or base.grad_fn is None:
        return False
    return not base.grad_fn.name().endswith("CopySlices")  # what was written to part by part may have other parts


def _fills(tensor: Tensor) -> bool:
    """Tell whether a tensor has each element of its storage once."""
    return all(
        part.numel() * part.element_size() == part.untyped_storage().nbytes() and _extent(part) == part.numel()
        for part in plain_parts(tensor)
    )


def _extent(tensor: Tensor) -> int:
    """Return how many elements lie between a tensor's first and last one, both included; without any, one too many."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _other_value(flat: Tensor) -> float | None:
    """Return c where all elements are 0 or c; None otherwise, and on a GPU, which would have to be waited for."""
    if flat.device.type != "cpu" or flat.numel() == 0:
        return None
    if not _is_two_valued(flat[:SAMPLE_ELEMENTS]) or not _is_two_valued(flat):
        return None
    return float(flat.max()) or None


def _is_two_valued(values: Tensor) -> bool:
    largest = values.max()
    is_zero = (values == 0) & ~values.signbit()  # -0 would come back as 0
    return bool(largest > 0) and bool((is_zero | (values == largest)).all())
