"""Carries out what a plan says of a model's blocks and sites, and of its optimiser's states, undone by handles."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from packlight.activations.engine import Engine
from packlight.activations.offload import make_tier
from packlight.activations.recompute import Recomputation, recompute
from packlight.activations.sites import module_of
from packlight.activations.tier import OffloadError, Tier, Traffic
from packlight.measurement import Measurement
from packlight.optim.adopt import Adoption, adopt
from packlight.optim.early import EarlyUpdates, update_early
from packlight.planner.cut import flats_of, without_engine
from packlight.planner.exhausted import is_out_of_memory
from packlight.planner.loop import Call
from packlight.planner.places import level_of_user
from packlight.planner.plan import device_of
from packlight.planner.solve import EXACT_FORMATS
from packlight.planner.updates import parameter_names
from packlight.records import Plan


class Carried:
    """A plan's choices for blocks and sites, in force on a model until `remove`.

    Args:
        plan: the plan.
        handle: what undoes them.
        tier: where groups move to; None where none do.
    """

    def __init__(self, plan: Plan, handle: Recomputation | Engine, tier: Tier | None = None) -> None:
        self._plan, self._handle, self._tier = plan, handle, tier
        self._traffic: Traffic | None = None

    def saving(self, call: Call) -> AbstractContextManager[Any]:
        """Return a context for a forward that has begun already, in which what was carried out meanwhile counts."""
        return self._handle.saving(call.args, call.kwargs) if isinstance(self._handle, Engine) else nullcontext()

    def remove(self) -> None:
        """Undo the choices; again it does nothing."""
        self._look_at_traffic()
        self._tier = None
        self._handle.remove()

    def complete(self, measured: Measurement) -> Measurement:
        """Return a measurement with what was expected and what has moved; what was measured on the device stays."""
        self._look_at_traffic()
        expected = self._plan.estimate
        measured = replace(
            measured,
            predicted_peak_bytes=expected.device_peak_bytes,
            predicted_step_seconds=expected.step_seconds,
        )
        if self._traffic is None:
            return measured
        traffic, plan = self._traffic, self._plan
        in_host_bytes = traffic.most_stored_bytes if plan.tier == "host" else traffic.pinned_bytes
        return replace(
            measured,
            host_peak_bytes=0 if plan.device == "cpu" else in_host_bytes,  # there it is the device's own memory
            tier_peak_bytes=traffic.most_stored_bytes,
            out_bytes_per_second=traffic.bytes_out / traffic.seconds_out if traffic.seconds_out else 0.0,
            in_bytes_per_second=traffic.bytes_in / traffic.seconds_in if traffic.seconds_in else 0.0,
        )

    def _look_at_traffic(self) -> None:
        if self._tier is not None:
            with suppress(OffloadError):  # in a forked process, which has moved nothing
                self._traffic = self._tier.traffic()


def carry_out(plan: Plan, model: nn.Module) -> Carried:
    """Carry out a plan's choices for what a model saves.

    Args:
        plan: the plan.
        model: the model; changed in place.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        ValueError: the plan names blocks or sites that the model does not have.
    """
    sites = plan.site_choices()
    if not sites:  # nothing needs the engine's hooks
        return Carried(plan, recompute(model, sorted(plan.recomputed())))
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    missing = [site for site in sites if module_of(site) not in modules]
    if missing:
        raise ValueError(
            f"the plan has a choice for what {missing[0]!r} saves, and the model has no such module; "
            "was it made for another model?"
        )
    choices = dict.fromkeys(plan.recomputed(), "recompute") | sites
    if not plan.tier:
        return Carried(plan, Engine(model, choices))
    device = device_of(model)
    tier = make_tier(
        plan.tier,
        device=device,
        folder=plan.folder or None,
        max_in_flight_bytes=plan.window_bytes,
        late="steady" if plan.tier == "disk" else "wait",
    )
    try:
        return Carried(plan, Engine(model, choices, tier=tier, drains=True, uses=plan.uses), tier)
    except BaseException:
        tier.close()
        raise


class Adopted:
    """A plan's choices for an optimiser, in force until `remove`.

    Args:
        is_beside: whether the host's memory is another than the model's.
        adoption: what keeps states in another format or place; None where they are as they were.
        undo: undoes everything.
        early: what steps parameters inside backward; None where nothing does.
    """

    def __init__(
        self, adoption: Adoption | None, undo: Callable[[], None], *, is_beside: bool, early: EarlyUpdates | None = None
    ) -> None:
        self._adoption, self._undo, self._is_beside, self._host_bytes = adoption, undo, is_beside, 0
        self._early = early

    def extend(self, changed: Mapping[Tensor, str]) -> bool:
        """Take in parameters that get gradients since.

        Args:
            changed: formats of all states that are not torch's own, by parameter.

        Returns:
            False where states had all been torch's own, and some are not to be from now on: adopt anew then.
        """
        if self._adoption is None and changed:
            return False
        if self._adoption is not None:
            self._adoption.extend(changed)
        if self._early is not None:
            self._early.extend()
        return True

    def remove(self) -> None:
        """Undo the choices; again it does nothing."""
        self._look_at_host()
        self._adoption = None
        self._undo()

    def release(self) -> None:
        """Undo the choices at the end of a run; states for which the device has no room stay as they are."""
        try:
            self.remove()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            text = f"packlight: optimiser states stay where and as they are: {error}"
            warnings.warn(text, stacklevel=level_of_user())

    def complete(self, measured: Measurement) -> Measurement:
        """Return a measurement with what states take of the host's memory."""
        self._look_at_host()
        return replace(measured, host_peak_bytes=measured.host_peak_bytes + self._host_bytes)

    def _look_at_host(self) -> None:
        if self._adoption is not None and self._is_beside:
            self._host_bytes = self._adoption.host_bytes()


