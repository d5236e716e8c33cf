"""Recompute: a block keeps its inputs only, and runs its forward again when backward needs what was inside.

`torch.utils.checkpoint` does this for a function that the user wraps. Two things are missing for a model that nobody
edits: it must be put around blocks that exist already and come off again without a trace, and a block with side
effects must have them once. The idea: the block's `forward` is replaced on the instance (its hooks stay outside, as
they would around the block), and buffers that the forward changes (running statistics of batch norm) are put back to
their earlier values for the second run and to their present ones after it.

Layers that follow transformers' `GradientCheckpointingLayer` protocol bring their own switch, which also keeps the
key-value cache from being filled twice; there the switch is used. Technique: Chen et al. 2016, arXiv 1604.06174.
"""

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from packlight.activations.blocks import Block, find_blocks

MAX_COPIED_ELEMENTS = 2**16
"""Buffers up to this size are copied at every call of a recomputed block."""

_state = threading.local()
_Slot = tuple[dict[str, torch.Tensor | None], tuple[int, str], torch.Tensor]


def is_recomputing() -> bool:
    """Tell whether this thread is running a block's forward for the second time."""
    return getattr(_state, "depth", 0) > 0


def drawn_state() -> tuple[Any, ...]:
    """Return the state of the random generators that are not torch's: Python's own, and numpy's where it is loaded."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy else None


def set_drawn_state(state: tuple[Any, ...]) -> None:
    """Put those generators into a state that `drawn_state` returned."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


class Recomputation:
    """Blocks that are recomputed until `remove` is called; also a context manager."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        """Keep what undoes each block."""
        self._undo = list(undo)

    def remove(self) -> None:
        """Give every block its own forward back; calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        """Return the handle itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Undo."""
        self.remove()


def recompute(model: nn.Module, blocks: Iterable[str] | None = None) -> Recomputation:
    """Recompute blocks of a model in backward instead of keeping what they save.

    Losses and gradients stay bit-equal where the forward is deterministic for a fixed random state.

    Args:
        model: the model; changed in place.
        blocks: paths of blocks as `find_blocks` names them; None for all of them.

    Returns:
        A handle whose `remove()` undoes it; it works as a context manager too.

    Raises:
        ValueError: a path that the model has no block for, or a block that is recomputed already.

    Source: Chen et al. 2016, arXiv 1604.06174; torch.utils.checkpoint (non-reentrant).

    >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)])
    >>> with recompute(model, ["1"]):
    ...     model(torch.randn(2, 4)).sum().backward()
    """
    known = {block.path: block for block in find_blocks(model)}
    wanted = list(known) if blocks is None else list(blocks)
    missing = [path for path in wanted if path not in known]
    if missing:
        raise ValueError(f"the model has no block {missing[0]!r}; its blocks are {', '.join(known) or 'none'}")
    twice = [path for path in wanted if _is_recomputed(model.get_submodule(known[path].module_path))]
    if twice:
        raise ValueError(f"block {twice[0]!r} is recomputed already; remove() that handle first")
    undo = []
    runs: dict[str, list[Block]] = {}
    for block in (known[path] for path in wanted):
        if block.start is None:
            undo.append(_recompute_module(model.get_submodule(block.module_path)))
        else:
            runs.setdefault(block.module_path, []).append(block)
    undo += [_recompute_runs(model.get_submodule(path), parts) for path, parts in runs.items()]
    return Recomputation(undo)


def follows_protocol(module: nn.Module) -> bool:
    """Tell whether a layer has transformers' own switch for recomputation (`GradientCheckpointingLayer`)."""
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def recomputes_itself(module: nn.Module) -> bool:
    """Tell whether the user already switched recomputation on in a layer or around it."""
    return follows_protocol(module) and bool(getattr(module, "gradient_checkpointing", False))


