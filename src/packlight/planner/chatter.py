"""Keeps out of a script's output what is not the script's: a library's chatter, and a model's when it runs for a plan.

HiGHS (1.12, in scipy 1.17) prints a line of its own, "HighsMipSolverData::transformNewIntegerFeasibleSolution ...", by
C's `printf`, whatever its options say, and a training script's output may be read by a program. Python's
`redirect_stdout` does not reach there, so the file descriptor itself leads into a file meanwhile.
"""

import ctypes
import io
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

STDOUT = 1


_alone = threading.RLock()


@contextmanager
def left_out(prefix: bytes) -> Iterator[None]:
    """Leave out lines that begin with a prefix; all else that is written to standard output meanwhile goes on.

    Args:
        prefix: of a line.
    """
    library = ctypes.CDLL(None)
    with _alone, tempfile.TemporaryFile() as file:
        try:
            kept = os.dup(STDOUT)
        except OSError:  # it is closed: nothing can be written
            yield
            return
        library.fflush(None)
        os.dup2(file.fileno(), STDOUT)
        try:
            yield
        finally:
            library.fflush(None)
            os.dup2(kept, STDOUT)
            os.close(kept)
            file.seek(0)
            _write(b"".join(line for line in file if not line.startswith(prefix)))


def _write(data: bytes) -> None:
    with suppress(BrokenPipeError):  # nobody reads it any more
        while data:
            data = data[os.write(STDOUT, data) :]


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what a model prints, logs and warns of, when it runs for packlight and not for its script."""
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logged)
