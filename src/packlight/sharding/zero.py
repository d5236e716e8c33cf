"""DeepSpeed's ZeRO: an engine at hand, and the config that makes one do what a plan says.

DeepSpeed puts flat partitions in the place of an optimiser's parameters, empties parameters (stage 3), and hooks every
module. Which of a model's parameters an optimiser steps, and what a rank holds, is then in DeepSpeed's own objects;
here they are asked, in deepspeed 0.19's words.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from packlight.records import Plan
from packlight.sharding.bare import bare
from packlight.sharding.shards import Sharding, Weight
from packlight.sharding.stages import ZeroOptions, zero_sharding

FLAGS = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
"""Without the first DeepSpeed refuses optimisers that it does not know; without the second, with states on the host, it
(and Accelerate, silently) replaces them."""

# Stages 1 and 2, then stage 3
PARTITIONS = (
    ("single_partition_of_fp32_groups", "bit16_groups"),
    ("fp32_partitioned_groups_flat", "fp16_groups"),
)
"""Attributes of DeepSpeed's wrapper: flat partitions, and the parameters in each."""


def is_engine(module: nn.Module) -> bool:
    """Tell whether a module is DeepSpeed's engine."""
    return isinstance(module, DeepSpeedEngine)


STAGE_3 = {
    "stage3_prefetch_bucket_size": "prefetch_elements",
    "stage3_param_persistence_threshold": "persistent_elements",
    "stage3_max_live_parameters": "live_elements",
    "stage3_max_reuse_distance": "live_elements",
    "sub_group_size": "sub_group_elements",
}
"""DeepSpeed's names of what a plan's options say for stage 3."""


class Engine:
    """DeepSpeed's engine at hand, after `deepspeed.initialize`.

    Args:
        engine: DeepSpeed's.

    Attributes:
        model: the module inside.
        stage: of ZeRO.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self.model: nn.Module = engine.module
        self.stage = int(engine.zero_optimization_stage())
        self._param_groups = list(self.optimizer.param_groups) if self.optimizer is not None else []

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser that steps, which DeepSpeed has wrapped."""
        found = getattr(self._optimizer, "optimizer", self._optimizer)
        return found if isinstance(found, torch.optim.Optimizer) else None

    @property
    def group(self) -> Any:
        """The process group of data-parallel ranks."""
        return self._engine.data_parallel_group

    def groups(self) -> list[list[torch.Tensor]]:
        """Return the model's parameters in each param group of the optimiser."""
        wrapped = self._optimizer
        if hasattr(wrapped, "bit16_groups"):
            return [list(group) for group in wrapped.bit16_groups]
        if self.stage == 3:
            found: dict[int, list[torch.Tensor]] = {}
            for at, sub_group in enumerate(wrapped.fp16_groups):
                found.setdefault(wrapped.sub_group_to_group_id.get(at, 0), []).extend(sub_group)
            return [found[at] for at in sorted(found)]
        if hasattr(wrapped, "fp16_groups"):
            return [list(group) for group in wrapped.fp16_groups]
        return [list(group["params"]) for group in wrapped.param_groups]

    def flats(self) -> list[torch.Tensor]:
        """Return what the optimiser steps, also what DeepSpeed has put out of its sight."""
        if self.partitions():
            return [flat for flat, _ in self.partitions()]
        return [param for group in getattr(self.optimizer, "param_groups", []) for param in group["params"]]

    def partitions(self) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Return each flat partition with the parameters that it has shares of; nothing in stage 0."""
        wrapped = self._optimizer
        for flats, groups in PARTITIONS:
            if hasattr(wrapped, flats):
                pairs = zip(getattr(wrapped, flats), getattr(wrapped, groups), strict=True)
                return [(flat, list(params)) for flat, params in pairs]
        return []

    def num_calls(self) -> int:
        """Return how often the optimiser's `step` is called in a step: for each flat partition."""
        return max(1, len(self.partitions()))

    def weights(self) -> list[Weight]:
        """Return the model's parameters, whole, with the group of each."""
        places = {id(param): at for at, group in enumerate(self.groups()) for param in group}
        return [
            Weight(name, _shape(param), param.dtype, is_trained=id(param) in places, group=places.get(id(param), 0))
            for name, param in self.model.named_parameters()
        ]

    def sharding(self) -> Sharding:
        """Return what a rank holds.

        Raises:
            ValueError: it does what is not planned for: states or parameters in a GPU's host memory, pipelines.
        """
        engine = self._engine
        zero = engine._config.zero_config
        self._refuse_others(zero)
        return zero_sharding(
            self.weights(),
            ZeroOptions(
                self.stage,
                torch.distributed.get_world_size(self.group),
                reduce_bucket_elements=int(zero.reduce_bucket_size),
                overlaps=bool(zero.overlap_comm) and self.stage < 3,
                contiguous_gradients=bool(zero.contiguous_gradients),
                prefetch_elements=int(zero.prefetch_bucket_size),
                persistent_elements=int(zero.param_persistence_threshold),
                live_elements=max(int(zero.max_live_parameters), int(zero.max_reuse_distance)),
                sub_group_elements=int(zero.sub_group_size),
                accumulates=engine.gradient_accumulation_steps() > 1,
            ),
        )

    def _refuse_others(self, zero: Any) -> None:
        device = next((param.device.type for param in self.model.parameters()), "cpu")
        offloads = [each for each in (zero.offload_optimizer, zero.offload_param) if each is not None]
        if device != "cpu" and any(str(each.device.value) != "none" for each in offloads):
            raise ValueError(
                "DeepSpeed keeps states or parameters in host memory (offload_optimizer, offload_param), which is not "
                "planned for yet; leave them out of its config"
            )
        if type(self._engine).__name__ == "PipelineEngine":
            raise ValueError("DeepSpeed's pipelines are not planned for; see packlight.pipeline")

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Give the optimiser the model's own parameters, and the modules no hooks, for as long as they are copied."""
        with bare(self.model, is_engines_key=lambda key: key.startswith(OWN), is_engines_hook=_is_deepspeeds):
            for module in self.model.modules():  # stage 3 has dictionaries of a kind of its own
                module.__dict__["_parameters"] = dict(module.__dict__["_parameters"].items())
            with self._whole_optimizer():
                yield

    @contextmanager
    def _whole_optimizer(self) -> Iterator[None]:
        """Give the optimiser all its groups, also where DeepSpeed shows it one of them, with the model's parameters."""
        optimizer = self.optimizer
        if optimizer is None:
            yield
            return
        shown, states, before = (
            optimizer.param_groups,
            optimizer.state,
            [group["params"] for group in self._param_groups],
        )
        try:
            optimizer.param_groups, optimizer.state = self._param_groups, defaultdict(dict)
            for group, params in zip(self._param_groups, self.groups(), strict=True):
                group["params"] = params
            yield
        finally:
            for group, params in zip(self._param_groups, before, strict=True):
                group["params"] = params
            optimizer.param_groups, optimizer.state = shown, states


