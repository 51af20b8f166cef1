"""The lock of a run folder, which one run at a time has."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from circuit_breaking.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # every other system
    msvcrt = None


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Lock a run folder while a block lasts.

    The lock belongs to the kernel (`flock` on the file `.lock`, on Windows `msvcrt.locking`), so a killed run leaves no
    lock behind.

    Raises:
        UserError: another run has locked the folder, or it cannot be written.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder in the settings.") from error
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {folder}. Wait for it, or choose another name with --run."
            ) from None
        except OSError as error:  # a disk without locks
            raise UserError(f"cannot lock {path}: {error.strerror}. Choose another folder in the settings.") from error
        yield


def _lock(file: TextIO) -> None:
    """Lock an open file until it is closed. Raises `BlockingIOError` if it is locked already."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        raise OSError(errno.ENOTSUP, "Python has no file locks on this system")
