"""An optimiser whose states are plain tensors in a chosen format: what AdamW and SGD share.

torch's optimisers allocate moments in the parameter's dtype: 8 bytes per parameter for AdamW in fp32, and in 16
bits a second moment that stops decaying. The classes here have their signatures and their behaviour (schedulers,
closures, param groups, hooks, GradScaler, checkpoints), and keep each parameter's state in a named format. It is
decided when the parameter is added, from its name and full shape, and stands in the param group as
`state_formats`, so a checkpoint says what it holds.

`Optimizer.load_state_dict` casts every state to the parameter's dtype, which would turn codes into floats. So on
loading the states are taken out before and put back after, converted if they came in another format or from
another library:

    1 a hook takes "state" out of the state dict   2 torch loads the param groups   3 a hook puts the states in

With `release_gradients` the update of a parameter runs inside backward as soon as its gradient is complete, and
frees it; then `step` only closes the round.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from packlight.numerics.settings import AdamWSettings, SGDSettings
from packlight.optim.checkpoint import Converter
from packlight.optim.flat import FRAGMENTS, Flat, shape_of
from packlight.optim.layout import Layout, layout_of
from packlight.optim.members import NUMBER, Member, Members
from packlight.optim.piece import local_of
from packlight.optim.policy import format_of
from packlight.optim.release import Release
from packlight.optim.roster import Options, Roster
from packlight.optim.soundness import check_loaded
from packlight.optim.state import State, check_dtype, check_range, nbytes
from packlight.optim.stepping import Scalars, check_dense, run, settle_all

ROUNDINGS = ("stochastic", "nearest", "master24", "master32")


class CompactOptimizer(Optimizer):
    """What AdamW and SGD share: formats by parameter, steps through the kernels, checkpoints."""

    # GradScaler hands `grad_scale` and `found_inf` to an optimiser that says so, instead of unscaling itself.
    _step_supports_amp_scaling = True
    converter: ClassVar[Converter]
    _release: Release | None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, release_gradients: bool) -> None:
        self._members = Members()
        self._forget()
        if release_gradients:
            self._release = Release(self.update)
        self.check(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, which has groups and states only; it does not release gradients."""
        release = self.__dict__.get("_release")  # loading a state dict comes through here too
        members = self.__dict__.get("_members")
        super().__setstate__(state)
        if members is None:
            self._members = Members()
            for group in self.param_groups:
                self._members.add(group)
        self._forget()
        self._release = release

    def _forget(self) -> None:
        self._release = None
        self._roster = Roster(self._members)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise where an option is out of its range.

        Args:
            options: of a param group, complete.

        Raises:
            ValueError: differentiable, a negative learning rate or weight decay, or an unknown rounding.
        """
        if options.get("differentiable"):
            raise ValueError(
                "differentiable=True came, False was wanted: parameters and states are rounded to codes, which has no "
                "gradient. Leave it out, or use torch.optim's optimiser."
            )
        check_range("lr", options["lr"], low=0.0)
        check_range("weight_decay", options["weight_decay"], low=0.0)
        if options["bf16_rounding"] not in ROUNDINGS:
            raise ValueError(f"bf16_rounding={options['bf16_rounding']!r} came, one of {ROUNDINGS} was wanted")

    def settings(self, group: Mapping[str, Any]) -> AdamWSettings | SGDSettings:
        """Return the hyper-parameters of a param group."""
        raise NotImplementedError

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the moments that a param group's states have."""
        return self.converter.moments

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own options and state format if they have any.

        Args:
            param_group: `params` and any options, as in torch.optim.Optimizer; also `state_format`.

        Raises:
            ValueError: as the constructor does; the group is not added then.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                check_dtype(param.dtype)
            group["state_formats"] = _formats_by_parameter(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._members.add(group)
        if self._release is not None:
            self._release.watch(group["params"])

    @overload
    def step(self, closure: None = None, *, clip_coefficient: Tensor | float | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, clip_coefficient: Tensor | float | None = None) -> float: ...
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, clip_coefficient: Tensor | float | None = None
    ) -> float | None:
        """Do one step for every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.
            clip_coefficient: gradients are multiplied by it as they are read, which saves a pass over them:
                min(1, max_norm / norm), a number or a tensor of one element. The gradients stay as they are.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError: a gradient is sparse; nothing has changed then.
            RuntimeError: gradients are released in backward, and the step was to scale or clip them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scalars = self._scalars(clip_coefficient)
        if self._release is not None:
            self._release.close_round(scalars)
        makes_only = self._makes_states_only()
        call = self._roster.call(self.param_groups, list(map(self._options, self.param_groups)), self.state)
        if makes_only:
            return loss
        for part in call.parts:
            settings, lr = self.settings(part.group), part.group["lr"]
            for batch in part.batches:
                batch.run(settings, scalars, lr=lr)
        settle_all((batch for part in call.parts for batch in part.batches), scalars)
        self._roster.keep(call)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def update(self, param: Tensor) -> None:
        """Do one step for one of the parameters, which has a gradient."""
        known, grad = self._roster.one(param, self.param_groups), param.grad
        check_dense([grad])
        if grad is not None:
            entries = self._roster.entries(known, grad, self._options(known.group), self.state)
            run(entries, self.settings(known.group), Scalars(), lr=known.group["lr"])

    def _makes_states_only(self) -> bool:
        """Tell whether a step only makes states: the first, at a learning rate of 0, with gradients of 0.

        So torch.distributed.checkpoint makes those into which it loads.

        Returns:
            True where the step does not count.
        """
        rates = [group["lr"] for group in self.param_groups]
        if self.state or not all(isinstance(lr, float | int) or lr.device.type == "cpu" for lr in rates) or any(rates):
            return False
        grads = (param.grad for group in self.param_groups for param in group["params"])
        return not any(local_of(grad).any() for grad in grads if grad is not None)

    def state_bytes(self) -> int:
        """Return the exact bytes of the states, also before the first step.

        A parameter without a state counts as what its first gradient will make it take; a frozen one counts
        nothing.

        Returns:
            The bytes of all state tensors.
        """
        return sum(map(self._bytes_of, self._members.placed(self.param_groups)))

    def state_dict(self, *, format: Literal["compact", "portable"] = "compact") -> dict[str, Any]:
        """Return the optimiser's state.

        Args:
            format: "compact": the tensors as they are stored, loadable by this class; "portable": fp32 moments and
                `step` on the CPU, which torch's optimiser of the same name loads too.

        Returns:
            Plain tensors, numbers, strings and containers: torch.load reads it with weights_only=True.

        Raises:
            ValueError: another format was asked for.
        """
        state_dict = super().state_dict()
        if format == "compact":
            return self._with_moments_of_flats(state_dict)
        if format != "portable":
            raise ValueError(f"format {format!r} came, 'compact' or 'portable' was wanted")
        states = {
            index: self.converter.portable(self.state[param], lies, self.moments(group))
            for index, param, lies, group in self._indexed(state_dict["param_groups"])
            if self.state.get(param)
        }
        groups = [self.converter.portable_group(group) for group in state_dict["param_groups"]]
        return {**state_dict, "state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of this class, of torch's, or of torchao's and bitsandbytes' likes.

        The hyper-parameters are the loaded ones, the state formats stay this optimiser's: other states are
        converted.

        Args:
            state_dict: it is not changed and shares no tensors with the result.

        Raises:
            ValueError: it has amsgrad's or another optimiser's states, does not fit the param groups, is damaged
                (see `soundness`), or has parameters' names in another order; nothing has changed then.
        """
        own = [dict(group) for group in self.param_groups]
        taken: dict[Tensor, State] = {}

        def take(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = loaded["param_groups"]
            options = [self.converter.own_group(group) for group in groups]
            for before, group in zip(own, options, strict=False):
                self.check({**before, **group, "bf16_rounding": before["bf16_rounding"]})
            if [len(group["params"]) for group in groups] == [len(group["params"]) for group in own]:
                check_loaded(loaded, own)
                taken.update(self._converted(loaded))
            return {**loaded, "state": {}, "param_groups": options}

        def put(_: Optimizer) -> None:
            for group, before in zip(self.param_groups, own, strict=True):
                kept = before.keys() & {"state_formats", NUMBER, "bf16_rounding", "decoupled_weight_decay"}
                for key in before.keys() - group.keys() | kept:
                    group[key] = before[key]
            self.state.update(taken)
            self._roster.clear()

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _with_moments_of_flats(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict in which flat partitions have torch's moments, too: ZeRO's converter looks for them.

        It cuts all tensors beside them where parameters are, so ours are a level below: for the same number of ranks.
        """
        moments = {
            index: self.converter.portable(self.state[param], lies, self.moments(group))
            for index, param, lies, group in self._indexed(state_dict["param_groups"])
            if isinstance(lies, Flat) and self.state.get(param)
        }
        states = {
            index: {**moments[index], FRAGMENTS: dict(state)} if index in moments else state
            for index, state in state_dict["state"].items()
        }
        return {**state_dict, "state": states}

    def _converted(self, loaded: dict[str, Any]) -> dict[Tensor, State]:
        taken = {}
        for saved_group, group in zip(loaded["param_groups"], self.param_groups, strict=True):
            members = self._members.of_group(group)
            for (index, saved), (param, lies) in zip(_saved_parameters(saved_group), members, strict=True):
                state = loaded["state"].get(index)
                if _holds(state):
                    taken[param] = self.converter.compact(state, param, lies, saved_format=saved, group=group)
        return taken

    def _options(self, group: dict[str, Any]) -> Options:
        return self.moments(group), group["bf16_rounding"], group["seed"]

    def _scalars(self, clip_coefficient: Tensor | float | None) -> Scalars:
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None:
            return Scalars(clip_coefficient, found_inf)
        inverse = 1 / scale
        return Scalars(inverse if clip_coefficient is None else inverse * clip_coefficient, found_inf)

    def _indexed(self, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Tensor, Layout | Flat, dict[str, Any]]]:
        for saved, group in zip(groups, self.param_groups, strict=True):
            for index, (param, lies) in zip(saved["params"], self._members.of_group(group), strict=True):
                yield index, param, lies, group

    def _bytes_of(self, member: Member) -> int:
        param, group = member.param, member.group
        if self.state.get(param):
            return nbytes(self.state[param])
        if not param.requires_grad:
            return 0
        options = {"moments": self.moments(group), "rounding": group["bf16_rounding"]}
        return member.lies.state_bytes(param.dtype, **options)


def _holds(state: Mapping[str, Any] | None) -> bool:
    """Tell whether a saved state has anything: torch's SGD without momentum saves a buffer of None."""
    return bool(state) and any(value is not None for value in (state or {}).values())


def _saved_parameters(group: Mapping[str, Any]) -> Iterator[tuple[int, str | None]]:
    """Pair a saved group's indices with their formats; other libraries' states and flat partitions have none."""
    formats = group.get("state_formats", [])
    fitting = formats if len(formats) == len(group["params"]) else [None] * len(group["params"])
    return zip(group["params"], fitting, strict=True)


def _formats_by_parameter(group: dict[str, Any]) -> list[str]:
    choice = group.pop("state_format")
    names = group.get("param_names", [None] * len(group["params"]))
    pairs = list(zip(names, group["params"], strict=True))
    made = [format_of(choice, name=name, shape=shape_of(param)) for name, param in pairs]
    for state_format, (_, param) in zip(made, pairs, strict=True):
        layout_of(param, state_format)  # a DTensor may have none
    return made
