"""What a rank holds of a model whose states are cut, and when: the same record for FSDP2 and for DeepSpeed.

torch and DeepSpeed each know how they cut, and neither tells what a rank will hold. The idea: a step is profiled as if
the model were whole, on one device, and this record says what cutting takes away from that and what it adds:

    always      shares of parameters, gradients and states; buffers that an engine keeps
    in a unit   its parameters are gathered before it runs, in forward and again in backward, and let go after
    backward    gradients are whole until they are reduced; then a rank keeps its share, in a unit's own tensors (FSDP2)
                or in a buffer for all (ZeRO)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Weight:
    """A parameter, once, however many modules are tied to it.

    Attributes:
        name: the first of its names in the model.
        shape: of the whole.
        dtype: as the module holds it.
        is_trained: whether it gets a gradient and has a state.
        group: the optimiser's param group that it is in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_trained: bool = True
    group: int = 0

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes as the module holds it."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Share:
    """What a rank has of one parameter's optimiser state.

    Attributes:
        name: the parameter's; "" for elements that only fill a partition up.
        shape: of the whole parameter.
        local_shape: of the rows that are here; of a fragment its elements.
        dtype: in which the optimiser sees it.
        is_fragment: whether it is elements of a flat partition, and no rows.
    """

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    is_fragment: bool = False

    @property
    def numel(self) -> int:
        """The elements that are here."""
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and let go together.

    Attributes:
        module: the path of the module whose forward needs them; "" for what the whole model needs.
        gathered_bytes: all of them, put together.
        extra_bytes: what gathering holds beside that in forward.
        gradient_bytes: the buffer that gradients are reduced in.
        is_kept: whether they stay gathered from forward until backward.
    """

    module: str
    gathered_bytes: int
    extra_bytes: int = 0
    gradient_bytes: int = 0
    is_kept: bool = False


@dataclass(frozen=True)
class Sharding:
    """What a rank holds; bytes, of the rank that has most.

    Attributes:
        engine: "ddp", "fsdp" or "zero".
        stage: of ZeRO: what is cut, from 0 (nothing) to 3 (parameters, too).
        num_ranks: that the states are cut for.
        parameter_bytes: of parameters.
        master_bytes: of fp32 copies that are stepped in the place of parameters.
        buffer_bytes: what the engine has made before the first step, and keeps.
        persistent_bytes: of parameters that are gathered once and stay so.
        shares: of the optimiser's states, for each rank that may have most.
        state_share: of the optimiser's work, what a rank does.
        gradient_share: of each gradient, what a rank keeps in a tensor of its own once it is reduced.
        widening: bytes of what is stepped over bytes of what is gathered of it: 2 where 16 bits are gathered of fp32.
        bucket_bytes: of gradients that are reduced together, and
        partition_bytes: of the buffer in which these are left; it lives from the first full bucket until the step.
        kept_gradient_bytes: of one that lives always; or between microbatches, which add up there.
        backward_bytes: what reducing takes from the begin of backward to its end.
        step_bytes: what the optimiser's step takes for copies of gradients.
        units: what is gathered; empty where parameters are whole.
        num_flats: tensors that the optimiser steps instead of parameters; 0 where it steps these.
        sent_bytes: what a rank sends to reduce gradients in a backward,
        gathered_bytes: to gather parameters in a forward and its backward, and
        after_bytes: to gather them after the optimiser's step.
        num_messages: into how many messages these are divided.
        host_bytes: of parameters and gradients that are in host memory instead, where the states are, too; 0 where
            nothing is.
        host_in_bytes, host_out_bytes: what a rank copies from there in a forward and its backward, and to there.
    """

    engine: str
    stage: int
    num_ranks: int
    parameter_bytes: int
    shares: tuple[tuple[Share, ...], ...]
    master_bytes: int = 0
    buffer_bytes: int = 0
    persistent_bytes: int = 0
    state_share: float = 1.0
    gradient_share: float = 1.0
    widening: float = 1.0
    bucket_bytes: int = 0
    partition_bytes: int = 0
    kept_gradient_bytes: int = 0
    backward_bytes: int = 0
    step_bytes: int = 0
    units: tuple[Unit, ...] = ()
    num_flats: int = 0
    sent_bytes: int = 0
    gathered_bytes: int = 0
    after_bytes: int = 0
    num_messages: int = 0
    host_bytes: int = 0
    host_in_bytes: int = 0
    host_out_bytes: int = 0

    @property
    def name(self) -> str:
        """What a person calls it."""
        if self.engine == "zero":
            return f"ZeRO-{self.stage}"
        how = ["kept"] * (self.engine == "fsdp" and self.stage == 2) + ["host"] * (self.host_bytes > 0)
        return {"ddp": "DDP", "fsdp": "FSDP2"}[self.engine] + f" ({', '.join(how)})" * bool(how)


def weights_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> tuple[Weight, ...]:
    """List a model's parameters, on any device (also meta); tied ones once.

    Args:
        model: the module that is trained.
        optimizers: those that step it: what none of them has is not trained; none: all that require gradients are.

    Returns:
        The parameters, in the order of the model.
    """
    groups = {id(each): at for at, each in _placed(optimizers)}
    return tuple(
        Weight(
            name=name,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            is_trained=parameter.requires_grad and (not optimizers or id(parameter) in groups),
            group=groups.get(id(parameter), 0),
        )
        for name, parameter in model.named_parameters()
    )


def _placed(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[int, torch.Tensor]]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for at, group in enumerate(groups):
        for parameter in group["params"]:
            yield at, parameter
