"""Sites: names for the places where a step saves tensors, the same in every step and in equal layers.

Autograd hands a saved tensor to a hook without saying who saves it. A running number would do for a model whose
forward never changes, but one branch or expert more shifts all that follow. The idea: every module notes on a stack
that it is being called, so that a save is named after the innermost module, the number of its call in this forward,
and the number of the save within that call:

    layers.3.mlp.up:0       the first save of the first call
    layers.3.mlp.up@2:1     the second save of the third call

    layers.3.(inputs):0     the first input of a recomputed layer, which checkpoint saves

A pattern stands for sites as in a shell: `layers.*.mlp.up:0`, or a module's path for all that happens inside it.
"""

import fnmatch
import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

INPUTS = "(inputs)"
"""Stands where a module's name would; so a block's own saves have the same names whether it is recomputed or not."""


class Site(NamedTuple):
    """One place in the step that saves a tensor for backward.

    Attributes:
        module: the path of the innermost module, "" for the model itself.
        call: the number of the module's call in this forward, from 0.
        save: the number of the save within the call, from 0.
    """

    module: str
    call: int
    save: int

    def __str__(self) -> str:
        """Return the name that patterns are compared with."""
        return f"{self.module}{f'@{self.call}' if self.call else ''}:{self.save}"

    @classmethod
    def named(cls, name: str) -> "Site":
        """Return the site of a name.

        >>> Site.named("layers.3.mlp.up@2:1")
        Site(module='layers.3.mlp.up', call=2, save=1)
        """
        called, _, save = name.rpartition(":")
        module, _, call = called.partition("@")
        return cls(module, int(call or 0), int(save))


def module_of(site: str) -> str:
    """Return the path of the module at whose call a site of this name is.

    >>> module_of("layers.3.mlp.up@2:1")
    'layers.3.mlp.up'
    """
    return Site.named(site).module.removesuffix(INPUTS).removesuffix(".")


class ModuleCall:
    """A call of a module that is running.

    Args:
        module: its path.
        number: how many calls of it this forward had before.
    """

    __slots__ = ("module", "num_saves", "number")

    def __init__(self, module: str, number: int) -> None:
        self.module, self.number, self.num_saves = module, number, 0

    def next_site(self) -> Site:
        """Name the save that is happening now."""
        self.num_saves += 1
        return Site(self.module, self.number, self.num_saves - 1)


class CallStack:
    """The modules that are running in one forward of the model, the innermost last."""

    __slots__ = ("calls", "numbers")

    def __init__(self) -> None:
        self.calls = [ModuleCall("", 0)]
        self.numbers: dict[str, int] = {}

    def enter(self, path: str) -> None:
        """Note that a module's forward begins."""
        number = self.numbers.get(path, 0)
        self.numbers[path] = number + 1
        self.calls.append(ModuleCall(path, number))

    def leave(self, path: str) -> None:
        """Note that it ended; calls inside it that were left by an exception end too."""
        if self.calls[-1].module == path:
            self.calls.pop()
        elif any(call.module == path for call in self.calls):
            while self.calls.pop().module != path:
                pass


class ModuleWatch:
    """The hooks that name a model's calls.

    A scripted module takes no hooks; what it saves is its caller's. An encoder layer of torch runs other kernels in
    evaluation, with other last bits, unless a module inside it has hooks; so these modules have them only while
    forwards with gradients come.

    Args:
        model: the model.
        stack: returns the stack of the forward that is running in this thread; None outside of one.
    """

    def __init__(self, model: nn.Module, stack: Callable[[], CallStack | None]) -> None:
        paths = {
            path: module for path, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)
        }
        self._stack = stack
        self._fused = {
            f"{path}.{name}".strip("."): inner
            for path, module in paths.items()
            if isinstance(module, nn.TransformerEncoderLayer)
            for name, inner in module.named_modules()
            if path or name
        }
        others = {path: module for path, module in paths.items() if path and path not in self._fused}
        self._handles = _hooked(others, stack)
        self._fused_handles: list[RemovableHandle] = []

    def name_calls(self) -> None:
        """Put hooks into torch's encoder layers too, where they are not yet."""
        if self._fused and not self._fused_handles:
            self._fused_handles = _hooked(self._fused, self._stack)

    def spare_fused(self) -> None:
        """Take the hooks off torch's encoder layers."""
        _take_off(self._fused_handles)

    def remove(self) -> None:
        """Take all hooks off."""
        _take_off(self._fused_handles)
        _take_off(self._handles)


