"""The folder that keeps compiled kernels, and who may write to it.

What lies there is loaded into the process as code. torch.utils.cpp_extension takes any file of the right name; here the
folder must be the user's own, and a file's name has the checksum of its contents.
"""

import hashlib
import os
import shlex
import sys
import warnings
from pathlib import Path


def cache_folder() -> Path | None:
    """Find, or make, the private folder that keeps the builds.

    It is $PACKLIGHT_CACHE, else packlight in $XDG_CACHE_HOME, else in ~/.cache (macOS: ~/Library/Caches). What
    lies there gets loaded into the process, so nobody else may write to it.

    Returns:
        The folder, or None, with a warning, if it can be neither made nor written to.

    Raises:
        ValueError: if it belongs to another user, or the group or others may write to it.
    """
    try:
        folder = _named_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        status, reason = folder.stat(), "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not writable"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        reason = str(error)
    else:
        _refuse_shared(folder, status)
    if not reason:
        return folder
    warnings.warn(
        f"packlight cannot keep its compiled kernels ({reason}), each process builds them anew: "
        "set PACKLIGHT_CACHE to a folder of your own",
        stacklevel=5,
    )
    return None


def _named_folder() -> Path:
    if own := os.environ.get("PACKLIGHT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification says to ignore a relative one
        return Path(shared) / "packlight"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "packlight"


def _refuse_shared(folder: Path, status: os.stat_result) -> None:
    if not is_private(status):
        raise ValueError(
            f"the cache folder {folder} belongs to user {status.st_uid} and has mode {status.st_mode & 0o7777:04o}; "
            f"packlight loads code from it, so it must belong to you (user {os.geteuid()}) and nobody else may write "
            f"to it: chmod go-w {shlex.quote(str(folder))}, or set PACKLIGHT_CACHE to another folder"
        )


def is_private(status: os.stat_result) -> bool:
    """Tell whether a file or folder is this user's, and nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def checksum(path: Path) -> str:
    """Return the checksum that a build's name has: of the file's contents, in 32 digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
