"""Runs a Python script or module as `python` would, under a session.

`runpy` runs code in this process but leaves the command line, the import path and the end of a program to its
caller. Here they are as the script expects them: its own `sys.argv`, `sys.path[0]` and `__file__`,
`__name__ == "__main__"`, its own traceback without the frames of packlight, and its own exit status.
"""

import builtins
import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

import torch

from packlight.budget import Budget
from packlight.planner.known_hardware import Hardware, named
from packlight.planner.plan import device_bytes
from packlight.planner.recorded import environment, recorded
from packlight.planner.request import SessionStop, Settings
from packlight.planner.session import Session
from packlight.records import Run

__all__ = ["Outcome", "SessionStop", "Settings", "Target", "environment", "run_script"]

_SESSION_FOLDER = Path(__file__).parents[1] / "planner"


@dataclass(frozen=True)
class Target:
    """What is to be run: a script's path or, with `as_module`, a module's name; and its arguments."""

    script: str
    arguments: tuple[str, ...] = ()
    as_module: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """The command line without `python`."""
        return (*(("-m",) if self.as_module else ()), self.script, *self.arguments)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, the record (None where nothing was trained), and what to tell the user.

    A negative exit status is the signal that ended the script, as in `subprocess`.
    """

    exit_status: int
    run: Run | None
    message: str = ""


def run_script(target: Target, settings: Settings) -> Outcome:
    """Run a script or module under a plan.

    Args:
        target: what to run.
        settings: the budget and what else was asked for.

    Returns:
        The outcome. The script's own errors are printed as Python prints them, and become exit status 1.

    Raises:
        ValueError: there is no such script, or the budget cannot be read or is larger than the device, or there is no
            hardware of that name.
    """
    if not target.as_module and not Path(target.script).is_file():
        raise ValueError(f"there is no script {target.script!r}; wanted the path of a Python file, or -m MODULE")
    if settings.budget is not None and settings.plan is None:
        Budget.of(settings.budget, total_bytes=_largest_device_bytes(named(settings.hardware)))
    session = Session(settings)
    with session:
        exit_status, message = _run(target, session)
        record = recorded(session, target.command)
    if exit_status == 0 and not session.trained and not message:
        return Outcome(
            2, None, "the script ended without a training step that packlight could see; nothing was planned"
        )
    if message == "planned":
        return Outcome(exit_status, None)
    return Outcome(exit_status, record, message)


def _largest_device_bytes(hardware: Hardware | None) -> int:
    """Return the size of the largest device that the script may choose, or of the named one."""
    if hardware is not None:
        return hardware.device_bytes
    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return max(device_bytes(torch.device(each)) for each in types)


def _run(target: Target, session: Session) -> tuple[int, str]:
    """Run the target; return its exit status, and why packlight stopped it, if it did."""
    try:
        with _command_line(target):
            if target.as_module:
                runpy.run_module(target.script, run_name="__main__", alter_sys=True)
            else:
                _run_file(target.script)
    except SessionStop as stop:
        return stop.exit_status, str(stop)
    except SystemExit as stop:
        return _exit_status(stop.code), ""
    except BaseException as error:
        sys.stdout.flush()
        session.failed(error)
        error.__traceback__ = _own_frames(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1, ""
    return 0, ""


def _run_file(script: str) -> None:
    """Run a file as `__main__`; unlike `runpy.run_path`, with the names and paths that `python FILE` gives it."""
    path = os.path.join(os.getcwd(), script)
    module = ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    vars(module).update(__file__=path, __cached__=None, __loader__=loader, __builtins__=builtins)
    sys.modules["__main__"] = module
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(module))


def _exit_status(code: object) -> int:
    """Do what Python does with the argument of `sys.exit`."""
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _own_frames(frames: TracebackType | None) -> TracebackType | None:
    """Leave out the frames before the script's, and the session's in torch's calls, unless the session has failed."""
    before = ("<frozen runpy>", runpy.__file__, __file__)
    chain: list[TracebackType] = []
    while frames is not None:
        chain.append(frames)
        frames = frames.tb_next
    files = [each.tb_frame.f_code.co_filename for each in chain]
    session_failed = bool(files) and Path(files[-1]).parent == _SESSION_FOLDER
    own: TracebackType | None = None
    for each, file in zip(reversed(chain), reversed(files), strict=True):
        if file not in before and (session_failed or Path(file).parent != _SESSION_FOLDER):
            own = TracebackType(own, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return own


@contextmanager
def _command_line(target: Target) -> Iterator[None]:
    """Put the target's command line, import path and `__main__` in the place of packlight's, for as long as it runs."""
    argv, path, main = sys.argv, list(sys.path), sys.modules["__main__"]
    sys.argv = [target.script, *target.arguments]
    folder = os.getcwd() if target.as_module else str(Path(target.script).resolve().parent)
    if not sys.flags.safe_path:
        sys.path[:1] = [folder]
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = argv, path, main
