"""A session inside a framework's own training loop, which the framework's plugin begins and ends.

A session finds model, optimiser and step by itself, so a plugin has little to do: it says when training begins and
which optimisers are there by then, and when training ends or fails. What else a plugin needs is here once: the options,
plan and measurement that outlast the session, the record, and errors instead of the end of a script. `SessionStop` is
none that a framework's own clean-up would catch, so what stands against a plan is raised as `BudgetError` or
`ValueError` where it is found.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from packlight.budget import BudgetError
from packlight.measurement import Measurement
from packlight.planner.loop import Call
from packlight.planner.recorded import recorded
from packlight.planner.request import SessionStop, Settings
from packlight.planner.session import Session
from packlight.records import Plan
from packlight.serial import of_rank, this_rank


class Guest:
    """A plugin's part that hangs on no framework.

    Args:
        budget: bytes allowed on the device, as for `packlight.plan`; None: measure, and change nothing.
        exact: only choices that leave every loss and gradient bit-equal.
        host_budget: bytes allowed in host memory.
        disk: folder of the disk tier.
        record: file for what was planned and measured, as `packlight run --record` writes it.
        release_gradients: parameters may be stepped inside backward; the loop neither clips, accumulates nor reads
            gradients.

    Raises:
        ValueError: the record or the disk tier has no folder.
    """

    def __init__(
        self,
        budget: int | str | None,
        *,
        exact: bool = False,
        host_budget: int | str | None = None,
        disk: str | None = None,
        record: str | os.PathLike[str] | None = None,
        release_gradients: bool = False,
    ) -> None:
        self.settings = Settings(
            budget,
            exact,
            host_budget=host_budget,
            disk=None if disk is None else str(_folder(Path(disk), "disk")),
            tell=_say,
            release_gradients=release_gradients,
        )
        self._record = None if record is None else _folder(Path(record).parent, "record") / Path(record).name
        self._session: Session | None = None
        self._plan: Plan | None = None
        self._measurement: Measurement | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan in force, or the last one that was; None before the model's first forward."""
        return self._plan if self._session is None else self._session.plan

    @property
    def measurement(self) -> Measurement | None:
        """What the last training took; None before its end, or where nothing was trained."""
        return self._measurement

    def begin(self, optimizers: Iterable[Any] = ()) -> None:
        """Begin a session, unless it has begun.

        Args:
            optimizers: those that exist already, wrapped or not; later ones are heard of.

        Raises:
            ValueError: another session is in force, or an optimiser is none of torch's.
        """
        if self._session is not None:
            return
        session = _Session(self.settings)
        for optimizer in map(innermost, optimizers):
            session.optimizer_made(optimizer)
        self._session = session.__enter__()

    def end(self) -> None:
        """End the session, and write the record; again it does nothing."""
        session, self._session = self._session, None
        if session is None:
            return
        try:
            run = recorded(session, sys.argv)
            self._plan, self._measurement = session.plan, None if run is None else run.measurement
        finally:
            session.__exit__()
        if run is not None:
            _say_measured(run.measurement, self._plan)
        if run is not None and self._record is not None:
            run.save(of_rank(self._record))

    def refuse_release(self, wanted: str, **given: object) -> None:
        """Refuse to release gradients in a loop whose settings need them afterwards; where none shall be, do nothing.

        Args:
            wanted: of these settings.
            given: the framework's settings, by its names.

        Raises:
            ValueError: gradients may be released.
        """
        if self.settings.release_gradients:
            came = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(
                f"release_gradients came, with {came}; wanted {wanted}: gradients that are freed inside backward can "
                "be neither clipped nor added up"
            )

    @contextmanager
    def during(self, *optimizers: Any) -> Iterator[Self]:
        """Hold the session for the length of a context, which stands around a loop of one's own."""
        self.begin(optimizers)
        with self.until_error():
            yield self
        self.end()

    @contextmanager
    def until_error(self) -> Iterator[None]:
        """End the session where an error leaves the context."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """End the session by an error, and say in it what can be done where memory has run out.

        What else goes wrong is a note of the error, which stays the one that is raised.
        """
        try:
            if self._session is not None:
                self._session.failed(error)
        finally:
            try:
                self.end()
            except Exception as other:
                error.add_note(f"packlight: its session could not be ended cleanly: {type(other).__name__}: {other}")


class _Session(Session):
    """A session whose stops are errors."""

    def called(self, module: nn.Module, call: Call) -> None:
        with _errors():
            super().called(module, call)

    def update_begins(self, optimizer: torch.optim.Optimizer) -> None:
        with _errors():
            super().update_begins(optimizer)

    def _stop_again(self) -> None:
        with _errors():
            super()._stop_again()

    def _forward_begins(self, call: Call) -> None:
        with _errors():
            super()._forward_begins(call)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn a session's stop into an error."""
    try:
        yield
    except SessionStop as stop:
        if stop.exit_status == 3:
            raise BudgetError(str(stop), smallest_bytes=stop.smallest_bytes) from None
        raise ValueError(str(stop)) from stop.__cause__


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimiser of torch inside wrappers that keep it as `optimizer`, as Accelerate's and DeepSpeed's do.

    Raises:
        ValueError: there is none.
    """
    found = optimizer
    while (inner := getattr(found, "optimizer", None)) is not None:
        found = inner
    if not isinstance(found, torch.optim.Optimizer):
        raise ValueError(f"{type(optimizer).__name__} came; wanted an optimiser of torch, or a wrapper around one")
    return found


def _folder(path: Path, name: str) -> Path:
    """Refuse a folder that is not there before training, and keep its place."""
    if not path.is_dir():
        raise ValueError(f"{name}: there is no folder {path}; make it, or name another")
    return path.absolute()


def _say(plan: Plan, title: str) -> None:
    _print(f"{title}{plan}")


def _say_measured(measured: Measurement, plan: Plan | None) -> None:
    excess = measured.told_excess(None if plan is None else plan.budget_bytes)
    _print(f"{str(measured).splitlines()[0]}{excess}")


def _print(text: str) -> None:
    rank = this_rank()
    print(f"{'' if rank is None else f'[rank {rank}] '}packlight: {text}", file=sys.stderr)
