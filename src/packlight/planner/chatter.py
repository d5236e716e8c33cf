"""Keeps what a C library prints for its own developers out of a script's standard output.

HiGHS (1.12, in scipy 1.17) prints a line of its own, "HighsMipSolverData::transformNewIntegerFeasibleSolution ...", by
C's `printf`, whatever its options say, and a training script's output may be read by a program. Python's
`redirect_stdout` does not reach there, so the file descriptor itself leads into a file meanwhile.
"""

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1


@contextmanager
def left_out(prefix: bytes) -> Iterator[None]:
    """Leave out lines that begin with a prefix; all else that is written to standard output meanwhile goes on.

    Args:
        prefix: of a line.
    """
    try:
        kept = os.dup(STDOUT)
    except OSError:  # it is closed: nothing can be written
        yield
        return
    library = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as file:
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
    while data:
        data = data[os.write(STDOUT, data) :]
