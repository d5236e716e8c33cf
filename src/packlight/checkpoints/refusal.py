"""The error of a checkpoint that cannot be read, or cannot be represented as asked.

Readers fail in many ways (a pickle's end, a missing key, a wrong shape); whoever converts a checkpoint wants one kind,
with the place in its message. So what libraries raise is raised again as this.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or what is in it cannot be represented; nothing was written."""


class UnclearNames(CheckpointError):
    """Which parameter of the model a state is of is not to be known; some targets need not know it."""


@contextmanager
def refused(place: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Raise errors of these kinds as `CheckpointError`, with the place before their words.

    Args:
        place: what was being read or converted.
        kinds: of errors; none: ValueError.

    Raises:
        CheckpointError: one of them came.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, kinds or ValueError):
            raise
        raise CheckpointError(f"{place}: {str(error) or type(error).__name__}") from error