def copied_buffers(*modules: nn.Module) -> list[torch.Tensor]:
    """Return the buffers that a recomputed call of these modules copies, and its second run once more."""
    return [buffer for _, _, buffer in _Buffers(*modules).slots() if buffer.numel() <= MAX_COPIED_ELEMENTS]


def _is_recomputed(module: nn.Module) -> bool:
    ours = (_Recomputed, _RecomputedRuns, _ProtocolFunction)
    return any(isinstance(value, ours) for value in module.__dict__.values())


def _recompute_module(module: nn.Module) -> Callable[[], None]:
    if not follows_protocol(module):
        return _replace(module, forward=_Recomputed(module))
    return _replace(module, gradient_checkpointing=True, _gradient_checkpointing_func=_ProtocolFunction(module))


def _recompute_runs(module: nn.Module, runs: Sequence[Block]) -> Callable[[], None]:
    assert isinstance(module, nn.Sequential)
    return _replace(module, forward=_RecomputedRuns(module, [(run.start or 0, run.stop or 0) for run in runs]))


def _replace(module: nn.Module, **values: object) -> Callable[[], None]:
    """Set instance attributes, and return what puts the former ones back."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)

    def undo() -> None:
        for name in values:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)

    return undo


class _Recomputed:
    """Stands in for a module's `forward`; a copy or a pickle of the module gets the plain forward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = "forward" in module.__dict__  # not the class's
        self._forward = module.forward
        self._buffers = _Buffers(module)
        functools.update_wrapper(self, self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._forward, self._buffers, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial, (self._forward,)) if self._own else (getattr, (self._module, "forward"))


