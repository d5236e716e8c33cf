"""Compact states for an optimiser that already exists, in place.

A training script builds its own torch.optim.AdamW, hands it to schedulers and to a GradScaler (both wrap its
`step`, some before, some after us), and saves its state_dict. So neither the object, its class nor its `step`
may change; PyTorch offers hooks around a step, and nothing inside it. But a step calls its closure before it
looks at any gradient, and skips parameters without one. That is all it takes:

    optimizer.step(closure)
      1 pre-hook: hands torch's step a closure of ours, in place of the script's or of none
      2 torch's step calls it, after all hooks: the script's closure runs; managed parameters are updated here
      3 torch's own step, unhooked, for the others: managed gradients are out of sight for as long as it runs,
        and come back even if it raises
      4 now all gradients are out of sight: what remains of the outer step finds nothing to do or to fail at
      5 post-hook: the gradients are put back (post-hooks that the script registered earlier run before it)

Where parameters are stepped inside backward (`early.py`), that calls `update` for each instead of step 2. States in
host memory are stepped there (`hosted.py`).

state_dict() shows managed states as torch's own (fp32 exp_avg, exp_avg_sq, step); loading encodes them again,
before torch casts them to the parameter's dtype. A deep copy or a pickle of the optimiser has no hooks, so
its states are torch's own too.

Source of the formats: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023, arXiv 2309.01507.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from packlight.numerics.noise import seed_of
from packlight.optim.adoptable import check_formats, group_refusal, raise_if
from packlight.optim.adopted_state import CompactState, moments_of, own_state, show_portable
from packlight.optim.flat import Flat
from packlight.optim.hidden import HiddenGradients
from packlight.optim.hosted import HostStep, placed
from packlight.optim.layout import Layout, layout_of
from packlight.optim.piece import local_of
from packlight.optim.state import MOMENTS, State, group_settings, nbytes, step_device
from packlight.optim.stepping import Entry, Scalars, check_dense, run

_adopted: "weakref.WeakKeyDictionary[Optimizer, weakref.ref[Adoption]]" = weakref.WeakKeyDictionary()


class Adoption:
    """What `adopt` returns: undone by `remove()`, or at the end of a with statement."""

    def __init__(self, optimizer: Adam, state_formats: Mapping[Tensor, str], flats: Mapping[Tensor, Flat]) -> None:
        self._optimizer = optimizer
        self._formats = dict.fromkeys(flats, "")
        self._flats = dict(flats)
        self._host = HostStep(())
        self._hidden = HiddenGradients()
        self._loaded: dict[Tensor, State] = {}
        self._history: dict[tuple[Tensor, int], int] = {}
        self._num_calls = 0
        self._places: dict[Tensor, int] = {}
        self._manage(state_formats)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(show_portable),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def extend(self, state_formats: Mapping[Tensor, str]) -> None:
        """Keep the states of more parameters in our formats, as ones that are trained later.

        Args:
            state_formats: as `adopt` takes it; nothing changes for parameters that are managed already.

        Raises:
            ValueError: as `adopt`; nothing has changed then.
        """
        new = {param: name for param, name in state_formats.items() if param not in self._formats}
        for group in self._optimizer.param_groups:
            raise_if(group_refusal(group))
        check_formats(set(_params(self._optimizer)), new)
        self._manage(new)

    def _manage(self, state_formats: Mapping[Tensor, str]) -> None:
        chosen = {param: placed(name) for param, name in state_formats.items() if name != "fp32"}
        self._formats |= {param: name for param, (name, _) in chosen.items()}
        self._host.add(param for param, (_, on_host) in chosen.items() if on_host)
        for param in (*chosen, *self._flats):
            state = self._optimizer.state.get(param)
            if state and not isinstance(state, CompactState):
                self._adopt_state(param, self._encode(param, state))

    def state_bytes(self) -> int:
        """Return the exact bytes of the optimiser's states, managed or not, on any tier, also before the first step.

        A parameter without a state counts as what its first gradient will make it take; a frozen one counts
        nothing.

        Returns:
            The bytes of all state tensors.
        """
        return sum(self._bytes_of(param) for param in _params(self._optimizer))

    def host_bytes(self) -> int:
        """Return what states in host memory take there by now, and the copies to and from them."""
        states = (self._optimizer.state.get(param) for param in self._host.params)
        return sum(nbytes(state) for state in states if isinstance(state, CompactState)) + self._host.num_bytes

    def remove(self) -> None:
        """Give the optimiser back as it was: no hooks, all states in torch's own form.

        A second call does nothing.

        Raises:
            torch.OutOfMemoryError: states find no room beside their parameters. Those in host memory have not changed
                then; of others some may have torch's form, until their next step. `state_dict()` needs no room there.
        """
        self._hidden.show()
        groups = dict.fromkeys(self._flats, self._optimizer.param_groups[0])
        groups |= {param: group for group in self._optimizer.param_groups for param in group["params"]}
        states = [(param, self._optimizer.state.get(param)) for param in groups]
        compact = {param: state for param, state in states if isinstance(state, CompactState)}
        on_host = [param for param in compact if param in self._host.params]
        self._optimizer.state.update({param: own_state(compact.pop(param), param, groups[param]) for param in on_host})
        for param, state in compact.items():
            self._optimizer.state[param] = own_state(state, param, groups[param])
        self._host.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _adopted.pop(self._optimizer, None)

    def __enter__(self) -> Self:
        """Return the handle."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the adoption."""
        self.remove()

    # 1
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._hidden.show()  # still hidden if another post-hook raised in the step before
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        return args[:1], {**kwargs, "closure": partial(self._step, closure)}

    # 2 to 4
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else closure()  # torch's step has enabled gradients
        with torch.no_grad():
            self._update_managed()
            with self._hidden.without(self._formats):
                unhooked_step(self._optimizer)
            self._hidden.hide(_params(self._optimizer))
        return loss

    def step_now(self) -> None:
        """Do the step in which this was made, after its closure; torch's own finds no gradient then."""
        self._step(None)

    # 5
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden.show()

    def _update_managed(self) -> None:
        # GradScaler sets these on an optimiser with fused=True for the time of its step.
        scale, found_inf = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        scalars = Scalars(None if scale is None else 1 / scale, found_inf)
        self._num_calls += 1
        self._find_places()
        for group in self._optimizer.param_groups:
            found = [param for param in group["params"] if param in self._formats and param.grad is not None]
            check_dense(param.grad for param in found)
            entries = (self._entries(param, param.grad, num_calls=self._num_calls) for param in found)
            self._run(list(chain.from_iterable(entries)), group, scalars)

    def update(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Do the step of one managed parameter now, inside backward; `step` comes after it.

        Args:
            param: a parameter with a gradient.
            group: its param group.

        Returns:
            False for a parameter that is not managed; nothing is done then.
        """
        if param not in self._formats or param.grad is None:
            return False
        check_dense([param.grad])
        if param not in self._places:
            self._find_places()
        self._run(list(self._entries(param, param.grad, num_calls=self._num_calls + 1)), group, Scalars())
        return True

    def _run(self, entries: Sequence[Entry], group: Mapping[str, Any], scalars: Scalars) -> None:
        on_host = self._host.params
        self._host.run([each for each in entries if each.param in on_host], group, scalars)  # first: it may raise
        run([each for each in entries if each.param not in on_host], group_settings(group), scalars, lr=group["lr"])

    def _find_places(self) -> None:
        """Number the parameters: their random bits hang on it."""
        self._places |= {param: at for at, param in enumerate(_params(self._optimizer))}
        self._places |= {param: at for at, param in enumerate(self._flats)}  # of which ZeRO-3 shows one at a time

    def _entries(self, param: Tensor, grad: Tensor, *, num_calls: int) -> Iterator[Entry]:
        whole = self._state_of(param)
        for at, layout in enumerate(whole.layout.parts):
            state = whole.layout.part_state(whole, layout)
            key = (param, at)
            history = self._history[key] if key in self._history else int(state["step"])
            self._history[key] = history = hash((history, num_calls))
            seed, tensors = layout.seed(seed_of(at, self._places[param])), layout.tensors(state, layout.keys())
            own, slope = layout.view(param), layout.view(grad)
            yield Entry(own, slope, state, tensors, layout.state_format, "nearest", seed, history, layout.if_piece())

    def _state_of(self, param: Tensor) -> CompactState:
        state = self._optimizer.state.get(param)
        if isinstance(state, CompactState):
            return state
        if state:  # given back by a `remove` that found no room for the others
            return self._adopt_state(param, self._encode(param, state))
        return self._adopt_state(param, self._layout(param).init_state(param, device=self._place(param)))

    def _place(self, param: Tensor) -> torch.device:
        return torch.device("cpu") if param in self._host.params else local_of(param).device

    def _encode(self, param: Tensor, state: Mapping[str, Any]) -> State:
        return self._layout(param).from_portable(moments_of(state), device=self._place(param))

    def _layout(self, param: Tensor) -> Layout | Flat:
        return self._flats[param] if param in self._flats else layout_of(param, self._formats[param])

    def _adopt_state(self, param: Tensor, state: State) -> CompactState:
        if "step" in state:
            state["step"] = state["step"].to(step_device(self._place(param)))
        for key in [key for key in self._history if key[0] is param]:
            del self._history[key]
        self._optimizer.state[param] = compact = CompactState(state, param, self._layout(param))
        return compact

    def _bytes_of(self, param: Tensor) -> int:
        state = self._optimizer.state.get(param)
        if state:
            return nbytes(state)
        if not param.requires_grad:
            return 0
        if param in self._formats:
            return self._layout(param).state_bytes(param.dtype)
        return 4 + len(MOMENTS) * local_of(param).nbytes

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Encode managed states before torch casts them, and leave the others to torch."""
        for group in state_dict["param_groups"]:
            raise_if(group_refusal(group))
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        managed = {
            index: param for index, param in zip(indices, _params(optimizer), strict=False) if param in self._formats
        }
        states = state_dict["state"]
        self._loaded = {at: self._encode(at, states[index]) for index, at in managed.items() if states.get(index)}
        return {**state_dict, "state": {key: state for key, state in states.items() if key not in managed}}

    def _after_load(self, optimizer: Optimizer) -> None:
        self._history.clear()
        while self._loaded:
            self._adopt_state(*self._loaded.popitem())


def adopt(
    optimizer: Optimizer, state_formats: Mapping[Tensor, str], *, flats: Mapping[Tensor, Flat] | None = None
) -> Adoption:
    """Make an existing AdamW or Adam keep its states in our formats, in place.

    States that exist are encoded and freed. Parameters that are not named, or named "fp32", stay with torch's
    own step.

    Args:
        optimizer: exactly a torch.optim.AdamW or torch.optim.Adam; the object, its class and its `step` stay
            what they are.
        state_formats: from parameter (the tensor object) to a format's name; with "@host" behind it, the state is in
            host memory, and the CPU's kernels do the step ("fp32@host" too, so not with torch's own bits).
        flats: from flat partitions, which ZeRO has put in the place of parameters, to how their states are to lie; they
            need not be in the param groups now.

    Returns:
        The handle: `remove()` undoes it, `state_bytes()` counts.

    Raises:
        ValueError: `can_adopt` gives a reason, a format is unknown, or a parameter is not the optimiser's or
            of a dtype that the formats do not take.

    Example:
        >>> model = torch.nn.Linear(256, 256)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> handle = adopt(optimizer, {model.weight: "4bit"})
        >>> handle.state_bytes() < 0.15 * 8 * 256 * 257
        True
        >>> handle.remove()
    """
    raise_if(can_adopt(optimizer))
    assert isinstance(optimizer, Adam)
    check_formats(set(_params(optimizer)), state_formats)
    handle = Adoption(optimizer, state_formats, flats or {})
    _adopted[optimizer] = weakref.ref(handle)
    return handle


def adoption_of(optimizer: Optimizer) -> Adoption | None:
    """Return what keeps an optimiser's states in our formats; None where nothing does."""
    found = _adopted.get(optimizer)
    return None if found is None else found()


def can_adopt(optimizer: Optimizer) -> str | None:
    """Tell why an optimiser cannot be adopted.

    Args:
        optimizer: any optimiser.

    Returns:
        The reason, or None if `adopt` will take it.
    """
    if type(optimizer) not in (AdamW, Adam):
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        return f"it is a {name}, not torch.optim.AdamW or torch.optim.Adam"
    if optimizer in _adopted:
        return "it has been adopted already; remove() that handle first"
    reasons = (group_refusal(group) for group in optimizer.param_groups)
    return next((reason for reason in reasons if reason is not None), None)


def unhooked_step(optimizer: Optimizer) -> None:
    """Call torch's own step without its hooks: the class keeps it below the wrapper that calls them."""
    step = type(optimizer).step
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)
