"""Which parameters a step does and with what, found once and again only where something has changed.

Around the step of a small parameter there is more bookkeeping than arithmetic: its state, the names and the order of
the state's tensors, its seed, which parameters are at the same step. From one step to the next only gradients are
new. So a step keeps its batches, and the next one looks at what they came of, in loops that run in C:

    1 the groups, their options, and which parameters have a gradient   2 devices and dtypes of the parameters
    3 the states and every tensor in them   4 that nobody else has counted steps

Anything that is not as it was, and all batches are made anew. What a kernel hangs on besides (addresses, shapes) is
looked at there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight.numerics.noise import seed_of
from packlight.optim.flat import Flat
from packlight.optim.layout import Layout
from packlight.optim.members import Members
from packlight.optim.piece import is_dtensor, local_of
from packlight.optim.state import State, check_unmade
from packlight.optim.stepping import Batch, Entry, batches_of, check_dense

Groups = Sequence[dict[str, Any]]
Options = tuple[tuple[str, ...], str, int]
States = dict[Tensor, State]

_GRAD, _DTYPE, _VERSION = map(attrgetter, ("grad", "dtype", "_version"))


@dataclass
class Known:
    """What an optimiser knows of a parameter besides its state.

    Attributes:
        param: the parameter.
        group: its param group.
        lies: how its state lies.
        index: its place among all parameters, also where only one group is to be seen.
        history: equal for parameters that went through the same steps; None before the first.
        seeds: the group's seed, and the parameter's own that comes of it.
    """

    param: Tensor
    group: dict[str, Any]
    lies: Layout | Flat
    index: int
    history: int | None = None
    seeds: tuple[int, int] | None = None


class Part(NamedTuple):
    """A param group's share of a step.

    Attributes:
        group: the param group.
        options: what of it decides how its parameters are done: the names of the moments, the rounding, the seed.
        params: its parameters.
        idle: for each of them, whether it lacks a gradient.
        batches: the others, as calls do them.
        members: of each batch: the places of its parameters in `params`, and what is known of them.
    """

    group: dict[str, Any]
    options: Options
    params: list[Tensor]
    idle: list[bool]
    batches: list[Batch]
    members: list[list[tuple[int, Known]]]

    def follows(self, group: dict[str, Any], options: Options, grads: Sequence[Tensor | None]) -> bool:
        """Tell whether the next step of a group has the same parameters and options."""
        return (
            self.group is group
            and self.options == options
            and _same(group["params"], self.params)
            and [grad is None for grad in grads] == self.idle
        )


class Kept(NamedTuple):
    """The parts of the last step, and what they came of.

    Attributes:
        parts: one per param group.
        states: of all parameters.
        tensors: of all states.
        params: those of all parts.
        devices: the numbers of their devices, -1 for the CPU.
        dtypes: theirs.
        steps: the step counters.
        pieces: what is here of parameters that are DTensors.
        versions: how often these were written.
    """

    parts: list[Part]
    states: list[State]
    tensors: list[Tensor]
    params: list[Tensor]
    devices: list[int]
    dtypes: list[torch.dtype]
    steps: list[Tensor]
    pieces: list[Tensor]
    versions: list[int]

    @classmethod
    def of(cls, parts: list[Part], states: States) -> "Kept":
        """Return what is to be kept of a step that was done."""
        params = [param for part in parts for param in part.params]
        tensors = list(chain.from_iterable(map(dict.values, states.values())))
        steps = [step for part in parts for batch in part.batches for step in batch.steps]
        devices, dtypes = list(map(Tensor.get_device, params)), list(map(_DTYPE, params))
        pieces = [local_of(param) for param in params if is_dtensor(param)]
        return cls(parts, list(states.values()), tensors, params, devices, dtypes, steps, pieces, [])

    def still_holds(self, states: States) -> bool:
        """Tell whether states, devices, dtypes and step counters are what the last step left."""
        return (
            _same(states.values(), self.states)
            and _same(chain.from_iterable(map(dict.values, states.values())), self.tensors)
            and list(map(Tensor.get_device, self.params)) == self.devices
            and list(map(_DTYPE, self.params)) == self.dtypes
            and list(map(_VERSION, self.steps)) == self.versions
            and (not self.pieces or _same((local_of(each) for each in self.params if is_dtensor(each)), self.pieces))
        )

    def after(self) -> "Kept":
        """Return what is to be kept for the step after: no gradients, and the counters as they are now."""
        for part in self.parts:
            for batch in part.batches:
                batch.grads = []
        return self._replace(versions=list(map(_VERSION, self.steps)))


class Roster:
    """What an optimiser knows of its parameters from the steps before."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self._known: dict[int, Known] = {}
        self._num_calls = 0
        self._kept: dict[tuple[int, ...], Kept] = {}  # by groups: ZeRO steps them one by one

    def clear(self) -> None:
        """Forget everything but how many calls there were."""
        self._known, self._kept = {}, {}

    def call(self, groups: Groups, options: Sequence[Options], states: States) -> Kept:
        """Return a step's parts, with the gradients that there are now; once it is done, `keep` is to follow.

        Args:
            groups: the param groups.
            options: of each.
            states: of all parameters; those that lack one get it.

        Raises:
            ValueError: a gradient is sparse; nothing has changed then.
        """
        self._num_calls += 1
        kept = self._kept.pop(tuple(map(id, groups)), None)  # gone if the step fails
        found = [list(map(_GRAD, group["params"])) for group in groups]
        for grads in found:
            check_dense(grads)
        if kept is not None and self._repeats(kept, groups, options, found) and kept.still_holds(states):
            for part, grads in zip(kept.parts, found, strict=True):
                self._renew(part, grads)
            return kept
        made = zip(groups, options, found, strict=True)
        return Kept.of([self._part(*each, groups, states) for each in made], states)

    def keep(self, done: Kept) -> None:
        """Remember the step that was done, for the next."""
        self._kept[tuple(id(part.group) for part in done.parts)] = done.after()

    def _repeats(
        self, kept: Kept, groups: Groups, options: Sequence[Options], found: Sequence[Sequence[Tensor | None]]
    ) -> bool:
        """Tell whether a step has the same parameters and options as the last."""
        return len(kept.parts) == len(groups) and all(
            part.follows(group, each, grads)
            for part, group, each, grads in zip(kept.parts, groups, options, found, strict=True)
        )

    def one(self, param: Tensor, groups: Groups) -> Known:
        """Return what is known of a parameter that is stepped alone."""
        self._num_calls += 1
        self._kept = {}
        known = self._known_of(param, groups)
        if not any(known.group is group for group in groups):
            self._known = {}
            known = self._known_of(param, groups)
        return known

    def entries(self, known: Known, grad: Tensor, options: Options, states: States) -> list[Entry]:
        """Return a parameter's entries, one for each part of it; a state that it lacks is made."""
        moments, rounding, seed = options
        param, lies, state = known.param, known.lies, states[known.param]
        if known.seeds is None or known.seeds[0] != seed:
            known.seeds = seed, seed_of(seed, known.index)
        if isinstance(lies, Flat) and moments and set(state) == {"step", *moments}:  # as DeepSpeed loads it
            state = states[param] = lies.from_portable(state, moments=moments)
            known.history = None
        if not lies.is_complete(state, moments):
            check_unmade(state, param, moments, state_format=lies.state_format)
            fresh = lies.init_state(param, moments=moments, rounding=rounding)
            state = states[param] = fresh | {key: value for key, value in state.items() if key == "param_error"}
            known.history = None
        entries = []
        for number, layout in enumerate(lies.parts):
            share = lies.part_state(state, layout)
            if known.history is None:
                known.history = int(share["step"])
            if not number:
                known.history = hash((known.history, self._num_calls))
            if rounding == "stochastic" and param.dtype == torch.bfloat16:
                layout = layout.rounded_at_random()
            own_seed = layout.seed(seed_of(known.seeds[1], number) if number else known.seeds[1])
            tensors, name = layout.tensors(share, layout.keys(moments)), layout.state_format if moments else ""
            own, slope, kept = layout.view(param), layout.view(grad), layout.if_piece()
            entries.append(Entry(own, slope, share, tensors, name, rounding, own_seed, known.history, kept))
        return entries

    def _part(
        self,
        group: dict[str, Any],
        options: Options,
        grads: Sequence[Tensor | None],
        groups: Groups,
        states: States,
    ) -> Part:
        params = list(group["params"])
        given = [(place, grad) for place, grad in enumerate(grads) if grad is not None]
        places: dict[int, tuple[int, Known]] = {}
        entries = list[Entry]()
        for place, grad in given:
            known = self._known_of(params[place], groups)
            for entry in self.entries(known, grad, options, states):
                places[id(entry.param)] = place, known
                entries.append(entry)
        batches = batches_of(entries)
        members = [[places[id(param)] for param in batch.params] for batch in batches]
        return Part(group, options, params, [grad is None for grad in grads], batches, members)

    def _renew(self, part: Part, grads: Sequence[Tensor | None]) -> None:
        """Give a part this step's gradients and histories: a batch's parameters go through the same steps."""
        for batch, members in zip(part.batches, part.members, strict=True):
            batch.grads = [
                grads[place] if layout is None else layout.view(grads[place])  # type: ignore[misc, arg-type]
                for (place, _), layout in zip(members, batch.layouts, strict=True)
            ]
            history = hash((members[0][1].history, self._num_calls))
            for _, known in members:
                known.history = history

    def _known_of(self, param: Tensor, groups: Groups) -> Known:
        """Return what is known of a parameter, by its identity: a tensor's hash takes longer."""
        known = self._known.get(id(param))
        if known is None or known.param is not param:
            found = self._known
            for each, lies, group, index in self.members.placed(groups):
                before = found.get(id(each))
                history = before.history if before is not None and before.param is each else None
                found[id(each)] = Known(each, group, lies, index, history)
            known = self._known.get(id(param))
        if known is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} came that is in no param group any more; "
                "build the optimiser anew instead of taking groups out of it"
            )
        return known


def _same(these: Iterable[Any], those: Sequence[Any]) -> bool:
    """Tell whether two sequences have the same objects."""
    found = list(these)
    return len(found) == len(those) and all(map(is_, found, those))
