"""Recompute: a block keeps its inputs only, and runs its forward again when backward needs what was inside.

`torch.utils.checkpoint` does this for a function that the user wraps. Two things are missing for a model that nobody
edits: it must be put around blocks that exist already and come off again without a trace, and a block with side
effects must have them once (`buffers.py`). The idea: the block's `forward` is replaced on the instance; its hooks stay
outside, as they would around the block.

Layers that follow transformers' `GradientCheckpointingLayer` protocol bring their own switch, which also keeps the
key-value cache from being filled twice; there the switch is used. Technique: Chen et al. 2016, arXiv 1604.06174.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from packlight.activations.blocks import Block, find_blocks
from packlight.activations.buffers import MAX_COPIED_ELEMENTS, Buffers

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the contexts of a block's first and second run, anew for each call."""


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


def recompute(
    model: nn.Module,
    blocks: Iterable[str] | None = None,
    *,
    keep_results_of: Collection[Any] = (),
    around: Callable[[str], Contexts] | None = None,
) -> Recomputation:
    """Recompute blocks of a model in backward instead of keeping what they save.

    Losses and gradients stay bit-equal where the forward is deterministic for a fixed random state.

    Args:
        model: the model; changed in place.
        blocks: paths of blocks as `find_blocks` names them; None for all of them.
        keep_results_of: operators, such as `torch.ops.aten.addmm.default`, that do not run again: their results are
            kept. Backward can go through such a block once (torch's selective checkpointing).
        around: returns, by a block's path, what makes the contexts that its two runs have besides.

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
    chosen = functools.partial(create_selective_checkpoint_contexts, list(keep_results_of))
    selective: list[Contexts] = [chosen] if keep_results_of else []
    undo = []
    runs: dict[str, list[tuple[Block, list[Contexts]]]] = {}
    for block in (known[path] for path in wanted):
        others = [*([around(block.path)] if around else []), *selective]
        if block.start is None:
            undo.append(_recompute_module(model.get_submodule(block.module_path), others))
        else:
            runs.setdefault(block.module_path, []).append((block, others))
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
    return [buffer for _, _, buffer in Buffers(*modules).slots() if buffer.numel() <= MAX_COPIED_ELEMENTS]


def _is_recomputed(module: nn.Module) -> bool:
    ours = (_Recomputed, _RecomputedRuns, _ProtocolFunction)
    return any(isinstance(value, ours) for value in module.__dict__.values())


def _recompute_module(module: nn.Module, others: Sequence[Contexts]) -> Callable[[], None]:
    if not follows_protocol(module):
        return _replace(module, forward=_Recomputed(module, others))
    return _replace(module, gradient_checkpointing=True, _gradient_checkpointing_func=_ProtocolFunction(module, others))


def _recompute_runs(module: nn.Module, runs: Sequence[tuple[Block, list[Contexts]]]) -> Callable[[], None]:
    assert isinstance(module, nn.Sequential)
    return _replace(module, forward=_RecomputedRuns(module, runs))


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

    def __init__(self, module: nn.Module, others: Sequence[Contexts]) -> None:
        self._module = module
        self._own = "forward" in module.__dict__  # not the class's
        self._forward = module.forward
        self._contexts = _joined(Buffers(module).contexts, *others)
        functools.update_wrapper(self, self._forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._forward, self._contexts, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial, (self._forward,)) if self._own else (getattr, (self._module, "forward"))


class _ProtocolFunction:
    """What a `GradientCheckpointingLayer` calls to run its own forward; a copy or pickle is torch's checkpoint."""

    def __init__(self, module: nn.Module, others: Sequence[Contexts]) -> None:
        self._contexts = _joined(Buffers(module).contexts, *others)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if isinstance(function, functools.partial):  # the layer's keyword arguments are hidden in it
            return _run(function.func, self._contexts, *function.args, *args, **function.keywords)
        return _run(function, self._contexts, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial, (checkpoint,), (checkpoint, (), {"use_reentrant": False}, None))


class _RecomputedRuns:
    """Stands in for the `forward` of an `nn.Sequential` of which some runs of layers are recomputed."""

    def __init__(self, module: nn.Sequential, runs: Sequence[tuple[Block, list[Contexts]]]) -> None:
        self._module = module
        self._runs: dict[int, tuple[int, Contexts]] = {}
        for run, others in runs:
            layers = list(module)[run.start : run.stop]
            self._runs[run.start or 0] = run.stop or 0, _joined(Buffers(*layers).contexts, *others)
        functools.update_wrapper(self, module.forward, updated=())

    def __call__(self, value: Any) -> Any:
        layers = list(self._module)
        position = 0
        while position < len(layers):
            stop, contexts = self._runs.get(position, (position + 1, None))
            run = functools.partial(_chain, layers[position:stop])
            value = run(value) if contexts is None else _run(run, contexts, value)
            position = stop
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "forward")


def _chain(layers: Sequence[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def _run(function: Callable[..., Any], contexts: Contexts, *args: Any, **kwargs: Any) -> Any:
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

    return checkpoint(call, *leaves, use_reentrant=False, context_fn=contexts)


def _joined(*makers: Contexts) -> Contexts:
    """Return what makes contexts that enter several, the first outermost."""
    if len(makers) == 1:
        return makers[0]

    def make() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, second = zip(*[maker() for maker in makers], strict=True)
        return _Nested(first), _Nested(second)

    return make


class _Nested:
    """Several contexts as one, which can be entered again if they can."""

    def __init__(self, contexts: Sequence[AbstractContextManager[Any]]) -> None:
        self._contexts = contexts
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            self._stacks.append(stack.pop_all())

    def __exit__(self, *exc_info: Any) -> bool | None:
        return self._stacks.pop().__exit__(*exc_info)
