"""Hyper-parameters as users write them, and the fp32 numbers that a step computes with.

Every constant of a step is folded, in double precision, into as few fp32 numbers as there can be, and rounded
once. The reference and all kernels take the same numbers, so they give the same bits.
"""

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

# A root of zero times an infinite factor would be a NaN.
LARGEST_FP32 = 2.0**127


def _fp32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


class AdamWNumbers(NamedTuple):
    """The fp32 numbers of one AdamW step, in the order in which kernels take them.

    m = beta1 m + gradient_to_m g;  v = beta2 v + (gradient_to_root g)^2;
    p = decay p - m / (root_to_denom sqrt(v) + denom_eps),  with g = coefficient grad + l2 p if l2 is not 0

    Attributes:
        beta1: decay of the first moment.
        gradient_to_m: (1 - beta1) times the gradient's coefficient.
        beta2: decay of the second moment.
        root_beta2: its square root: decay of the second moment's root.
        gradient_to_root: sqrt(1 - beta2) times the gradient's coefficient.
        decay: 1 - lr * weight_decay.
        root_to_denom: (1 - beta1^t) / (lr sqrt(1 - beta2^t)).
        denom_eps: eps (1 - beta1^t) / lr; inf where lr is 0.
        coefficient: of the gradient, where l2 is not 0 (else it is in the two above).
        l2: weight decay as a part of the gradient.
    """

    beta1: float
    gradient_to_m: float
    beta2: float
    root_beta2: float
    gradient_to_root: float
    decay: float
    root_to_denom: float
    denom_eps: float
    coefficient: float
    l2: float


class SGDNumbers(NamedTuple):
    """The fp32 numbers of one SGD step, in the order in which kernels take them.

    g = coefficient grad + l2 p;  m = momentum m + gradient_to_m g;  p = p - (m_to_p m + gradient_to_p g)

    Attributes:
        momentum: decay of the momentum buffer; 0 at the first step.
        gradient_to_m: 1 - dampening; 1 at the first step.
        m_to_p: lr, or lr * momentum with Nesterov's momentum.
        gradient_to_p: 0, or lr with Nesterov's momentum.
        coefficient: of the gradient.
        l2: weight decay as a part of the gradient.
    """

    momentum: float
    gradient_to_m: float
    m_to_p: float
    gradient_to_p: float
    coefficient: float
    l2: float


@dataclass(frozen=True)
class AdamWSettings:
    """The hyper-parameters of one step.

    Attributes:
        lr: learning rate.
        beta1: decay of the first moment per step.
        beta2: decay of the second moment per step.
        eps: added to the denominator.
        weight_decay: decay per unit of lr (decoupled), or the L2 factor added to the gradient.
        maximize: follow the gradient instead of its negative.
        decoupled: True for AdamW, False for Adam's L2 weight decay.
        coefficient: the gradient is multiplied by it before anything else.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    decoupled: bool = True
    coefficient: float = 1.0

    def numbers(self, step: float) -> AdamWNumbers:
        """Return the numbers of a step.

        Args:
            step: 1 for the first.

        Returns:
            The numbers, each rounded to fp32 once.
        """
        coefficient = -self.coefficient if self.maximize else self.coefficient
        l2 = 0.0 if self.decoupled else self.weight_decay
        folded = 1.0 if l2 else coefficient
        correction1, correction2 = 1 - self.beta1**step, 1 - self.beta2**step
        numbers = AdamWNumbers(
            beta1=self.beta1,
            gradient_to_m=(1 - self.beta1) * folded,
            beta2=self.beta2,
            root_beta2=math.sqrt(self.beta2),
            gradient_to_root=math.sqrt(1 - self.beta2) * folded,
            decay=1 - self.lr * self.weight_decay if self.decoupled else 1.0,
            root_to_denom=min(correction1 / math.sqrt(correction2) / self.lr, LARGEST_FP32) if self.lr else 0.0,
            denom_eps=self.eps * correction1 / self.lr if self.lr else math.inf,
            coefficient=coefficient,
            l2=l2,
        )
        return AdamWNumbers(*map(_fp32, numbers))


@dataclass(frozen=True)
class SGDSettings:
    """The hyper-parameters of one SGD step.

    Attributes:
        lr: learning rate.
        momentum: decay of the momentum buffer per step.
        dampening: what is left out of the gradient in the buffer, except at the first step.
        weight_decay: the L2 factor added to the gradient.
        nesterov: look ahead by one step of momentum.
        maximize: follow the gradient instead of its negative.
        coefficient: the gradient is multiplied by it before anything else.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    coefficient: float = 1.0

    def numbers(self, step: float) -> SGDNumbers:
        """Return the numbers of a step.

        Args:
            step: 1 for the first, which fills the momentum buffer with the gradient.

        Returns:
            The numbers, each rounded to fp32 once.
        """
        numbers = SGDNumbers(
            momentum=0.0 if step <= 1 else self.momentum,
            gradient_to_m=1.0 if step <= 1 else 1 - self.dampening,
            m_to_p=self.lr * self.momentum if self.nesterov else self.lr,
            gradient_to_p=self.lr if self.nesterov else 0.0,
            coefficient=-self.coefficient if self.maximize else self.coefficient,
            l2=self.weight_decay,
        )
        return SGDNumbers(*map(_fp32, numbers))
