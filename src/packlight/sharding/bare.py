"""Modules without what an engine has hung on them, for as long as they are copied.

An engine's hooks and states hold process groups and streams, which no copy can have, and a copy is to be of ordinary
modules. What a module has is put back afterwards, the very dictionaries, so nothing of the engine's notices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def bare(
    model: nn.Module, *, is_engines_key: Callable[[str], bool], is_engines_hook: Callable[[Any], bool]
) -> Iterator[None]:
    """Take attributes and hooks off a model's modules until the end of the context.

    Args:
        model: the module.
        is_engines_key: tells an engine's attributes by their names.
        is_engines_hook: tells its hooks.
    """
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        for module, _ in modules:
            attributes = module.__dict__
            for key in [key for key in attributes if is_engines_key(key)]:
                del attributes[key]
            for name in HOOKS:
                hooks = attributes[name]
                attributes[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not is_engines_hook(hook))
        yield
    finally:
        for module, before in modules:
            module.__dict__.clear()
            module.__dict__.update(before)
