"""The disk tier's file: it has no name, it bypasses the page cache where it can, and it says when it lies in memory.

A file with a name survives `kill -9`, and a step's activations fill a disk after a few such runs. So the file is
made without a name (O_TMPFILE). Where the file system has none such, its name is removed right after it was made and
before the first byte; a kill between those two leaves an empty file. The page cache is memory too, the very
thing that runs short: O_DIRECT goes around it where the file system takes that. Some systems keep /tmp in memory
(tmpfs); offloading to it frees nothing, which is warned about.
"""

import errno
import mmap
import os
import secrets
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

from packlight.activations.tier import OffloadError

BLOCK_BYTES = 4096
"""Where O_DIRECT may begin and end; no file system in use asks for more."""
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
O_TMPFILE: int = getattr(os, "O_TMPFILE", 0)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SpillFile:
    """An open file that nobody else can open and that is gone when this process is."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Args:
            folder: an existing folder; the space is taken from its file system.

        Raises:
            OffloadError: no file can be made there.
        """
        self.folder = folder
        try:
            self._fd, self.direct = _open_best(folder)
        except OSError as error:
            raise self.failure(error, wanted_bytes=BLOCK_BYTES, stored_bytes=0) from error
        self.close = weakref.finalize(self, os.close, self._fd)
        if is_in_memory(folder):
            warnings.warn(
                f"{folder} lies in memory (tmpfs), so tensors that are offloaded there take as much memory as before; "
                "name a folder on a disk",
                stacklevel=2,
            )

    def write(self, offset: int, chunk: memoryview) -> None:
        """Write a whole chunk; under O_DIRECT its address, length and offset are multiples of BLOCK_BYTES.

        Raises:
            OSError: the disk is full or fails.
        """
        done = 0
        while done < len(chunk):
            written = os.pwrite(self._fd, chunk[done:], offset + done)
            # O_DIRECT may stop inside a block where space ends; the block is then written again.
            written = written // BLOCK_BYTES * BLOCK_BYTES if self.direct else written
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += written

    def read(self, offset: int, chunk: memoryview) -> None:
        """Fill a whole chunk, aligned likewise.

        Raises:
            OSError: the disk fails, or the file ends early.
        """
        done = 0
        while done < len(chunk):
            num_read = os.preadv(self._fd, [chunk[done:]], offset + done)
            num_read = num_read // BLOCK_BYTES * BLOCK_BYTES if self.direct else num_read
            if not num_read:
                raise OSError(errno.EIO, "the file ends early")
            done += num_read

    def failure(self, error: OSError, *, wanted_bytes: int, stored_bytes: int) -> OffloadError:
        """Return the error to raise for one of the operating system."""
        free_bytes = "an unknown number of"
        with suppress(OSError):  # the folder may be gone, or its disk
            space = os.statvfs(self.folder)
            free_bytes = str(space.f_bavail * space.f_frsize)
        cause = "is full" if error.errno in FULL else "failed"
        return OffloadError(
            f"the disk tier in {self.folder} {cause} ({error.strerror or error}): {wanted_bytes} bytes were to be "
            f"moved, {stored_bytes} are stored, {free_bytes} bytes are free there; name another folder, or offload less"
        )


def _open_best(folder: Path) -> tuple[int, bool]:
    """Return a nameless file, and whether it bypasses the page cache."""
    if O_DIRECT:
        try:
            fd = _open(folder, O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what open says where the file system has no O_DIRECT
                raise
        else:
            if _takes_direct(fd):
                return fd, True
            os.close(fd)
    return _open(folder, 0), False


def _open(folder: Path, flags: int) -> int:
    """Open a nameless file, private to this user."""
    flags |= os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    if O_TMPFILE:
        try:
            return os.open(folder, flags | O_TMPFILE, 0o600)
        except OSError as error:  # what it says where the file system or the kernel has none
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
                raise
    path = folder / f"packlight-{secrets.token_hex(8)}"
    try:
        return os.open(path, flags | os.O_CREAT, 0o600)
    finally:
        with suppress(FileNotFoundError):  # an open that fails for want of O_DIRECT has made the file all the same
            path.unlink()


def _takes_direct(fd: int) -> bool:
    """Try O_DIRECT on one block: some file systems open with it and refuse the first write."""
    with mmap.mmap(-1, BLOCK_BYTES) as page:
        try:
            return os.pwrite(fd, page, 0) == BLOCK_BYTES
        except OSError as error:
            return error.errno in FULL


def is_in_memory(folder: Path) -> bool:
    """Tell whether a folder's file system keeps its files in memory (tmpfs, ramfs)."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    except OSError:  # no Linux
        return False
    # ID parent MAJOR:MINOR root mount options ... - TYPE source; proc(5)
    kinds = {line.split()[2]: line.partition(" - ")[2].split()[0] for line in lines}
    return kinds.get(wanted) in {"tmpfs", "ramfs"}
