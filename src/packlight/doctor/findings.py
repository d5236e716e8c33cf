"""What the doctor says: one finding for each part of the machine, as a record.

torch.utils.collect_env lists versions, and a version says nothing of whether a library loads, a compiler links or a
folder takes a file. A finding has three parts: whether the thing works, what was seen when it was tried, and what its
state costs the user in a line. A part that does not work breaks packlight only where it is essential.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from packlight.serial import JsonRecord

STATES = ("works", "limited", "untried", "missing")
"""limited: it does less than it could; untried: it is there, and nothing more is known; missing: it cannot be used."""


@dataclass(frozen=True)
class Finding:
    """What was found of one part.

    Attributes:
        name: of the part.
        status: one of `STATES`.
        found: what was seen when it was tried.
        cost: what that costs the user; empty where nothing is lost.
        essential: whether packlight can neither plan nor run without it.
        facts: the numbers, by names that end in their units.
    """

    name: str
    status: str
    found: str
    cost: str = ""
    essential: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a status that no reader knows (a record may have been edited by hand)."""
        if self.status not in STATES:
            raise ValueError(f"the status of {self.name!r} is {self.status!r}; wanted one of {', '.join(STATES)}")


@dataclass(frozen=True)
class Diagnosis(JsonRecord):
    """All findings, and whether packlight can plan and run."""

    kind: ClassVar[str] = "doctor"

    findings: tuple[Finding, ...]
    healthy: bool

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> "Diagnosis":
        """Return the diagnosis that findings make: healthy where nothing essential is missing."""
        found = tuple(findings)
        return cls(found, not any(each.essential and each.status == "missing" for each in found))


def guarded(
    name: str, check: Callable[[], Finding | Iterable[Finding]], *, cost: str, essential: bool = False
) -> list[Finding]:
    """Return what a check found; where it raises, that the part is missing and why, since a doctor does not fall ill.

    Args:
        name: of the part.
        check: what looks at it.
        cost: what the user loses where the check raises.
        essential: whether packlight can neither plan nor run without the part.
    """
    try:
        found = check()
        return [found] if isinstance(found, Finding) else list(found)
    except Exception as error:
        return [Finding(name, "missing", told(error), cost, essential)]


def told(error: BaseException) -> str:
    """Return an error as one line, with its type."""
    text = in_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def in_line(said: object) -> str:
    """Return what an error or a warning says as one line."""
    return " ".join(str(said).split())
