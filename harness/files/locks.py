"""Advisory locks, which go with their process however it ends; some file systems have none."""

from __future__ import annotations

import fcntl


def lock(handle: int, wait: bool = False) -> str | None:
    """Take the lock of an open file, shared with nobody.

    Args:
        handle: descriptor of the file; the lock is given back when it is closed.
        wait: until it is free.

    Returns:
        ``None`` with the lock taken; otherwise why this file system gives none.

    Raises:
        BlockingIOError: if another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return None
