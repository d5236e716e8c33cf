"""Says where a storage comes from: the module that runs, and the line of the user's code that called the operator.

torch's memory snapshot keeps a whole Python stack for each allocation, most of it torch's own frames. Here only two
things are read off the stack, and only for storages that are not small: the innermost module of the model (the `self`
of torch's `Module._call_impl`), and the first line outside of torch, packlight and the standard library.

Backward has no such stack: the engine is called once, and all nodes run below it. The idea is the profiler's own link
between the passes: autograd numbers the nodes that forward makes, and an operator that is dispatched runs just after
its node got its number. So the place of a node is known when backward runs it. Each thread numbers for itself, and what
is on a GPU runs backward in a thread of autograd's own.
"""

import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd import graph

MIN_BYTES = 1024
"""Smaller storages get no name."""

_ENGINE = graph._engine_run_backward.__code__
_CALL = nn.Module._call_impl.__code__
_OWN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_TRACES = (os.path.join(_OWN, "planner", "trace.py"), os.path.join(_OWN, "planner", "profile.py"))
_OTHERS = (os.path.join(os.path.dirname(torch.__file__), ""), os.path.join(sysconfig.get_paths()["stdlib"], ""))
_NOT_A_FILE = ("<frozen", "<string>")


class Named(Protocol):
    """A storage on a line, which gets a name."""

    num_bytes: int
    site: str
    code: str


class Place(NamedTuple):
    """Where something was made; each may be "" where it is not known."""

    site: str
    code: str


NOWHERE = Place("", "")


class Places:
    """Names what operators of one model make; `Timeline.observe` asks after each operator.

    Args:
        model: whose modules are named; it is not held.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
        self._nodes: dict[int, Place] = {}
        self._lines: dict[tuple[CodeType, int], str] = {}
        self._kinds: dict[CodeType, str] = {}
        self._numbers: dict[int, int] = {}  # by thread

    def name(self, made: Sequence[Named], results: Any) -> None:
        """Name what the operator has made that has just run, and remember its place for its node.

        Args:
            made: the new storages.
            results: what it returned.
        """
        number, thread = torch._C._autograd._get_sequence_nr(), threading.get_ident()
        is_first = self._numbers.get(thread) != number
        self._numbers[thread] = number
        large = [each for each in made if each.num_bytes >= MIN_BYTES]
        if not large and not (is_first and _is_large(results)):
            return
        place, node = self._here(), self._running_node()
        if is_first and node is None:
            self._nodes[number - 1] = place
        elif node is not None and not place.code:
            place = self._backward_of(node)
        for each in large:
            each.site, each.code = place

    def _running_node(self) -> Any:
        """Return the node that backward is at; None outside of backward."""
        return None if torch._C._current_graph_task_id() == -1 else torch._C._current_autograd_node()

    def _backward_of(self, node: Any) -> Place:
        site, code = self._nodes.get(node._sequence_nr(), NOWHERE)
        return Place(f"backward of {site}" if site else "", code)

    def _here(self) -> Place:
        """Walk up to the user's line and to the innermost module, as far as the engine or the trace that runs this."""
        frame = sys._getframe(1).f_back
        site = code = ""
        while frame is not None:
            own = frame.f_code
            if own is _ENGINE:
                break
            if own is _CALL:
                site = site or self._names.get(id(frame.f_locals["self"]), "")
            elif not code:
                kind = self._kinds.get(own) or self._kind(own)
                if kind == "trace":
                    break
                code = self._line(frame) if kind == "user" else ""
            if site and code:
                break
            frame = frame.f_back
        return Place(site, code)

    def _kind(self, code: CodeType) -> str:
        """Tell whose a function is: "user", "other", or that of a trace, above which nothing is the step's."""
        file = code.co_filename
        kind = "user"
        if file in _TRACES:
            kind = "trace"
        elif file.startswith(_NOT_A_FILE) or _is_of_others(file):
            kind = "other"
        self._kinds[code] = kind
        return kind

    def _line(self, frame: FrameType) -> str:
        key = frame.f_code, frame.f_lasti
        if key not in self._lines:
            code = frame.f_code
            self._lines[key] = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
        return self._lines[key]


def level_of_user() -> int:
    """Return the `stacklevel` by which a warning of the caller's names the user's line; 2 where none stands above."""
    frame, level = sys._getframe(1), 1
    while True:
        file = frame.f_code.co_filename
        if not (file.startswith(_NOT_A_FILE) or _is_of_others(file)):
            return level
        if frame.f_back is None:
            return 2
        frame, level = frame.f_back, level + 1


def _is_of_others(file: str) -> bool:
    if file.startswith(_OWN):
        return not file.startswith(os.path.join(_OWN, "demo", ""))
    packages = ("site-packages", "dist-packages")
    return file.startswith(_OTHERS[0]) or (file.startswith(_OTHERS[1]) and not any(name in file for name in packages))


def _is_large(results: Any) -> bool:
    each = results if isinstance(results, tuple | list) else (results,)
    return any(isinstance(result, torch.Tensor) and result.nbytes >= MIN_BYTES for result in each)