def _hooked(modules: Mapping[str, nn.Module], stack: Callable[[], CallStack | None]) -> list[RemovableHandle]:
    handles: list[RemovableHandle] = []
    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(_Enter(path, stack)))
            handles.append(module.register_forward_hook(_Leave(path, stack), always_call=True))
    except BaseException:  # a module may take no hooks; then none has any
        _take_off(handles)
        raise
    return handles


def _take_off(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


class _Hook:
    """A module's hook; in a copy or a pickle of the module it is one that does nothing."""

    def __init__(self, path: str, stack: Callable[[], CallStack | None]) -> None:
        self.path, self.stack = path, stack

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, returns None, and loads without packlight


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled graph saves at its boundary, as its caller
            stack = self.stack()
            if stack is not None:
                stack.enter(self.path)


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            stack = self.stack()
            if stack is not None:
                stack.leave(self.path)


class Rules:
    """Which choice each site gets: that of the longest pattern that matches it.

    Args:
        choices: a choice by pattern.
        default: the choice where nothing matches.

    Attributes:
        keeps_all: whether no tensor is taken anywhere.
        codecs: those that choices name; "" where one names none.
    """

    def __init__(self, choices: Mapping[str, str], *, default: str) -> None:
        self._choices = sorted(choices.items(), key=lambda item: len(item[0]))
        self._default = default
        self._known: dict[tuple[str, int, str], list[tuple[Site, str]]] = {}
        self._lock = threading.Lock()
        self.keeps_all = not any(choice not in ("keep", "recompute") for choice in choices.values())
        self.codecs = {choice.partition(":")[2] for choice in choices.values() if choice.startswith("compress")}

    def next_save(self, call: ModuleCall, block: str = "") -> tuple[Site, str]:
        """Name the save that is happening now, and return its choice.

        Args:
            call: the innermost module's.
            block: the pattern by which the block around it is recomputed, "" where none is. Within, only longer
                patterns count.

        Returns:
            The site, and the choice: "recompute" within a recomputed block where no longer pattern matches.
        """
        known = self._known.get((call.module, call.number, block))
        if known is None:
            known = self._known.setdefault((call.module, call.number, block), [])
        save = call.num_saves
        call.num_saves = save + 1
        if len(known) <= save:
            with self._lock:  # several threads' forwards may share an engine
                while len(known) <= save:
                    site = Site(call.module, call.number, len(known))
                    known.append((site, self._choice(site, block)))
        return known[save]

    def _choice(self, site: Site, block: str) -> str:
        longer = [(pattern, choice) for pattern, choice in self._choices if len(pattern) > len(block)]
        found = [choice for pattern, choice in longer if matches(pattern, site)]
        return found[-1] if found else "recompute" if block else self._default

    def sites(self) -> list[Site]:
        """Return the sites that were asked for so far."""
        return list(dict.fromkeys(site for known in list(self._known.values()) for site, _ in known))


def matches(pattern: str, site: Site) -> bool:
    """Tell whether a pattern stands for a site: by its name, or by that of a module around it."""
    return _matches(pattern, str(site)) or any(_matches(pattern, path) for path in _ancestors(site.module))


@functools.lru_cache(maxsize=2**16)
def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


@functools.lru_cache(maxsize=2**12)
def _ancestors(path: str) -> tuple[str, ...]:
    parts = path.split(".") if path else []
    return tuple(".".join(parts[:end]) for end in range(1, len(parts) + 1))
