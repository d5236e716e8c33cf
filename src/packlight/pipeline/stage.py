"""A stage of torch.distributed.pipelining that has on its device what the schedule says, and nothing besides.

torch makes a receive buffer for each microbatch of a step, keeps every input and output until backward, and keeps what
was sent until the step ends; so a chunk whose activations are away still has bytes for each microbatch. The idea: torch
needs those tensors' shapes and histories, not their bytes, and bytes are there for as long as somebody uses them.

    receive buffers   made when a message is asked for, not when training begins
    inputs            the module gets an alias; when its forward has ended, torch's own has its data taken away
    outputs           torch gets an alias; its data is taken away when it has been sent
    what is saved     is in a parcel of the microbatch (`parcels.py`), by the engine

What the module or a function of its own keeps besides is theirs, and stays.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from packlight.activations.engine import MIN_BYTES, Engine
from packlight.activations.offload import Tier
from packlight.pipeline.aliases import HANDED, handed, take_data
from packlight.pipeline.parcels import Parcel, Parcels
from packlight.pipeline.schedule import Action

EVERYTHING = {"*": "offload"}


class Stage(PipelineStage):
    """A `torch.distributed.pipelining.PipelineStage`, to be run by `Runtime`.

    Args:
        submodule: of the stage, on its device.
        stage_index: of `num_stages`; stages of a rank are its number plus multiples of the number of ranks.
        num_stages: of the whole pipeline.
        device: of the stage.
        choices: what is done with what a microbatch saves while it is to be away: see `Engine`. The default moves all.
        min_bytes: smaller storages stay.
        options: torch's own: `input_args`, `output_args`, `group`, `dw_builder` and the like.

    Raises:
        ValueError: choices that the engine refuses (when a `Runtime` takes the stage).
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        choices: Mapping[str, str] | None = None,
        min_bytes: int = MIN_BYTES,
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **options)
        self._choices, self._min_bytes = dict(EVERYTHING if choices is None else choices), min_bytes
        self._open: _Open | None = None

    def open(
        self, tier: Tier | None, moving: Collection[int], *, begins: Callable[[Action], None]
    ) -> Callable[[], None]:
        """Put the engine on the module; `Runtime` does.

        Args:
            tier: where parcels go.
            moving: the microbatches whose parcels are ever away.
            begins: is called with each action of compute, when what it needs from others is there.

        Returns:
            What takes it off.

        Raises:
            RuntimeError: another `Runtime` has the stage.
            ValueError: choices that the engine refuses.
        """
        if self._open is not None:
            raise RuntimeError(f"stage {self.stage_index} is run by another Runtime; close that one first")
        parcels = Parcels(tier, torch.device(self.device))
        engine = _StageEngine(self.submod, self._choices, tier=parcels, min_bytes=self._min_bytes)
        engine.parcels, engine.takes_inputs = parcels, not self.is_first
        self._open = _Open(parcels, frozenset(moving), begins)

        def close() -> None:
            engine.remove()
            self.forget()
            self.args_recv_info.clear()
            self.grad_recv_info.clear()
            self._open = None

        return close

    # What the schedule tells it

    def ask(self, kind: str, microbatch: int) -> None:
        """Make the buffers that a message is received in: "F" its inputs, "B" the gradients of its outputs."""
        for info, template in self._received(kind, microbatch):
            made = torch.empty_strided(template.size(), template.stride(), dtype=template.dtype, device=self.device)
            info.buffer = made.requires_grad_(template.requires_grad)

    def sent(self, microbatch: int) -> None:
        """Take the data away from outputs that have been sent."""
        if not self.has_backward:
            self.fwd_cache.pop(microbatch, None)
        for output in self.fwd_cache[microbatch][0] if microbatch in self.fwd_cache else ():
            if isinstance(output, Tensor) and type(output.grad_fn) is HANDED:
                take_data(output)

    def parcel(self, microbatch: int) -> Parcel:
        """Return what a microbatch holds."""
        assert self._open is not None
        return self._open.parcels_by_microbatch[microbatch]

    def release(self, microbatch: int) -> None:
        """Give up what a microbatch holds; autograd has let go of it, unless somebody else keeps its graph."""
        assert self._open is not None
        self._open.parcels_by_microbatch.pop(microbatch).give_up()

    def forget(self) -> None:
        """Give up what a step that failed has left."""
        assert self._open is not None
        for parcel in self._open.parcels_by_microbatch.values():
            parcel.give_up()
        self._open.parcels_by_microbatch.clear()
        self._open.postponed.clear()
        for microbatch in range(len(self.args_recv_info)):
            self._let_go("F", microbatch)
            self._let_go("B", microbatch)
        self.clear_runtime_states()
        for cache in (self.bwd_cache, self.backward_state, self.dw_runner):
            cache.clear()

    # What torch calls

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        if self._open is None:
            return super()._prepare_forward_infra(num_microbatches, *args, **kwargs)
        result = super()._prepare_forward_infra(1, *args, **kwargs)
        first, self._open.shapes = self.args_recv_info[0], None
        self._open.templates["F"] = tuple(_template(getattr(info, "buffer", None)) for info in first)
        for microbatch in range(num_microbatches):
            self.args_recv_info[microbatch] = tuple(copy.copy(info) for info in first)
            self._let_go("F", microbatch)
        return result

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[Any, ...]:
        if self._open is None:
            return super()._create_grad_recv_info(act_send_info)
        device, self.device = self.device, torch.device("meta")
        try:
            infos: tuple[Any, ...] = super()._create_grad_recv_info(act_send_info)
        finally:
            self.device = device
        self._open.templates["B"] = tuple(_template(info.buffer) for info in infos)
        return infos

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on aliases of its inputs, and return aliases of its outputs."""
        if not self._has_aliases():
            return super().forward_maybe_with_nosync(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not self.is_first:
            args = tree_map_only(Tensor, lambda each: each.view_as(each) if each.requires_grad else each, args)
        outputs = super().forward_maybe_with_nosync(*args, **kwargs)  # type: ignore[no-untyped-call]
        return tree_map_only(Tensor, handed, outputs)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch forward, what it saves in a parcel of its own."""
        if self._open is None:
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._open.begins(Action("F", self.stage_index, fwd_chunk_id))
        parcel = Parcel(moves=self.has_backward and fwd_chunk_id in self._open.moving)
        self._open.parcels_by_microbatch[fwd_chunk_id] = self._open.parcels.open = parcel
        try:
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        finally:
            self._open.parcels.open = Parcel(moves=False)
        self._check_shapes(fwd_chunk_id, output)
        for info, _ in self._received("F", fwd_chunk_id) if self._has_aliases() else ():
            if type(info.buffer) is Tensor and info.buffer.requires_grad:
                take_data(info.buffer)
        self._let_go("F", fwd_chunk_id)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch backward, or for the gradients of its inputs alone."""
        if self._open is None:
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            return
        self._open.begins(Action("B" if full_backward else "I", self.stage_index, bwd_chunk_id))
        if not (full_backward or self._needs_input_gradients(bwd_chunk_id)):
            self._open.postponed[bwd_chunk_id] = loss
            self.bwd_cache[bwd_chunk_id] = (None,) * len(self.args_recv_info[bwd_chunk_id])
            return
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._lay_out(bwd_chunk_id)
        self._let_go("B", bwd_chunk_id)
        if full_backward:
            self._open.end(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run a microbatch backward for the gradients of weights."""
        if self._open is None:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            return
        self._open.begins(Action("W", self.stage_index, bwd_chunk_id))
        if bwd_chunk_id in self._open.postponed:
            loss = self._open.postponed.pop(bwd_chunk_id)
            super().backward_one_chunk(bwd_chunk_id, loss, True, last_backward)
            self.bwd_cache.pop(bwd_chunk_id)
            self._let_go("B", bwd_chunk_id)
        else:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._open.end(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take gradients from the next stage on the same rank; where there is none, torch fills a buffer with zeros."""
        if not self.has_backward:
            return  # torch's own refuses what its `eval` does
        if self._open is not None and any(each is None for each in next_stage_bwd_outputs):
            self.ask("B", mb_index)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return gradients for the stage before on the same rank; none in `eval`."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def _has_aliases(self) -> bool:
        """Whether modules get and return aliases, so that what they stand for can be taken away."""
        return self._open is not None and self.has_backward and torch.is_grad_enabled()

    def _check_shapes(self, microbatch: int, output: Any) -> None:
        """Refuse outputs of other shapes than the first one's, whose messages would have what was in memory before.

        Raises:
            ValueError: a microbatch is smaller or larger than others.
        """
        assert self._open is not None
        shapes = [tuple(each.shape) for each in tree_leaves(output) if isinstance(each, Tensor)]
        if self._open.shapes is None:
            self._open.shapes = shapes
        if shapes != self._open.shapes:
            raise ValueError(
                f"microbatch {microbatch} gives stage {self.stage_index} outputs of shapes {shapes}, and the pipeline "
                f"was set up for {self._open.shapes}: all microbatches of all steps have one shape. Pad the batch, "
                "drop the last one (drop_last=True), or make a new Runtime for batches of another size"
            )

    def _lay_out(self, microbatch: int) -> None:
        """Give gradients that are to be sent the strides that were announced; autograd chose them without the data."""
        assert self._open is not None
        made: list[Any] = list(self.bwd_cache.get(microbatch, ()))
        for at, (gradient, template) in enumerate(zip(made, self._open.templates.get("F", ()), strict=False)):
            if type(gradient) is Tensor and template is not None:
                strides = self._announced(at, template)
                if gradient.stride() != strides and gradient.shape == template.shape:
                    made[at] = torch.empty_strided(
                        gradient.shape, strides, dtype=gradient.dtype, device=gradient.device
                    )
                    made[at].copy_(gradient)
        if made:
            self.bwd_cache[microbatch] = tuple(made)

    def _announced(self, at: int, template: Tensor) -> tuple[int, ...]:
        """Return the strides of an input's gradient that the stage before was told; torch 2.11 takes the input's."""
        known = getattr(getattr(self, "_stage_meta", None), "input_grads", None)
        found = known[at] if known and at < len(known) else None
        return tuple(getattr(found, "stride", template.stride()))

    def _needs_input_gradients(self, microbatch: int) -> bool:
        """Tell whether I has anything to do; where stages before are frozen, torch's finds no way to the weights."""
        if self.is_first or microbatch not in self.fwd_cache:  # it is not there in `eval`
            return True
        inputs: list[Any] = self.fwd_cache[microbatch][1]
        return any(isinstance(each, Tensor) and each.requires_grad for each in inputs)

    def _received(self, kind: str, microbatch: int) -> list[tuple[Any, Tensor]]:
        """Return each message's record and its form."""
        assert self._open is not None
        infos = (self.args_recv_info if kind == "F" else self.grad_recv_info).get(microbatch, ())
        pairs = zip(infos, self._open.templates.get(kind, ()), strict=True)
        return [(info, template) for info, template in pairs if template is not None]

    def _let_go(self, kind: str, microbatch: int) -> None:
        for info, template in self._received(kind, microbatch):
            info.buffer = template


def cannot_split(stage: Stage) -> str | None:
    """Tell why a stage's backward cannot be split into that of inputs and that of weights; None if it can."""
    if any(isinstance(each, DistributedDataParallel) for each in stage.submod.modules()):
        return "replicated by DistributedDataParallel, which would not see the gradients of its weights"
    for each in stage.submod.modules():
        if isinstance(each, torch._dynamo.OptimizedModule) or getattr(each, "_compiled_call_impl", None) is not None:
            return "compiled, and a compiled backward is one piece"
    return None


class _StageEngine(Engine):
    """An engine that looks after what moves, and leaves the rest to autograd."""

    parcels: Parcels
    takes_inputs: bool

    def begin(self, arguments: object) -> saved_tensors_hooks | None:
        """Begin a forward; where its parcel stays, nothing needs hooks."""
        return super().begin(arguments) if self.parcels.open.moves else None

    def lasting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return what lives on: not a message, which nobody else has."""
        return (kwargs,) if self.takes_inputs else (args, kwargs)


class _Open:
    """What a stage has while a `Runtime` runs it."""

    def __init__(self, parcels: Parcels, moving: frozenset[int], begins: Callable[[Action], None]) -> None:
        self.parcels, self.moving, self.begins = parcels, moving, begins
        self.parcels_by_microbatch: dict[int, Parcel] = {}
        self.postponed: dict[int, Any] = {}  # microbatches whose W does all, and their losses
        self.templates: dict[str, tuple[Tensor | None, ...]] = {}
        self.shapes: list[tuple[int, ...]] | None = None  # of outputs

    def end(self, microbatch: int) -> None:
        """Forget a parcel that needs no release: autograd has let go of it."""
        if microbatch in self.parcels_by_microbatch and not self.parcels_by_microbatch[microbatch].moves:
            del self.parcels_by_microbatch[microbatch]


def _template(buffer: Tensor | None) -> Tensor | None:
    if buffer is None:
        return None
    made = torch.empty_strided(buffer.size(), buffer.stride(), dtype=buffer.dtype, device="meta")
    return made.requires_grad_(buffer.requires_grad)