class Adoptions:
    """A plan's choices for several optimisers."""

    def __init__(self) -> None:
        self._adopted: dict[torch.optim.Optimizer, Adopted] = {}

    def adopt(self, plan: Plan, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Let optimisers keep their states as a plan says; those that do so already take in what is trained since."""
        for optimizer in optimizers:
            held = self._adopted.get(optimizer)
            if held is not None and held.extend(_changed(plan, model, optimizer)):
                continue
            if held is not None:
                held.remove()
            self._adopted[optimizer] = adopt_formats(plan, model, optimizer)

    def complete(self, measured: Measurement) -> Measurement:
        """Return a measurement with what states take of the host's memory."""
        for adopted in self._adopted.values():
            measured = adopted.complete(measured)
        return measured

    def release(self) -> None:
        """Undo the choices at the end of a run."""
        for adopted in self._adopted.values():
            adopted.release()


def meets_states(plan: Plan, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Tell whether optimisers have states already, as a resumed run's, for which a plan has other formats."""
    changes = not set(plan.state_formats.values()).issubset(EXACT_FORMATS)
    return changes and any(each.state for each in optimizers)


def adopt_formats(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> Adopted:
    """Let an optimiser keep its states, and use gradients, as a plan says.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        ValueError: the plan names a parameter that is not here, or wants a format for a state that this optimiser
            cannot keep in it.
    """
    changed = _changed(plan, model, optimizer)
    flats = flats_of(optimizer, changed)
    with ExitStack() as undo:
        adoption = adopt(optimizer, {} if flats else changed, flats=flats) if changed else None
        if adoption is not None:
            undo.callback(adoption.remove)
        early = update_early(optimizer, adoption) if plan.releases_gradients else None
        if early is not None:
            undo.callback(early.remove)
        return Adopted(adoption, undo.pop_all().close, is_beside=device_of(model).type != "cpu", early=early)


def _changed(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """Return the formats of states that are not to be torch's own."""
    with without_engine(model):
        names = parameter_names(model, optimizer)
    here = {*names.values(), *dict(model.named_parameters())}
    missing = [name for name in plan.state_formats if name not in here and not name.startswith("parameter ")]
    if missing:
        raise ValueError(
            f"the plan has a state for {missing[0]!r}, and the model has no such parameter; "
            "was it made for another model?"
        )
    formats = {parameter: plan.state_formats.get(name, "as is") for parameter, name in names.items()}
    return {parameter: chosen for parameter, chosen in formats.items() if chosen not in EXACT_FORMATS}
