"""Advisory locks, which go with their process however it ends; some file systems have none."""

from __future__ import annotations

import fcntl


def lock(handle: int, wait: bool = False, shared: bool = False) -> str | None:
    """Take the lock of an open file.

    Args:
        handle: descriptor of the file; the lock is given back when it is closed.
        wait: until it is free.
        shared: with others that take it so; else with nobody.

    Returns:
        ``None`` with the lock taken; otherwise why this file system gives none.

    Raises:
        BlockingIOError: if another process has it (``shared``: for itself).
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return None
