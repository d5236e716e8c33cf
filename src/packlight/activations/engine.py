"""The engine: carries out a choice for every tensor that autograd saves, and decides nothing itself.

PyTorch has a hook for saved tensors, a function for recomputation, and a context for moving all of them to the host;
they do not know of each other, and in a recomputed layer nothing can be moved or encoded. One idea joins them: hooks
lie on a stack, and what the engine does not take it hands to the hooks below, whoever's they are.

    forward of the model           1 the engine's hooks are pushed; below are the user's own, or none
      a module is called           2 `sites` names it, so that each save has a name
      a tensor is saved            3 its choice: keep (an alias), offload, compress or both (a `Group`)
      a recomputed block begins    4 checkpoint pushes its hooks, and the engine its own again on top of them: what is
                                     kept, moved or encoded is taken, the rest goes to checkpoint, which recomputes it
      the block runs again         5 the same sites are passed over, so that checkpoint's count of saves agrees
    backward                       6 a group that is asked for lets those that follow it be fetched ahead (`prefetch`)
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from packlight.activations.blocks import find_blocks
from packlight.activations.buffers import is_recomputing
from packlight.activations.compiled import SITES, Notice, compiled_modules, is_under_compile, skipped, undisturbed
from packlight.activations.compress import CODECS
from packlight.activations.devices import by_device
from packlight.activations.groups import unpack
from packlight.activations.offload import Tier
from packlight.activations.prefetch import Forward, Order
from packlight.activations.recompute import recompute
from packlight.activations.resident import Resident
from packlight.activations.saver import SaveHooks, Saver, SecondRun, top_hooks
from packlight.activations.sites import INPUTS, CallStack, ModuleWatch, Rules, Site
from packlight.activations.standin import StandIn, is_transformed

CHOICES = ("keep", "recompute", "offload", "compress", "compress+offload")
# Below this, what a group needs for itself and the latency of its copy outweigh the bytes.
MIN_BYTES = 2**14
REPLICAS = (
    "DataParallel runs replicas of {name}, and packlight's choices are for the model itself, so the replicas keep what "
    "they save; use DistributedDataParallel"
)

_Context = AbstractContextManager[Any]


class Engine:
    """Choices that are carried out until `remove` is called; also a context manager.

    Args:
        model: the model; its `forward` and its modules' hooks are changed in place.
        choices: one of `CHOICES` by pattern. A pattern is a shell's, for sites (see `sites`) or for all that happens
            in a module. The longest that matches a site counts. "compress:int8" names a codec. "recompute" is for
            blocks as `find_blocks` names them; inside of them only longer patterns count.
        codec: how tensors are compressed, one of `compress.CODECS`.
        tier: where offloaded tensors go; it is closed with the engine.
        min_bytes: smaller storages are kept.
        drains: whether the memory of all that a forward moves is free when it ends (`DiskTier` can be "steady"
            besides).
        uses: names of sites in the order in which backward will ask for them, where that is known before a step has
            shown it.

    Raises:
        ValueError: an unknown choice or codec, a tier that is missing, or "recompute" for what is no block. Nothing is
            changed then.

    >>> block = lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    >>> model = nn.Sequential(*[nn.Sequential(block(), block()) for _ in range(4)])
    >>> with Engine(model, {"*": "compress", "0.0": "recompute", "0.0.1:0": "keep"}):
    ...     model(torch.randn(64, 64)).sum().backward()
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, str],
        *,
        codec: str = "fp8",
        tier: Tier | None = None,
        min_bytes: int = MIN_BYTES,
        drains: bool = False,
        uses: Sequence[str] = (),
    ) -> None:
        _check(choices, codec, tier)
        blocks = _recomputed_blocks(model, choices)
        self.tier, self._drains = tier, drains
        self._tier = None if tier is None else by_device(tier)
        self._codec, self._min_bytes = codec, min_bytes
        self._rules = Rules({each: choice for each, choice in choices.items() if choice != "recompute"}, default="keep")
        self._order, self._useless = Order(uses), set[Site]()
        self._model, self._local = model, _Running()
        self._notice, self.replicated, self._looks_left = Notice(SITES), Notice(REPLICAS), 2
        with ExitStack() as undo:
            handle = recompute(model, blocks, around=lambda path: self._contexts(path, blocks[path]))
            undo.callback(handle.remove)
            self._names = ModuleWatch(model, self._stack)
            undo.callback(self._names.remove)
            undo.callback(_Watched(self, model).remove)
            self.tell_of_compiled()
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Give the model its own forward back, and close the tier; calling it again does nothing."""
        self._undo.close()
        if self.tier is not None:
            self.tier.close()

    def sites(self) -> list[str]:
        """Return the names of the sites at which the model has saved tensors so far."""
        return [str(site) for site in self._rules.sites()]

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Undo."""
        self.remove()

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def saving(self, *arguments: Any) -> _Context:
        """Return a context that carries out the choices for what is saved in it, as one forward (step 1).

        Args:
            arguments: tensors, in any nesting, that live on anyway.

        Raises:
            RuntimeError: (on entry) a transform of torch.func differentiates the body; it knows no hooks.
        """
        return _Saving(self, arguments)

    def lasting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return those arguments of the model that live on anyway; a subclass may know better."""
        return args, kwargs

    def begin(self, arguments: object) -> saved_tensors_hooks | None:
        """Begin a forward; return the hooks that it needs, None where nothing is saved or others save it all."""
        below = top_hooks()
        if not torch.is_grad_enabled() or is_recomputing() or _is_checkpoint(below):
            if not self._running():
                self._names.spare_fused()
            return None  # a checkpoint around the model recomputes all of it
        is_transformed()  # those that differentiate are refused
        self._names.name_calls()
        self._running().append(self._saver(arguments))
        return saved_tensors_hooks(_Hooks(self._running()[-1], below).pack, _unpack)

    def end(self) -> None:
        """End the forward that began last."""
        self._running().pop()

    def settle(self) -> None:
        """Free the memory of what the forward moved, if that was asked for."""
        if self._drains and self.tier is not None:
            self.tier.drain()

    @skipped
    def tell_of_compiled(self) -> None:
        """Say once that graphs hide sites; they are looked for when the engine is made, and at its first forward."""
        if self._rules.keeps_all:
            return
        if is_under_compile():
            self._notice.give([f"the {type(self._model).__name__}"])
        elif self._looks_left:
            self._looks_left -= 1
            self._notice.give(compiled_modules(self._model))

    def _saver(self, arguments: object) -> Saver:
        return Saver(
            self._rules,
            Resident([*self._model.parameters(), *self._model.buffers()], arguments),
            Forward(self._order),
            codec=self._codec,
            tier=self._tier,
            min_bytes=self._min_bytes,
            useless=self._useless,
        )

    def _running(self) -> list["Saver"]:
        return self._local.savers

    def _stack(self) -> CallStack | None:
        savers = self._local.savers
        return savers[-1].stack if savers else None

    def _contexts(self, path: str, pattern: str) -> Callable[[], tuple[_Context, _Context]]:
        """Return what makes the contexts of a recomputed block's two runs; checkpoint then saves the block's inputs."""
        inputs = f"{path}.{INPUTS}"

        def make() -> tuple[_Context, _Context]:
            taken: list[bool] = []
            stack = self._stack()
            if stack is not None:
                stack.enter(inputs)
            return self._first_run(inputs, pattern, taken), SecondRun(taken)

        return make

    @contextmanager
    def _first_run(self, inputs: str, pattern: str, taken: list[bool]) -> Iterator[None]:
        running = self._running()
        if not running:
            yield
            return
        running[-1].stack.leave(inputs)
        hooks = _Hooks(running[-1], top_hooks(), pattern=pattern, taken=taken)  # step 4
        with saved_tensors_hooks(hooks.pack, _unpack):
            yield


class _Running(threading.local):
    """The forwards that are running in a thread, the innermost last."""

    def __init__(self) -> None:
        self.savers: list[Saver] = []


class _Hooks(SaveHooks):
    """The hooks, out of dynamo's sight: they run while a compiled function does."""

    pack = undisturbed(SaveHooks.pack)


