"""AdamW and Adam whose states take a chosen number of bytes per parameter.

The signature is that of torch.optim.AdamW; what is around a step (formats, checkpoints, scaling, clipping) is in
`compact`.

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv 1711.05101), algorithm
2; the formats from Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv
2309.01507).
"""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from packlight.numerics.settings import AdamWSettings
from packlight.optim.checkpoint import Converter
from packlight.optim.compact import CompactOptimizer
from packlight.optim.foreign import group_options, portable_state
from packlight.optim.policy import StateFormatChoice
from packlight.optim.state import MOMENTS, check_range, group_settings

# What torch.optim.AdamW's param groups hold besides ours; a portable state_dict has them.
TORCH_OPTIONS: Mapping[str, Any] = {
    "amsgrad": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class AdamW(CompactOptimizer):
    """torch.optim.AdamW with states in a chosen format.

    Args:
        params: parameters, named parameters (`model.named_parameters()`) or param groups.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and the second moment per step. From 0.99 on the second moment is rounded
            stochastically.
        eps: added to the denominator.
        weight_decay: decoupled decay per unit of lr.
        amsgrad: only False; it is here because it is torch's sixth positional argument.
        maximize: ascend instead of descend.
        foreach, fused, capturable: torch's choices among its implementations; without effect here, since a step
            is one kernel for many parameters, and on a GPU it reads its numbers there.
        differentiable: only False: a step on codes has no gradient.
        state_format: a format's name ("4bit", "8bit", "fp8", "fp32", "paper4bit", "factored"), a mapping from
            every parameter's name to one, or a callable that gets a parameter's name and returns one. Named
            once for all, "4bit", "8bit" and "fp8" leave 1-D tensors in fp32, and "4bit" keeps embeddings (told
            by their names) in 8 bits. Tensors of at most 4096 elements are always kept in fp32.
        seed: of the random bits for stochastic rounding.
        bf16_rounding: of bf16 parameters: "stochastic", "nearest", or "master24" and "master32" for 8 and 16
            error bits beside each (the effect of a 24- or 32-bit master copy).
        release_gradients: update each parameter inside backward, as soon as its gradient is complete, and free
            the gradient. Not with accumulation, clipping by norm or a GradScaler, as a warning says once. A copy or
            a pickle of the optimiser does not release gradients: build it anew and load its state_dict.

    Raises:
        ValueError: an unknown format, a hyper-parameter out of range, amsgrad, differentiable, a parameter dtype
            that is not fp32, bf16 or fp16, or formats by name for parameters without names.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(256, 256)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-2)
        >>> model(torch.ones(1, 256)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_codes"].shape
        torch.Size([32768])
    """

    decoupled: ClassVar[bool] = True
    converter = Converter(MOMENTS, TORCH_OPTIONS, portable_state, group_options)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: Literal[False] = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: Literal[False] = False,
        fused: bool | None = None,
        state_format: StateFormatChoice = "4bit",
        seed: int = 0,
        bf16_rounding: Literal["stochastic", "nearest", "master24", "master32"] = "stochastic",
        release_gradients: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own: dict[str, Any] = {"state_format": state_format, "seed": seed, "bf16_rounding": bf16_rounding}
        own["decoupled_weight_decay"] = self.decoupled  # as torch's groups say it, for whoever loads a checkpoint
        self.check(options | own | {"amsgrad": amsgrad, "differentiable": differentiable})
        super().__init__(params, options | own, release_gradients=release_gradients)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise where an option is out of its range.

        Raises:
            ValueError: also for amsgrad.
        """
        if options.get("amsgrad"):
            raise ValueError(
                "amsgrad=True came, amsgrad=False was wanted: its third moment only ever grows, so rounding up would "
                "accumulate, and it has no compact format. Leave amsgrad out, or use torch.optim.AdamW."
            )
        super().check(options)
        beta1, beta2 = options["betas"]
        check_range("betas[0]", beta1, low=0.0, below=1.0)
        check_range("betas[1]", beta2, low=0.0, below=1.0)
        check_range("eps", options["eps"], low=0.0)

    def settings(self, group: Mapping[str, Any]) -> AdamWSettings:
        """Return the hyper-parameters of a param group."""
        return group_settings({**group, "decoupled_weight_decay": self.decoupled})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as `CompactOptimizer` does; weight decay stays this class's.

        Args:
            state_dict: of AdamW or Adam; a UserWarning says where its weight decay was of the other kind.

        Raises:
            ValueError: as `CompactOptimizer.load_state_dict`.
        """
        if any(
            group.get("weight_decay") and group.get("decoupled_weight_decay", self.decoupled) != self.decoupled
            for group in state_dict["param_groups"]
        ):
            kinds = "decoupled", "a part of the gradient"
            here, there = kinds if self.decoupled else kinds[::-1]
            warnings.warn(
                f"a checkpoint came whose weight decay is {there}, and in {type(self).__name__} it is {here}: the same "
                f"factor does something else now. Load it into packlight.{'Adam' if self.decoupled else 'AdamW'}, or "
                "set weight_decay anew.",
                stacklevel=2,
            )
        super().load_state_dict(state_dict)


class Adam(AdamW):
    """torch.optim.Adam with states in a chosen format: weight decay is a part of the gradient.

    Arguments and errors are `AdamW`'s, but for the default weight decay of 0.
    """

    decoupled = False
    converter = Converter(MOMENTS, {**TORCH_OPTIONS, "decoupled_weight_decay": False}, portable_state, group_options)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: Literal[False] = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: Literal[False] = False,
        fused: bool | None = None,
        state_format: StateFormatChoice = "4bit",
        seed: int = 0,
        bf16_rounding: Literal["stochastic", "nearest", "master24", "master32"] = "stochastic",
        release_gradients: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            differentiable=differentiable,
            state_format=state_format,
            seed=seed,
            bf16_rounding=bf16_rounding,
            release_gradients=release_gradients,
        )
