"""Compress: a saved tensor is held as low-bit codes, and decoded when backward asks for it.

COAT saves FP8 codes out of its own modules, one for each architecture. A hook sees any module's tensors, but not what
they mean, and not all of them may be rounded: statistics of a norm, log-sum-exps, random states and masks are numbers
that backward divides by or compares with. Most are results that autograd does not differentiate, so only tensors with a
history are rounded; those that have one are told by the function that made them (`STATISTICS`).

Two kinds of masks are held exactly in one bit an element: a bool tensor, and the result of a ReLU as the ReLU itself
saves it, which is asked for its sign only. A dropout's noise on the CPU is a float tensor of zeros and one other
number: bits, too.

Source: Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 5: FP8 with a scale for each 16 elements, or one scale
for the whole input of a linear layer.
"""

from typing import Any

import torch
from torch import Tensor

from packlight.activations.tier import Stored, Tier
from packlight.numerics.group_operators import MASK, decode, decode_mask, encode
from packlight.numerics.groups import GROUP_FORMATS, num_mask_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODECS = (*GROUP_FORMATS, MASK)
# Functions whose results are no activations but numbers to divide by, or have to sum up to 1.
STATISTICS = ("Softmax", "LogSoftmax", "Logsumexp", "Sqrt", "Rsqrt", "Std", "Var", "LinalgVectorNorm", "Norm")
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
        self.num_bytes = sum(part.nbytes for part in parts)
        self._parts: list[Tensor | Stored] = [part if tier is None else tier.put(part) for part in parts]

    def get(self) -> Tensor:
        """Return the tensor, decoded: 1-D, of the same dtype and length."""
        parts = [part if isinstance(part, Tensor) else part.get() for part in self._parts]
        if self._codec == MASK:
            return decode_mask(parts[0], self._numel, self._dtype, self._value)
        return decode(tuple(parts), self._codec, self._numel, self._dtype)

    def prefetch(self) -> bool:
        """Begin to bring the codes back."""
        return all([isinstance(part, Tensor) or part.prefetch() for part in self._parts])


def encoded(tensor: Tensor, flat: Tensor, codec: str, *, tier: Tier | None = None) -> Encoded | None:
    """Encode a saved tensor, where that is allowed.

    Args:
        tensor: what autograd saves.
        flat: its storage.
        codec: one of `CODECS`; "mask" encodes what loses nothing only.
        tier: where the codes go; None: they stay.

    Returns:
        The codes; None where the tensor is to stay as it is.
    """
    kind = encoding_of(tensor)
    if kind == "mask":
        return Encoded(flat, MASK, tier=tier)
    if kind == "codes":
        return None if codec == MASK else Encoded(flat, codec, tier=tier)
    value = _other_value(flat) if tensor.dtype in FLOATS and not tensor.requires_grad else None
    return None if value is None else Encoded(flat, MASK, value=value, tier=tier)


def encoding_of(tensor: Tensor) -> str:
    """Tell how a saved tensor may be encoded, without a look at its values.

    Args:
        tensor: what autograd saves.

    Returns:
        "codes": rounded to any codec; "mask": bits, exactly; "": not at all, but for a dropout's noise.
    """
    if tensor.dtype == torch.bool:
        return "mask"
    return "codes" if tensor.dtype in FLOATS and tensor.requires_grad and not _is_statistic(tensor) else ""


def encoded_bytes(codec: str, num_elements: int) -> int:
    """Return the bytes of encoded elements."""
    return num_mask_bytes(num_elements) if codec == MASK else GROUP_FORMATS[codec].num_bytes(num_elements)


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


def _is_statistic(tensor: Tensor) -> bool:
    """Tell whether a tensor, or what it is a view of, is a result that must not be rounded."""
    made = tensor if tensor._base is None else tensor._base
    if made.grad_fn is None:
        return False
    function = made.grad_fn.name().partition("Backward")[0]
    return function in STATISTICS or (made.output_nr > 0 and function.endswith("Norm"))  # a norm's mean and deviation


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
