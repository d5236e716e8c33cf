"""SGD without momentum on the CPU: no states, so nothing to decode, but many small parameters.

The reference goes parameter by parameter, which takes 80 us for one of 2048 elements; torch's fused step and its
`add(alpha=)` multiply and add in one operation and so give other bits. Here gradients are gathered into one flat
buffer, which a few operators scale, each of them one rounded operation as in the reference, and all parameters are
updated from its pieces by one call. The buffer holds `CHUNK_ELEMENTS`, so temporaries stay below 1 MiB.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from packlight.numerics.settings import SGDNumbers

# Two buffers of this many fp32 numbers are 512 KiB, and lie in a core's cache.
CHUNK_ELEMENTS = 2**16

Pairs = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def descend(pairs: Pairs, numbers: SGDNumbers) -> None:
    """Do one step of SGD without momentum, in place, with the bits of `reference.sgd_step`.

    Args:
        pairs: fp32, contiguous, on the CPU: each parameter, and its gradient of the same shape.
        numbers: the constants of this step.
    """
    numel = min(CHUNK_ELEMENTS, sum(param.numel() for param, _ in pairs))
    buffers = torch.empty(2, numel, dtype=torch.float32, device="cpu").unbind()
    for params, grads in _chunks(pairs):
        sizes = [param.numel() for param in params]
        step, other = (buffer[: sum(sizes)] for buffer in buffers)
        _move(params, grads, numbers, step, other)
        torch._foreach_sub_(params, step.split(sizes))


def _move(params: list[Tensor], grads: list[Tensor], numbers: SGDNumbers, out: Tensor, other: Tensor) -> None:
    """Write into `out` what is subtracted from the parameters; `other` is overwritten."""
    if abs(numbers.coefficient) == 1 and not numbers.l2 and not numbers.gradient_to_p:
        _gather(grads, numbers.coefficient * numbers.m_to_p, out)  # a sign changes no rounding
        return
    g = _gather(grads, numbers.coefficient, out)
    if numbers.l2:
        g += _gather(params, numbers.l2, other)
    if numbers.gradient_to_p:
        torch.mul(g, numbers.gradient_to_p, out=other)
    g *= numbers.m_to_p
    if numbers.gradient_to_p:
        g += other


def _gather(tensors: list[Tensor], factor: float, out: Tensor) -> Tensor:
    """Return `out` after the tensors, times the factor, have been written into it one after the other."""
    if len(tensors) == 1:
        return torch.mul(tensors[0], factor, out=out)
    return torch.cat(tensors, out=out).mul_(factor)


def _chunks(pairs: Pairs) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield flat pieces of parameters and gradients, `CHUNK_ELEMENTS` at most together."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    room = CHUNK_ELEMENTS
    for param, grad in pairs:
        for piece, piece_grad in _pieces(param, grad):
            if piece.numel() > room:
                yield params, grads
                params, grads, room = [], [], CHUNK_ELEMENTS
            params.append(piece)
            grads.append(piece_grad)
            room -= piece.numel()
    if params:
        yield params, grads


def _pieces(param: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if param.dim() != 1:
        param, grad = param.view(-1), grad.view(-1)
    if param.numel() <= CHUNK_ELEMENTS:
        yield param, grad
    else:
        yield from zip(param.split(CHUNK_ELEMENTS), grad.split(CHUNK_ELEMENTS), strict=True)
