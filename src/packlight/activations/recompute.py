"""Recompute: a block keeps its inputs only, and runs its forward again when backward needs what was inside.

`torch.utils.checkpoint` does this for a function that the user wraps. Two things are missing for a model that nobody
edits: it must be put around blocks that exist already and come off again without a trace (`standin.py`), and a second
run must see what the first one saw: its arguments (`arguments.py`), and what its modules hold (`buffers.py`).

Layers that follow transformers' `GradientCheckpointingLayer` protocol bring their own switch, which also keeps the
key-value cache from being filled twice; there the switch is used. Technique: Chen et al. 2016, arXiv 1604.06174.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from packlight.activations.arguments import Arguments
from packlight.activations.blocks import find_blocks
from packlight.activations.buffers import MAX_COPIED_ELEMENTS, Buffers
from packlight.activations.compiled import BLOCKS, Notice, compiled_modules, is_under_compile, skipped
from packlight.activations.standin import StandIn, is_transformed, stand_ins

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the contexts of a block's first and second run, anew for each call."""


VMAP = "torch's checkpoint does not know vmap, so under it {name} is not recomputed but keeps what it saves"


class Recomputation:
    """Blocks that are recomputed until `remove` is called; also a context manager."""

    def __init__(self, undo: ExitStack) -> None:
        """Keep what undoes each block."""
        self._undo = undo

    def remove(self) -> None:
        """Give every block its own forward back; calling it again does nothing."""
        self._undo.close()

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

    Losses and gradients stay bit-equal where the forward is deterministic for a fixed random state. Beside a reentrant
    checkpoint, which this replaces in layers that have one switched on, gradients may differ in their last bits: it
    sums the gradients of an input that several blocks share in another order. Within torch.compile, recomputed blocks
    run uncompiled.

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
        RuntimeError: (in forward) torch.func differentiates the model; (in backward) what a block reads has changed.

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
    notices, runs = _Notices(Notice(BLOCKS), Notice(VMAP)), dict[str, dict[int, tuple[int, _Way]]]()
    notices.compiled.give(compiled_modules(model, around=[known[path].module_path for path in wanted]))
    with ExitStack() as undo:
        for block in (known[path] for path in wanted):
            others = [*([around(block.path)] if around else []), *selective]
            module = model.get_submodule(block.module_path)
            if block.start is None or block.stop is None:
                undo.callback(_recompute_module(module, _Way(block.path, [module], others, notices)))
            else:
                assert isinstance(module, nn.Sequential)
                way = _Way(block.path, list(module)[block.start : block.stop], others, notices)
                runs.setdefault(block.module_path, {})[block.start] = block.stop, way
        for path, parts in runs.items():
            undo.callback(_RecomputedRuns(model.get_submodule(path), parts).remove)
        return Recomputation(undo.pop_all())


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
    return any(isinstance(each, _Recomputed | _RecomputedRuns) for each in stand_ins(module)) or isinstance(
        module.__dict__.get("_gradient_checkpointing_func"), _ProtocolFunction
    )


def _recompute_module(module: nn.Module, way: "_Way") -> Callable[[], None]:
    if not follows_protocol(module):
        return _Recomputed(module, way).remove
    return _replace(module, gradient_checkpointing=True, _gradient_checkpointing_func=_ProtocolFunction(way))


def _replace(module: nn.Module, **values: object) -> Callable[[], None]:
    """Set instance attributes, and return what puts the former ones back."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)

    def undo() -> None:
        for name in values:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)

    return undo


class _Notices(NamedTuple):
    compiled: Notice
    under_vmap: Notice


class _Way:
    """How a block is recomputed.

    Args:
        path: the block's.
        modules: those that it consists of.
        others: what makes contexts of its two runs besides.
        notices: what is said where the block is compiled, or under vmap.
    """

    def __init__(self, path: str, modules: Sequence[nn.Module], others: Sequence[Contexts], notices: _Notices) -> None:
        self.path, self.modules, self._others, self.notices = path, tuple(modules), others, notices
        self.contexts = _joined(Buffers(*modules).contexts, *others)
        # torch ends a second run by an exception, which becomes another one on its way through TorchScript
        inner = (each for module in modules for each in module.modules())
        self.stops_early = not any(isinstance(each, torch.jit.ScriptModule) for each in inner)

    @skipped
    def for_modules(self, modules: Sequence[nn.Module]) -> "_Way":
        """Return the same for a shallow copy of the block, whose buffers are others."""
        return self if self.modules == tuple(modules) else _Way(self.path, modules, self._others, self.notices)


class _Recomputed(StandIn):
    """Stands in for the `forward` of a block."""

    def __init__(self, module: nn.Module, way: _Way) -> None:
        super().__init__(module)
        self._way = way

    @skipped
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _run(self.forward_of(module), self._way.for_modules([module]), args, kwargs)


class _ProtocolFunction:
    """What a `GradientCheckpointingLayer` calls to run its own forward; a copy or pickle is torch's checkpoint."""

    def __init__(self, way: _Way) -> None:
        self._way = way

    @skipped
    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        kwargs: dict[str, Any] = {}
        if isinstance(function, functools.partial):  # the layer's keyword arguments are hidden in it
            args, kwargs = (*function.args, *args), function.keywords
            function = function.func
        layer = getattr(function, "__self__", *self._way.modules)  # a shallow copy of the layer has this function too
        return _run(function, self._way.for_modules([layer]), args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (functools.partial, (checkpoint,), (checkpoint, (), {"use_reentrant": False}, None))


class _RecomputedRuns(StandIn):
    """Stands in for the `forward` of an `nn.Sequential` of which some runs of layers are recomputed."""

    def __init__(self, module: nn.Module, runs: Mapping[int, tuple[int, _Way]]) -> None:
        super().__init__(module)
        self._runs = runs

    @skipped
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run_layers(module, *args, **kwargs)

    @skipped
    def _run_layers(self, module: nn.Module, input: Any) -> Any:
        assert isinstance(module, nn.Sequential)
        layers, position = list(module), 0
        while position < len(layers):
            stop, way = self._runs.get(position, (position + 1, None))
            chain = functools.partial(_chain, layers[position:stop])
            if way is None:
                input = chain(input)
            else:
                input = _run(chain, way.for_modules(layers[position:stop]), (input,), {})
            position = stop
        return input


def _chain(layers: Sequence[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


@skipped
def _run(function: Callable[..., Any], way: _Way, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if is_under_compile():
        way.notices.compiled.give([repr(way.path)])
    if is_transformed():
        way.notices.under_vmap.give([repr(way.path)])
        return function(*args, **kwargs)
    return _run_in_checkpoint(function, way, args, kwargs)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def _run_in_checkpoint(function: Callable[..., Any], way: _Way, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = Arguments(args, kwargs)
    first = [(args, kwargs)]

    def call(*leaves: Any) -> Any:
        own_args, own_kwargs = first.pop() if first else arguments.rebuilt(leaves)
        return function(*own_args, **own_kwargs)

    how: dict[str, Any] = {"use_reentrant": False, "context_fn": way.contexts, "early_stop": way.stops_early}
    return checkpoint(call, *arguments.leaves, **how)


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