_unpack = undisturbed(unpack)


class _Saving(AbstractContextManager[None]):
    """The context of one forward; a generator would be traced by dynamo."""

    def __init__(self, engine: Engine, arguments: object) -> None:
        self._engine, self._arguments = engine, arguments
        self._hooks: saved_tensors_hooks | None = None

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        self._hooks = self._engine.begin(self._arguments)
        if self._hooks is not None:
            self._hooks.__enter__()

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *exc_info: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*exc_info)
            self._engine.end()
            if exc_info[0] is None:
                self._engine.settle()


class _Watched(StandIn):
    """Stands in for the model's `forward`; a shallow copy of the model runs its own, without the engine."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        super().__init__(model)
        self._engine = engine

    @skipped
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.forward_of(module)
        if module is not self._module:
            self._tell_of_replica(module)
            return forward(*args, **kwargs)
        self._engine.tell_of_compiled()
        with self._engine.saving(*self._engine.lasting(args, kwargs)):
            return forward(*args, **kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _tell_of_replica(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            self._engine.replicated.give([f"the {type(module).__name__}"])


def _check(choices: Mapping[str, str], codec: str, tier: Tier | None) -> None:
    for pattern, choice in choices.items():
        kind, _, own_codec = choice.partition(":")
        if kind not in CHOICES or (own_codec and not kind.startswith("compress")):
            raise ValueError(f"the choice for {pattern!r} is {choice!r}; wanted one of {', '.join(CHOICES)}")
        if own_codec not in (*CODECS, ""):
            raise ValueError(f"the codec for {pattern!r} is {own_codec!r}; wanted one of {', '.join(CODECS)}")
        if "offload" in choice and tier is None:
            raise ValueError(f"the choice for {pattern!r} is {choice!r}, but no tier came; pass tier=make_tier(...)")
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} came, one of {', '.join(CODECS)} was wanted")


def _recomputed_blocks(model: nn.Module, choices: Mapping[str, str]) -> dict[str, str]:
    """Return the pattern by block that the choices recompute."""
    paths = [block.path for block in find_blocks(model)]
    found: dict[str, str] = {}
    for pattern in sorted((each for each, choice in choices.items() if choice == "recompute"), key=len):
        matching = [path for path in paths if path == pattern or fnmatchcase(path, pattern)]
        if not matching:
            raise ValueError(f"{pattern!r} is to be recomputed and is no block; the blocks are {', '.join(paths)}")
        found.update(dict.fromkeys(matching, pattern))
    return found


def _is_checkpoint(hooks: Any) -> bool:
    """Tell whether hooks are torch.utils.checkpoint's, in a first or a second run, or another engine's on top."""
    if hooks is None:
        return False
    owner = getattr(hooks[0], "__self__", None)
    return hooks[0].__module__ == "torch.utils.checkpoint" or (
        isinstance(owner, SaveHooks) and owner.is_over_checkpoint
    )
