"""SGD whose momentum buffer takes a chosen number of bytes per parameter.

The signature is that of torch.optim.SGD; what is around a step is in `compact`. Only momentum has a buffer, so
without momentum a state is the step count alone.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507), algorithm
2.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from packlight.numerics.settings import SGDSettings
from packlight.optim.checkpoint import Converter
from packlight.optim.compact import CompactOptimizer
from packlight.optim.foreign import momentum_options, portable_momentum
from packlight.optim.policy import StateFormatChoice
from packlight.optim.state import MOMENTUM, check_range, host_lr

# What torch.optim.SGD's param groups hold besides ours; a portable state_dict has them.
TORCH_OPTIONS: Mapping[str, Any] = {"foreach": None, "differentiable": False, "fused": None}


class SGD(CompactOptimizer):
    """torch.optim.SGD with its momentum buffer in a chosen format.

    Args:
        params: parameters, named parameters (`model.named_parameters()`) or param groups.
        lr: learning rate, a float or a tensor of one element.
        momentum: decay of the momentum buffer per step; 0: no buffer.
        dampening: what is left out of the gradient in the buffer, except at the first step.
        weight_decay: the L2 factor added to the gradient.
        nesterov: look ahead by one step of momentum.
        maximize: ascend instead of descend.
        foreach, fused: torch's choices among its implementations; without effect, as in `AdamW`.
        differentiable: only False, as in `AdamW`.
        state_format: as in `AdamW`; the buffer is stored as the format's first moment.
        seed: of the random bits for stochastic rounding of bf16 parameters.
        bf16_rounding: as in `AdamW`.
        release_gradients: as in `AdamW`.

    Raises:
        ValueError: an unknown format, a hyper-parameter out of range, differentiable, a parameter dtype that is not
            fp32, bf16 or fp16, or formats by name for parameters without names.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(256, 256)
        >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer.state_bytes()
        35848
    """

    converter = Converter(MOMENTUM, TORCH_OPTIONS, portable_momentum, momentum_options)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: Literal[False] = False,
        fused: bool | None = None,
        state_format: StateFormatChoice = "4bit",
        seed: int = 0,
        bf16_rounding: Literal["stochastic", "nearest", "master24", "master32"] = "stochastic",
        release_gradients: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        own = {"state_format": state_format, "seed": seed, "bf16_rounding": bf16_rounding}
        options |= {"nesterov": nesterov, "maximize": maximize}
        self.check(options | own | {"differentiable": differentiable})
        super().__init__(params, options | own, release_gradients=release_gradients)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise where an option is out of its range.

        Raises:
            ValueError: also for Nesterov's momentum without momentum, or with dampening.
        """
        super().check(options)
        check_range("momentum", options["momentum"], low=0.0)
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                f"nesterov=True came with momentum={options['momentum']} and dampening={options['dampening']}, "
                "a momentum above 0 and no dampening was wanted"
            )

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the momentum buffer's name, or nothing without momentum."""
        return MOMENTUM if group["momentum"] else ()

    def settings(self, group: Mapping[str, Any]) -> SGDSettings:
        """Return the hyper-parameters of a param group."""
        return SGDSettings(
            lr=host_lr(group),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
        )
