"""Compress: a saved tensor is held as low-bit codes, and decoded when backward asks for it.

COAT saves FP8 codes out of its own modules, one for each architecture. A hook sees any module's tensors, but not what
they mean, and not all of them may be rounded: statistics of a norm, log-sum-exps, random states and masks are numbers
that backward divides by or compares with. The idea: those are the ones that autograd itself does not differentiate, so
only tensors with a history are rounded, but for the results of softmax, whose sum has to stay 1.

Two kinds of masks are held exactly in one bit an element: a bool tensor, and the result of a ReLU as the ReLU itself
saves it, which is asked for its sign only. A dropout's noise on the CPU is a float tensor of zeros and one other
number: bits, too.

Source: Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 5: FP8 with a scale for each 16 elements, or one scale
for the whole input of a linear layer.
"""

import torch
from torch import Tensor

from packlight.activations.tier import Stored, Tier
from packlight.numerics.group_operators import MASK, decode, decode_mask, encode
from packlight.numerics.groups import GROUP_FORMATS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODECS = (*GROUP_FORMATS, MASK)
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
    if tensor.dtype == torch.bool:
        return Encoded(flat, MASK, tier=tier)
    if tensor.dtype not in FLOATS:
        return None
    if not tensor.requires_grad:
        value = _other_value(flat)
        return None if value is None else Encoded(flat, MASK, value=value, tier=tier)
    if codec == MASK or _is_softmax(tensor):
        return None
    return Encoded(flat, codec, tier=tier)


def sign_of_relu(tensor: Tensor, flat: Tensor, *, tier: Tier | None = None) -> Encoded | None:
    """Encode the result of a ReLU for the ReLU itself, which wants to know where it is above zero.

    Args:
        tensor: what autograd saves; the first to be saved of its storage and version.
        flat: its storage.
        tier: where the bits go; None: they stay.

    Returns:
        One bit an element; None where the tensor is no such result.
    """
    if tensor.dtype in FLOATS and tensor.grad_fn is not None and tensor.grad_fn.name() == "ReluBackward0":
        return Encoded(flat, MASK, tier=tier)
    return None


def _is_softmax(tensor: Tensor) -> bool:
    return tensor.grad_fn is not None and "SoftmaxBackward" in tensor.grad_fn.name()


def _other_value(flat: Tensor) -> float | None:
    """Return c where all elements are 0 or c; None otherwise, and on a GPU, which would have to be waited for."""
    if flat.device.type != "cpu" or flat.numel() == 0:
        return None
    if not _is_two_valued(flat[:SAMPLE_ELEMENTS]) or not _is_two_valued(flat):
        return None
    return float(flat.max()) or None


def _is_two_valued(values: Tensor) -> bool:
    largest = values.max()
    return bool(largest > 0) and bool(((values == 0) | (values == largest)).all())
