"""AdamW whose states take a chosen number of bytes per parameter.

torch.optim.AdamW allocates both moments in the parameter's dtype: 8 bytes per parameter in fp32, and in 16
bits a second moment that stops decaying. This class has its signature and its behaviour around it
(schedulers, closures, param groups, hooks, checkpoints), and keeps each parameter's state in a named format.
The format is decided per parameter when it is added, from its name and its full shape, and stands in the
param group as `state_formats`, so a checkpoint says what it holds.

`Optimizer.load_state_dict` casts every state to the parameter's dtype, which would turn 4-bit codes into
floats. So on loading the states are taken out before and put back after, converted if they came in another
format:

    1 a hook takes "state" out of the state dict   2 torch loads the param groups   3 a hook puts the states
    in

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv 1711.05101), algorithm
2; the formats from Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv
2309.01507).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from packlight.optim.state import (
    State,
    check_dtype,
    from_portable,
    group_settings,
    init_state,
    nbytes,
    state_bytes,
    to_portable,
    update,
)

StateFormatChoice = str | Mapping[str, str] | Callable[[str], str]

# What torch.optim.AdamW's param groups hold besides ours; a portable state_dict has them.
TORCH_GROUP_OPTIONS = {
    "amsgrad": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class AdamW(Optimizer):
    """torch.optim.AdamW with states in a chosen format.

    Args:
        params: parameters, named parameters (`model.named_parameters()`) or param groups.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and the second moment per step.
        eps: added to the denominator.
        weight_decay: decoupled decay per unit of lr.
        amsgrad: only False; it is here because it is torch's sixth positional argument.
        maximize: ascend instead of descend.
        state_format: a format's name ("fp32", "paper4bit"), a mapping from every parameter's name to one, or
            a callable that gets a parameter's name and returns one. Tensors of at most 4096 elements are
            always kept in fp32.

    Raises:
        ValueError: an unknown format, a hyper-parameter out of range, amsgrad, a parameter dtype that is not
            fp32, bf16 or fp16, or formats by name for parameters without names.

    Example:
        >>> model = torch.nn.Linear(256, 256)
        >>> formats = {"weight": "paper4bit", "bias": "fp32"}
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-2, state_format=formats)
        >>> model(torch.ones(1, 256)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_codes"].shape
        torch.Size([32768])
    """

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
        state_format: StateFormatChoice = "paper4bit",
    ) -> None:
        _refuse_amsgrad(amsgrad)
        _check_range("lr", lr, low=0.0)
        _check_range("betas[0]", betas[0], low=0.0, below=1.0)
        _check_range("betas[1]", betas[1], low=0.0, below=1.0)
        _check_range("eps", eps, low=0.0)
        _check_range("weight_decay", weight_decay, low=0.0)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**options, "state_format": state_format})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own options and state format if they have any.

        Args:
            param_group: `params` and any options, as in torch.optim.Optimizer; also `state_format`.

        Raises:
            ValueError: as the constructor does; the group is not added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _refuse_amsgrad(group.get("amsgrad", False))
            for param in group["params"]:
                check_dtype(param.dtype)
            group["state_formats"] = _formats_by_parameter(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step for every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = group_settings(group)
            for param, state_format in _parameters(group):
                if param.grad is not None:
                    state = self._state_of(param, state_format)
                    update(param, param.grad, state, state_format=state_format, settings=settings)
        return loss

    def state_bytes(self) -> int:
        """Return the exact bytes of the states, also before the first step.

        A parameter without a state counts as what its first gradient will make it take; a frozen one counts
        nothing.

        Returns:
            The bytes of all state tensors.
        """
        return sum(self._bytes_of(param, state_format) for param, state_format in self._all_parameters())

    def state_dict(self, *, format: Literal["compact", "portable"] = "compact") -> dict[str, Any]:
        """Return the optimiser's state.

        Args:
            format: "compact": the tensors as they are stored, loadable by this class; "portable": fp32
                exp_avg, exp_avg_sq and step on the CPU (8 bytes per parameter there), which torch.optim.AdamW
                loads too.

        Returns:
            Plain tensors, numbers, strings and containers: torch.load reads it with weights_only=True.

        Raises:
            ValueError: another format was asked for.
        """
        state_dict = super().state_dict()
        if format == "compact":
            return state_dict
        if format != "portable":
            raise ValueError(f"format {format!r} came, 'compact' or 'portable' was wanted")
        return self._portable(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of torch.optim.AdamW returned.

        The hyper-parameters are the loaded ones, the state formats stay this optimiser's: other states are
        converted.

        Args:
            state_dict: compact or portable; it is not changed and shares no tensors with the result.

        Raises:
            ValueError: it has amsgrad's states, or does not fit the param groups.
        """
        taken: dict[str, Any] = {}
        formats = [group["state_formats"] for group in self.param_groups]

        def take(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            for group in loaded["param_groups"]:
                _refuse_amsgrad(group.get("amsgrad", False))
            taken.update(loaded)
            return {**loaded, "state": {}}

        def put(_: Optimizer) -> None:
            for group, own in zip(self.param_groups, formats, strict=True):
                for option in TORCH_GROUP_OPTIONS:
                    group.pop(option, None)
                group["state_formats"] = own
            self._put_states(taken)

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _put_states(self, taken: dict[str, Any]) -> None:
        saved = chain.from_iterable(_saved_parameters(group) for group in taken["param_groups"])
        states = {
            param: _converted(taken["state"][index], param, saved_format=saved_format, state_format=state_format)
            for (index, saved_format), (param, state_format) in zip(saved, self._all_parameters(), strict=True)
            if index in taken["state"]
        }
        self.state.update(states)

    def _portable(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        portable = {
            index: to_portable(self.state[param], shape=param.shape, state_format=state_format, device="cpu")
            for index, (param, state_format) in zip(indices, self._all_parameters(), strict=True)
            if param in self.state
        }
        groups = [{**TORCH_GROUP_OPTIONS, **group} for group in state_dict["param_groups"]]
        for group in groups:
            del group["state_formats"]
        return {**state_dict, "state": portable, "param_groups": groups}

    def _all_parameters(self) -> Iterator[tuple[Tensor, str]]:
        return chain.from_iterable(map(_parameters, self.param_groups))

    def _state_of(self, param: Tensor, state_format: str) -> State:
        state: State = self.state[param] or init_state(param, state_format)
        self.state[param] = state
        return state

    def _bytes_of(self, param: Tensor, state_format: str) -> int:
        if param in self.state:
            return nbytes(self.state[param])
        return state_bytes(param.shape, param.dtype, state_format) if param.requires_grad else 0


def _refuse_amsgrad(amsgrad: object) -> None:
    if amsgrad:
        raise ValueError(
            "amsgrad=True came, amsgrad=False was wanted: its third moment has no compact format. "
            "Leave amsgrad out, or use torch.optim.AdamW."
        )


def _check_range(name: str, value: float | Tensor, *, low: float, below: float = float("inf")) -> None:
    if not low <= float(value) < below:
        raise ValueError(f"{name}={float(value)} came, a number from {low} up to below {below} was wanted")


def _parameters(group: Mapping[str, Any]) -> Iterator[tuple[Tensor, str]]:
    return zip(group["params"], group["state_formats"], strict=True)


def _saved_parameters(group: Mapping[str, Any]) -> Iterable[tuple[int, str]]:
    """Pair a saved group's indices with their formats; torch's own states are what fp32 is here."""
    return zip(group["params"], group.get("state_formats", ["fp32"] * len(group["params"])), strict=True)


def _converted(state: dict[str, Any], param: Tensor, *, saved_format: str, state_format: str) -> State:
    if saved_format == state_format and saved_format != "fp32":
        home = {key: torch.device("cpu") if key == "step" else param.device for key in state}
        return {key: value.to(home[key], copy=True) for key, value in state.items()}
    if saved_format != "fp32":
        state = to_portable(state, shape=param.shape, state_format=saved_format)
    return from_portable(state, state_format=state_format, device=param.device)


def _formats_by_parameter(group: dict[str, Any]) -> list[str]:
    """Settle the state format of each parameter of a group, by its name where that is asked for."""
    choice = group.pop("state_format")
    if isinstance(choice, str):
        names = [choice] * len(group["params"])
    elif "param_names" not in group:
        raise ValueError(
            "state_format is given by parameter name, but the parameters have no names. "
            "Pass model.named_parameters() instead of model.parameters()."
        )
    else:
        names = [_format_by_name(choice, name) for name in group["param_names"]]
    for name, param in zip(names, group["params"], strict=True):
        state_bytes(param.shape, param.dtype, name)
    return names


def _format_by_name(choice: Mapping[str, str] | Callable[[str], str], name: str) -> str:
    if not isinstance(choice, Mapping):
        return choice(name)
    if name not in choice:
        raise ValueError(
            f"state_format has no entry for the parameter {name!r}. "
            "Add one, or pass a callable: lambda name: mapping.get(name, 'paper4bit')."
        )
    return choice[name]
