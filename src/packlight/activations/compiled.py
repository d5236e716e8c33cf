"""What torch.compile hides, said once by name.

Inside a compiled graph no module is called and no function saves anything for itself: the graph saves at its own
boundary, as its caller, and what it saves has no history that would tell an activation from a statistic. Hooks still
give right gradients there, with less to choose from; a block that is recomputed runs uncompiled, since torch runs
checkpoints so. Neither is an error, and neither is what one meant who asked for both.

Dynamo also traces whatever Python runs while a compiled function does, saved-tensor hooks too, and warns about what it
finds there. `undisturbed` keeps it away, at no cost outside of compiled functions (`torch._dynamo.disable` has one).
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import OptimizedModule

_P = ParamSpec("_P")
_R = TypeVar("_R")

SITES = (
    "under torch.compile ({name}), what a graph saves is saved at its boundary: choices for modules inside of it are "
    'not looked at, and "compress" leaves most tensors as they are; gradients stay right. Compile parts for which no '
    "choice is made, or use torch's own activation_memory_budget"
)
BLOCKS = (
    "under torch.compile ({name}), recomputed blocks run uncompiled, since torch runs checkpoints so; compile modules "
    "inside of the blocks instead, or use torch's own activation_memory_budget"
)


def skipped(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let dynamo leave a function's own frame to Python, and see what it calls."""
    made: Callable[_P, _R] = skip(function)
    return made


def undisturbed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let dynamo see neither a function nor what it calls.

    Args:
        function: of this package.

    Returns:
        A function that does the same.
    """
    hidden: Callable[_P, _R] = torch._dynamo.disable(function)

    @skipped
    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return hidden(*args, **kwargs) if get_eval_frame_callback() else function(*args, **kwargs)

    return call


class Notice:
    """A warning that is given once.

    Args:
        text: what it says, with a place for a name.
    """

    def __init__(self, text: str) -> None:
        self._text, self.is_settled = text, False

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def give(self, names: Sequence[str]) -> None:
        """Warn of what is compiled, if anything is."""
        if names and not self.is_settled:
            self.is_settled = True
            named = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more modules"
            warnings.warn(self._text.format(name=named), stacklevel=2)


def compiled_modules(model: nn.Module, around: Sequence[str] | None = None) -> list[str]:
    """Return the names of the modules in a model that are compiled as a whole, and of the model itself.

    Args:
        model: the model.
        around: paths of modules; only those are named that are or contain one of them. None: all.
    """
    return [
        repr(path) if path else f"the {_kind(module)}"
        for path, module in model.named_modules()
        if (isinstance(module, OptimizedModule) or module._compiled_call_impl is not None)
        and (around is None or any(not path or inner == path or inner.startswith(f"{path}.") for inner in around))
    ]


def _kind(module: nn.Module) -> str:
    inner = module._orig_mod if isinstance(module, OptimizedModule) else module
    return type(inner).__name__


@skipped
def is_under_compile() -> bool:
    """Tell whether a compiled function runs, in a part of it that dynamo leaves to Python."""
    return bool(get_eval_frame_callback())