class _ProtocolFunction:
    """What a `GradientCheckpointingLayer` calls to run its own forward; a copy or pickle is torch's checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = _Buffers(module)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if isinstance(function, functools.partial):  # the layer's keyword arguments are hidden in it
            return _run(function.func, self._buffers, *function.args, *args, **function.keywords)
        return _run(function, self._buffers, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial, (checkpoint,), (checkpoint, (), {"use_reentrant": False}, None))


class _RecomputedRuns:
    """Stands in for the `forward` of an `nn.Sequential` of which some runs of layers are recomputed."""

    def __init__(self, module: nn.Sequential, runs: Sequence[tuple[int, int]]) -> None:
        self._module = module
        self._runs = {start: (stop, _Buffers(*list(module)[start:stop])) for start, stop in runs}
        functools.update_wrapper(self, module.forward)

    def __call__(self, value: Any) -> Any:
        layers = list(self._module)
        position = 0
        while position < len(layers):
            stop, buffers = self._runs.get(position, (position + 1, None))
            run = functools.partial(_chain, layers[position:stop])
            value = run(value) if buffers is None else _run(run, buffers, value)
            position = stop
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "forward")


def _chain(layers: Sequence[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def _run(function: Callable[..., Any], buffers: "_Buffers", *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # Tensors in keywords and tuples go in one by one: only so does autograd notice if one is overwritten later.
    leaves, structure = tree_flatten((args, kwargs))
    first = [(args, kwargs)]

    def call(*flat: Any) -> Any:
        if first:  # with the caller's own lists and dicts: what the block writes into them must arrive
            own_args, own_kwargs = first.pop()
            return function(*own_args, **own_kwargs)
        nested_args, nested_kwargs = tree_unflatten(flat, structure)
        return function(*nested_args, **nested_kwargs)

    return checkpoint(call, *leaves, use_reentrant=False, context_fn=buffers.contexts)


class _Buffers:
    """The buffers of a block, so that its second run starts from the values of the first and changes nothing.

    A change cannot be told from a buffer's version: batch norm's kernels write running statistics without raising
    it. So small buffers are always copied; a large one (a mask, a table) is compared by value at the first call.

    ```
    1 first run    note each buffer's tensor and version; copy the small ones and those known to change
    2 after it     at the first call, compare the large ones; later, a version that rose for the first time is an error
    3 second run   the noted values are put in place, on copies
    4 after it     the present tensors are put back
    ```
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._changing: set[tuple[int, str]] | None = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of the first and of the second run, for `checkpoint`."""
        noted: dict[tuple[int, str], torch.Tensor] = {}
        return self._first_run(noted), _SecondRun(self, noted, drawn_state())

    def slots(self) -> Iterator[_Slot]:
        """Yield every buffer with the dictionary that it stands in and a key of its own."""
        owners = (owner for module in self._modules for owner in module.modules())
        for position, owner in enumerate(owners):
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    yield owner._buffers, (position, name), buffer

    def parameters(self) -> list[Any]:
        """Return every parameter likewise; `torch.func.functional_call` puts others in place for one call."""
        owners = (owner for module in self._modules for owner in module.modules())
        return [
            (owner._parameters, (position, name), parameter)
            for position, owner in enumerate(owners)
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]

    @contextmanager
    def _first_run(self, noted: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
        before = {key: (buffer, buffer._version) for _, key, buffer in self.slots()}  # step 1
        with torch.no_grad():
            for key, (buffer, _) in before.items():
                if self._changing is None or key in self._changing or buffer.numel() <= MAX_COPIED_ELEMENTS:
                    noted[key] = buffer.clone()
        yield
        if self._changing is None:  # step 2
            self._changing = {key for _, key, buffer in self.slots() if key in noted and _differs(buffer, noted[key])}
            versions = {key: version for key, (_, version) in before.items()}
            self._changing |= {key for _, key, buffer in self.slots() if buffer._version > versions.get(key, 0)}
        for _, key, buffer in self.slots():
            tensor, version = before.get(key, (buffer, buffer._version))
            if key not in noted and (buffer is not tensor or buffer._version != version):
                raise RuntimeError(
                    f"buffer {key[1]!r} of {buffer.numel()} elements changed in forward for the first time, after "
                    "earlier calls had left it alone; its block cannot be recomputed, so keep that block"
                )
        for key in [key for key in noted if key not in self._changing]:
            if noted[key].numel() > MAX_COPIED_ELEMENTS:
                del noted[key]

    def swap_in(self, noted: dict[tuple[int, str], torch.Tensor]) -> list[_Slot]:
        """Put copies of the noted values in place (step 3), and return what stood there."""
        present = [slot for slot in self.slots() if slot[1] in noted]
        with torch.no_grad():
            for owner, key, _ in present:
                owner[key[1]] = noted[key].clone()
        return present


def _differs(buffer: torch.Tensor, before: torch.Tensor) -> bool:
    """Tell whether a large buffer has another value than before; small ones need no answer, fake ones have no value."""
    if buffer.numel() <= MAX_COPIED_ELEMENTS or isinstance(buffer, FakeTensor):
        return False
    return buffer.shape != before.shape or not torch.equal(buffer, before)


class _SecondRun:
    """The context of a second run; it can be entered once for each backward through the block."""

    def __init__(self, buffers: _Buffers, noted: dict[tuple[int, str], torch.Tensor], drawn: tuple[Any, ...]) -> None:
        self._buffers, self._noted, self._drawn = buffers, noted, drawn
        self._parameters = buffers.parameters()
        self._present: list[tuple[list[_Slot], tuple[Any, ...]]] = []

    def __enter__(self) -> None:
        present = [(at, key, at[key[1]]) for at, key, noted in self._parameters if at[key[1]] is not noted]
        for owner, key, parameter in self._parameters:
            owner[key[1]] = parameter
        self._present.append(([*self._buffers.swap_in(self._noted), *present], drawn_state()))
        set_drawn_state(self._drawn)  # torch's own is checkpoint's care
        _state.depth = getattr(_state, "depth", 0) + 1

    def __exit__(self, *exc_info: object) -> None:
        _state.depth -= 1
        slots, drawn = self._present.pop()
        set_drawn_state(drawn)
        for owner, key, buffer in slots:  # step 4
            owner[key[1]] = buffer
