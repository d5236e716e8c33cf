"""A training step as a record: the births and deaths of its storages on one line of events.

PyTorch can trace a step's memory only as it happens, under one choice of what is kept. The idea here: a storage that
autograd saves has two ends, the one that it would have without autograd (`Storage.died`) and the one that autograd
gives it (`Save.released`). With both known, every choice is arithmetic on intervals: *keep* ends a storage at its
release, *recompute* ends it at its natural death and gives birth to it again just before its block's backward.
`planner/profile.py` writes this record from one step on fake tensors, `planner/cost.py` does the arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from packlight.serial import JsonRecord


@dataclass(frozen=True)
class Storage:
    """A storage that the step creates.

    Attributes:
        num_bytes: its size.
        born: the event at which it appears.
        died: the event at which everybody but autograd has let go of it; `Profile.num_events` where it outlives the
        step.
        phase: where it was born: "forward", "loss", "backward" or "recompute" (inside the script's own checkpoints).
        is_gradient: whether it is a parameter's gradient at the end of backward.
        completed: of a gradient that an optimiser could use alone, the event at which it is complete; else -1.
    """

    num_bytes: int
    born: int
    died: int
    phase: str
    is_gradient: bool = False
    completed: int = -1


@dataclass(frozen=True)
class Save:
    """A storage saved for backward at one site, from the event `packed` until autograd releases it at `released`.

    Attributes:
        unpacked: the event at which backward takes it.
        used: the event at which backward lets go of what it took out of the save; a recomputed storage ends there,
        a little before a kept one. `released` where backward never takes it.
        site: the name of the site; "" outside of the model.
        encoding: how it may be held in another form: "codes" (rounded), "mask" (bits), "sign" (one bit, and the
        storage again for the next save), "bytes" (only moved); "" where it stays anyway.
        num_elements: of the storage.
        packed_seconds, unpacked_seconds: predicted time from the beginning of the step to these events.
    """

    storage: int
    region: int
    packed: int
    released: int
    unpacked: int
    used: int
    site: str = ""
    encoding: str = ""
    num_elements: int = 0
    packed_seconds: float = 0.0
    unpacked_seconds: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where storages were made.

    Attributes:
        site: the path of the module, or what they are.
        code: the line: "model.py:41 in forward".
        storages: which, by index.
    """

    site: str
    code: str
    storages: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """The way to a tier, and what it costs to use it.

    Attributes:
        tier: "host" or "disk".
        out_bytes_per_second, in_bytes_per_second: bandwidths.
        busy_seconds_per_byte: what a copy in either direction takes from compute while both run.
        capacity_bytes: most that may be stored.
        staging_bytes: what copies take of the host's memory for themselves, from the first one on.
        folder: of the disk tier.
        busy_seconds_per_copy: what each copy takes from compute besides, whatever its size; pipelines do not count it.
    """

    tier: str
    out_bytes_per_second: float
    in_bytes_per_second: float
    busy_seconds_per_byte: float
    capacity_bytes: int
    staging_bytes: int = 0
    folder: str = ""
    busy_seconds_per_copy: float = 0.0


@dataclass(frozen=True)
class EngineSeconds:
    """What the engine takes of compute, predicted.

    Attributes:
        codec_seconds: to encode and decode one element, by codec.
        call_seconds: for each tensor that is encoded or moved, besides.
        save_seconds: for each tensor that is saved while the engine looks on, whatever is done with it; it does so as
            soon as one is encoded or moved.
        again_seconds: for each tensor that a recomputed block saves, besides the operators of its second run; what a
            block takes by itself is in it, for a block of some twenty saves.
    """

    codec_seconds: Mapping[str, float] = field(default_factory=dict)
    call_seconds: float = 0.0
    save_seconds: float = 0.0
    again_seconds: float = 0.0


@dataclass(frozen=True)
class Region:
    """One call of a block in forward, the unit that can be recomputed.

    Attributes:
        block: the module's path.
        start, end: the events between which its forward runs.
        last_packed: the event of its last save, where a recomputation stops.
        unpacked: the event in backward at which the first of its saves is wanted.
        released: the event at which autograd has released all of its saves, parameters too.
        inputs, outputs: the storages of its tensor arguments and of its results.
        forward_seconds: predicted time of its forward.
        copied_bytes: what a recomputed call copies of its buffers.
        saved_copies: for each buffer that it saves its bytes and the event at which backward lets go of it; where the
        region is recomputed these are copies.
        drops_side_outputs: while it is recomputed it does not fill caches that outlive it (key-value caches).
        num_saves: tensors that autograd saves in it, parameters too.
    """

    block: str
    start: int
    end: int
    last_packed: int
    unpacked: int
    released: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    forward_seconds: float
    copied_bytes: int = 0
    saved_copies: tuple[tuple[int, int], ...] = ()
    drops_side_outputs: bool = False
    num_saves: int = 0


@dataclass(frozen=True)
class Tail:
    """What the script allocates between the model's forward and its backward: the loss, and what comes after.

    Bytes are counted above the live bytes at the end of the model's forward; from backward on, above what would live
    then of these, without outputs that nobody holds any more.

    Attributes:
        outputs: which of the model's output tensors receive a gradient, by position.
        forward_peak_bytes: most while the loss is computed.
        saved_bytes: when backward begins.
        backward_peak_bytes: most until the gradient reaches the model's outputs.
        after_backward_bytes: most between backward and the optimiser's step, above the end of backward.
        carried_bytes: what the loop still holds of the loss when the optimiser steps, and in the next forward.
    """

    outputs: tuple[int, ...]
    forward_peak_bytes: int
    saved_bytes: int
    backward_peak_bytes: int
    after_backward_bytes: int = 0
    carried_bytes: int = 0


@dataclass(frozen=True)
class OptimizerCost:
    """What a state format costs on the training device.

    Attributes:
        state_format: its name; "as is" for an optimiser that packlight does not know.
        state_bytes: all states together.
        temporary_bytes: most that a step allocates beside parameters, gradients and states.
        seconds: predicted time of a step.
        formats: the format of each parameter's state, by the parameter's name (small ones stay fp32).
        num_elements: elements of each of these parameters.
        alone_bytes: most that the step of one parameter alone allocates, whatever its size.
        alone_share: the same for each byte of its gradient.
        host_bytes: what states in host memory take there, and the copies to and from them.
        host_seconds: predicted time of the steps that the host's kernels do.
        out_bytes, in_bytes: what goes to the host for these (gradients, parameters), and comes back.
        largest_share: of these, what the largest parameter has: it goes before the first step, or comes after the last.
    """

    state_format: str
    state_bytes: int
    temporary_bytes: int
    seconds: float
    formats: Mapping[str, str]
    alone_bytes: int = 0
    alone_share: float = 0.0
    host_bytes: int = 0
    host_seconds: float = 0.0
    out_bytes: int = 0
    in_bytes: int = 0
    largest_share: float = 0.0
    num_elements: Mapping[str, int] = field(default_factory=dict)

    @property
    def own_format(self) -> str:
        """The format's name, wherever the states are."""
        return self.state_format.partition("@")[0]


@dataclass(frozen=True)
class Profile(JsonRecord):
    """One training step as a line of events (births and deaths of storages).

    Attributes:
        resident_bytes: bytes by category that live before the step begins and until it ends.
        num_events: the length of the line.
        forward_end, backward_start: events at which the model's forward ends and the first backward begins.
        optimizers: the state formats that can be chosen, the optimiser's present one first.
        num_microbatches: forward and backward passes in a step.
        seconds: predicted time of one forward, loss and backward without recomputation.
        after_backward_bytes: most bytes between backward and the optimiser's step, above the end of backward.
        carried_bytes: what the loop still holds of the loss of the step before, until backward begins.
        batch_bytes: the model's arguments.
        carries_outputs: whether the loop still holds the model's outputs when the next step begins.
        carried_before_bytes: what it holds of them when the plan begins, made under another plan.
        engine: what is predicted for the engine's own work.
        num_saves: tensors that autograd saves in the model's forward, parameters too.
        forward_seconds: predicted time to the end of the model's forward, of `seconds`.
        link: the way to the tier that tensors may be moved to.
        notes: what a reader should know, in sentences.
        hardware: the name of the device that seconds and allocations are predicted for; "" for the one at hand.
        places: where the storages were made that are not small.
    """

    kind: ClassVar[str] = "profile"

    device: str
    resident_bytes: Mapping[str, int]
    num_events: int
    forward_end: int
    backward_start: int
    storages: tuple[Storage, ...]
    saves: tuple[Save, ...]
    regions: tuple[Region, ...]
    optimizers: tuple[OptimizerCost, ...]
    num_microbatches: int
    seconds: float
    after_backward_bytes: int = 0
    carried_bytes: int = 0
    batch_bytes: int = 0
    carries_outputs: bool = True
    carried_before_bytes: int = 0
    engine: EngineSeconds = field(default_factory=EngineSeconds)
    num_saves: int = 0
    forward_seconds: float = 0.0
    link: Link | None = None
    notes: tuple[str, ...] = ()
    hardware: str = ""
    places: tuple[Place, ...] = ()

    @property
    def staging_bytes(self) -> int:
        """What copies to the tier need for themselves on the device; those of a GPU are in host memory."""
        return self.link.staging_bytes if self.link is not None and self.device == "cpu" else 0

    @property
    def hook_seconds(self) -> float:
        """What a step takes more where the engine looks on as tensors are saved."""
        return self.num_saves * self.engine.save_seconds * self.num_microbatches

    def second_run_seconds(self, region: Region) -> float:
        """Return the predicted time of a block's second run."""
        return region.forward_seconds + region.num_saves * self.engine.again_seconds

    def update_seconds(self, optimizer: OptimizerCost) -> float:
        """Return the predicted time of an optimiser's step: most copies go on beside the host's kernels."""
        copy_seconds = self.copy_seconds(optimizer)
        beside = max(optimizer.host_seconds, copy_seconds)
        return optimizer.seconds + beside + copy_seconds * optimizer.largest_share

    def copy_seconds(self, optimizer: OptimizerCost) -> float:
        """Return what the copies of a step take whose states are in host memory."""
        if self.link is None or not optimizer.host_bytes:
            return 0.0
        out, back = self.link.out_bytes_per_second, self.link.in_bytes_per_second
        return optimizer.out_bytes / out + optimizer.in_bytes / back

    def takes(self, optimizer: OptimizerCost) -> bool:
        """Tell whether there is room for a state format in host memory, if it wants any."""
        if not optimizer.host_bytes:
            return True
        return self.link is not None and self.link.tier == "host" and optimizer.host_bytes <= self.link.capacity_bytes
