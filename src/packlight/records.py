"""What passes between the stages: profile -> plan -> apply -> measurement, as plain frozen records.

PyTorch has no record of a training step's memory that can be printed, saved, compared and edited before the step
runs: its profiler writes traces of what already happened. Here every stage of packlight reads and writes the records
of this file and nothing else, so that deciding and doing are separate programs joined by a JSON file, and a saved
record can be read on a machine without torch.

The line of events that a `Profile` holds stands in `step.py`, for its size.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from packlight.budget import format_bytes

_Record = TypeVar("_Record")

SCHEMA = 1
"""Version of the JSON layout; a reader refuses a newer one."""

CATEGORIES = ("parameters", "gradients", "optimizer_states", "activations", "temporaries", "other")
"""What the bytes at a peak are divided into; "other" is buffers, batches and whatever else the script holds."""

CHOICES = ("keep", "recompute", "compress", "offload", "compress+offload")
"""What can be done with a group of storages."""


class JsonRecord:
    """Reading and writing for the records that stand in files of their own (`kind` names which)."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types, with `schema` and `kind` in front."""
        return {"schema": SCHEMA, "kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Build the record from what `to_dict` returned.

        Returns:
            The record.

        Raises:
            ValueError: another kind of record, another schema, or missing, unknown or wrong fields.
        """
        if not isinstance(data, Mapping) or data.get("kind") != cls.kind:
            got = data.get("kind") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"got a record of kind {got!r}; wanted {cls.kind!r}")
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"the record has schema {data.get('schema')!r} and this packlight reads {SCHEMA}; "
                "write it again, or use the packlight that wrote it"
            )
        return _build(cls, {key: value for key, value in data.items() if key not in ("schema", "kind")})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON; the file appears whole or not at all."""
        target = Path(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=1)
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record that `save` wrote.

        Returns:
            The record.

        Raises:
            ValueError: the file is not JSON, or not such a record.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Returns:
        The object.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not JSON ({error}); wanted a file that packlight wrote") from error
    if not isinstance(data, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(data).__name__}; wanted a file that packlight wrote")
    return data


def _build(cls: type[_Record], data: object, where: str = "") -> _Record:
    """Construct a dataclass from plain JSON types, as the types of its fields say; `where` it stands in the file."""
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {data!r:.60}; wanted the fields of a {cls.__name__}; was it edited?")
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {
        name
        for name, entry in fields.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    unknown, missing = sorted(set(data) - set(fields)), sorted(required - set(data))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; was it edited?")
    types = _field_types(cls)  # type: ignore[arg-type]
    return cls(**{name: _build_field(types[name], value, f"{where}.{name}") for name, value in data.items()})


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _build_field(kind: Any, value: Any, where: str) -> Any:
    """Build a field of a type from plain JSON types."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or (origin is UnionType and value is None):
        return value
    if origin is UnionType:
        return _build_field(parts[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build_field(parts[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _build_field(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    accepted = (int, float) if kind is float else kind
    if origin is not None or not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{where} is {value!r:.60}; wanted {getattr(kind, '__name__', kind)}; was it edited?")
    return value


@dataclass(frozen=True)
class Choice:
    """What is done with one group of storages.

    Attributes:
        group: the path of the block that saves them, or the site that saves them first.
        choice: one of `CHOICES`.
        bytes: what the group holds for backward if it is kept.
        seconds: what the choice adds to a step.
        codec: how it is encoded, where it is.
        sites: all that save the group, where it is no block.
    """

    group: str
    choice: str
    bytes: int
    seconds: float
    codec: str = ""
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a choice that nothing would carry out (a plan may have been edited by hand)."""
        if self.choice not in CHOICES:
            raise ValueError(f"the choice for {self.group!r} is {self.choice!r}; wanted one of {', '.join(CHOICES)}")


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to cost, before it runs.

    Attributes:
        device_peak_bytes: most bytes that tensors occupy on the training device at one moment of a step.
        host_peak_bytes: most bytes in host memory beyond that (0 where nothing is moved there).
        step_seconds: time of a step, from the first forward to the end of the optimiser's step.
        slowdown: `step_seconds` over that of keeping everything with the optimiser as it is.
        plain_peak_bytes: the device peak of keeping everything with the optimiser as it is.
        peak_by_category: `device_peak_bytes` divided by `CATEGORIES`.
        peak_moment: where in the step the peak stands: "forward", "backward" or "optimizer".
    """

    device_peak_bytes: int
    host_peak_bytes: int
    step_seconds: float
    slowdown: float
    plain_peak_bytes: int
    peak_by_category: Mapping[str, int]
    peak_moment: str


@dataclass(frozen=True)
class CurvePoint:
    """What the fastest plan for another budget would take; but for the budget as in `Estimate`."""

    budget_bytes: int
    device_peak_bytes: int
    step_seconds: float
    slowdown: float


@dataclass(frozen=True)
class Plan(JsonRecord):
    """What is chosen where, and what it is expected to cost; it can be printed, saved, compared and edited.

    Attributes:
        device: type of the training device.
        budget_bytes: bytes allowed on the device.
        exact: whether only choices that leave every loss and gradient bit-equal were allowed.
        choices: one for each group that could be chosen for.
        state_formats: the format of each parameter's optimiser state, by the parameter's name.
        smallest_budget_bytes: the least budget that a plan would fit.
        notes: what a reader should know, in sentences.
        tier, folder: where groups are moved to, "host" or "disk" ("" where none is), and the disk's folder.
        window_bytes: most that is on its way to the tier, and again from it.
        uses: sites in the order in which backward asks for what is moved or encoded there.
        hardware: the name of the device that it is made for; "" for the one at hand.
        curve: what other budgets would give, by growing budget; empty where it was not asked for.
    """

    kind: ClassVar[str] = "plan"

    device: str
    budget_bytes: int
    exact: bool
    choices: tuple[Choice, ...]
    state_formats: Mapping[str, str]
    estimate: Estimate
    smallest_budget_bytes: int
    notes: tuple[str, ...] = ()
    tier: str = ""
    folder: str = ""
    window_bytes: int = 0
    uses: tuple[str, ...] = ()
    hardware: str = ""
    curve: tuple[CurvePoint, ...] = ()

    def recomputed(self) -> frozenset[str]:
        """Return the paths of the blocks that are recomputed in backward."""
        return frozenset(choice.group for choice in self.choices if choice.choice == "recompute")

    def site_choices(self) -> dict[str, str]:
        """Return the choice by site for all groups that are encoded or moved, as `activations.Engine` reads it."""
        return {
            site: f"{each.choice}:{each.codec}" if each.choice.startswith("compress") else each.choice
            for each in self.choices
            for site in each.sites
        }

    def __str__(self) -> str:
        """Say in a few lines what is chosen, and what it is expected to cost."""
        estimate, recomputed = self.estimate, self.recomputed()
        formats = ", ".join(sorted(set(self.state_formats.values()))) or "none"
        num_blocks = sum(not choice.sites for choice in self.choices)
        lines = [
            f"plan for {format_bytes(self.budget_bytes)} on {self.hardware or self.device}{' (exact)' * self.exact}: "
            f"predicted peak {format_bytes(estimate.device_peak_bytes)} "
            f"({format_bytes(estimate.plain_peak_bytes)} if nothing is changed), "
            f"{estimate.step_seconds:.3g} s a step ({estimate.slowdown:.2f}x)",
            f"  blocks: {len(recomputed)} of {num_blocks} recomputed{_shorten(recomputed, self.choices)}",
            *self._treated_lines(),
            f"  optimiser states: {formats}",
            f"  at the peak ({estimate.peak_moment}): "
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in estimate.peak_by_category.items() if size),
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _treated_lines(self) -> list[str]:
        found: dict[str, list[int]] = {}
        moved = f"moved to the {self.tier}{f' in {self.folder}' if self.folder else ''}"
        for choice in self.choices:
            if choice.sites and choice.choice != "keep":
                held = [f"held as {choice.codec}"] * choice.choice.startswith("compress")
                way = " and ".join(held + [moved] * ("offload" in choice.choice))
                found.setdefault(way, []).append(choice.bytes)
        told = ((way, len(sizes), format_bytes(sum(sizes))) for way, sizes in sorted(found.items()))
        return [f"  saved tensors: {num_groups} {way}, {size} before" for way, num_groups, size in told]


def _shorten(recomputed: frozenset[str], choices: tuple[Choice, ...]) -> str:
    names = [choice.group for choice in choices if choice.group in recomputed]
    if not names:
        return ""
    return f": {', '.join(names)}" if len(names) <= 4 else f": {names[0]}, {names[1]}, ... {names[-1]}"


@dataclass(frozen=True)
class Measurement:
    """What happened in the run.

    Attributes:
        device_peak_bytes: on CUDA the allocator's peak, on the CPU the peak of live tensor bytes in the measured steps.
        host_peak_bytes: bytes in host memory beyond the device's (0 where nothing is moved there).
        reserved_peak_bytes: on CUDA what the allocator had reserved; None on the CPU.
        resident_peak_bytes: the process's peak resident size less its resident size before the first step.
        step_seconds: median time of the steps that were not watched op by op; None where there was none.
        num_steps: optimiser steps that the script took.
        num_measured_steps: how many of them the peak was taken over.
        losses: the values that backward was called on, summed over a step's microbatches: first and last ten.
        peak_by_category: `device_peak_bytes` divided by `CATEGORIES` (empty on CUDA).
        peak_moment: where in the step the peak stood.
        state_bytes: bytes of the optimiser's states at the end.
        plan_peak_bytes: the device peak in the measured steps that ran under the plan in force at the end, from their
            first forward on; None where no whole step was measured under it.
    """

    device_peak_bytes: int
    host_peak_bytes: int
    reserved_peak_bytes: int | None
    resident_peak_bytes: int
    step_seconds: float | None
    num_steps: int
    num_measured_steps: int
    losses: Mapping[str, tuple[float, ...]]
    peak_by_category: Mapping[str, int]
    peak_moment: str
    state_bytes: int
    plan_peak_bytes: int | None = None


@dataclass(frozen=True)
class Run(JsonRecord):
    """A run under packlight: the plan that was carried out, what was expected, and what happened.

    Attributes:
        script: the command line that was run.
        estimate: of the plan that was carried out, made before its first step.
        first_estimate: made before the script's first step, when the loss outside the model had not been seen.
    """

    kind: ClassVar[str] = "run"

    script: tuple[str, ...]
    plan: Plan | None
    estimate: Estimate | None
    first_estimate: Estimate | None
    measurement: Measurement
    environment: Mapping[str, Any] = field(default_factory=dict)
