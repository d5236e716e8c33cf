"""What is asked of a session, and how a session ends a script.

A plan is made in the middle of somebody else's program, many calls deep, so whatever is wrong there has to travel up
through code that may catch errors. `SessionStop` is therefore no `Exception`, like `SystemExit`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from packlight.records import Plan


class SessionStop(BaseException):
    """Ends a script from inside; not an `Exception`, so that the script's own handlers let it through."""

    def __init__(self, message: str, *, exit_status: int, smallest_bytes: int | None = None) -> None:
        """Keep the exit status, and the smallest budget that fits where that is the reason."""
        super().__init__(message)
        self.exit_status = exit_status
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        budget: bytes allowed on the device; None: measure the script as it is and change nothing.
        exact: only choices that leave every loss and gradient bit-equal.
        plan: a plan to carry out as it is, instead of making one.
        stop_before_step: stop when the first plan is made.
        tell: called with each plan that is made, and a title for it.
        hardware: the name of the device to plan for, where the script is stopped before its first step.
    """

    budget: int | str | None
    exact: bool = False
    plan: Plan | None = None
    stop_before_step: bool = False
    tell: Callable[[Plan, str], None] = lambda plan, title: print(f"{title}{plan}")
    hardware: str | None = None