def _shape(param: torch.Tensor) -> tuple[int, ...]:
    """Return a parameter's whole shape; stage 3 leaves an empty tensor in its place."""
    return tuple(getattr(param, "ds_shape", param.shape))


OWN = ("ds_", "_ds_", "_external_params", "_original_parameters", "all_parameters", "z3_", "_autocast")
"""What DeepSpeed's attributes of modules begin with."""


def _is_deepspeeds(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).startswith("deepspeed")


def config(
    plan: Plan,
    *,
    microbatch_size: int | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a config for `deepspeed.initialize` that does what a plan says of sharding.

    Args:
        plan: made with `world`, with ZeRO chosen.
        microbatch_size: rows of a microbatch on a rank; None where the base says it.
        base: a config whose other entries are kept.

    Returns:
        A dict that JSON can hold, with the flags that let packlight's optimisers stay.

    Raises:
        ValueError: the plan shares no states by ZeRO, or nobody says the microbatch's size.
    """
    sharded = plan.sharding
    if sharded is None or sharded.engine != "zero":
        came = "is for one rank" if sharded is None else f"shares states by {sharded.engine}"
        raise ValueError(f'the plan {came}; wanted one made with world and engine "zero"')
    made = dict(base or {})
    if microbatch_size is None and not {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(made):
        raise ValueError("neither the base nor microbatch_size says how many rows a microbatch has; give one of them")
    options = sharded.options
    zero: dict[str, Any] = {
        **made.get("zero_optimization", {}),
        "stage": sharded.stage,
        "reduce_bucket_size": options["reduce_bucket_elements"],
        "contiguous_gradients": True,
        "overlap_comm": sharded.stage > 0,
    }
    if sharded.stage == 3:
        zero |= {name: options[ours] for name, ours in STAGE_3.items()}
    made |= {"zero_optimization": zero, "gradient_accumulation_steps": plan.num_microbatches, **FLAGS}
    if microbatch_size is not None:
        made["train_micro_batch_size_per_gpu"] = microbatch_size
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if sharded.dtype == dtype:
            made[name] = {**made.get(name, {}), "enabled": True}
    return made
