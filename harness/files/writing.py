"""Files that are written whole or not at all, and lines that are."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = 48
"""Characters of a file's own name in that of its part: together they stay within a file system's 255 bytes."""
PART = re.compile(r"\..+\.\d+\.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place once it is complete and on the disk.

    Raises:
        OSError: naming ``path``, if it cannot be written; it then holds what it held before.
    """
    part = path.with_name(f".{path.name[:NAME]}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed had begun to write in ``folder``, which nobody else may be writing to."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if PART.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, all of it or nothing; makes the folder. Raises ``OSError`` as :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def append(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of a file, on the disk when this returns, all of it or nothing; makes the folder.

    Raises:
        OSError: naming ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(None, "only a part of it fits on the disk")
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(path, start)
                raise
    except OSError as error:
        raise _unwritten(path, error) from error


def why_unwritable(path: Path) -> str | None:
    """Why the file ``path`` could not be written or added to now; ``None`` if it could. Tried out; leaves nothing."""
    try:
        if path.is_fifo():
            return "a named pipe, which waits for a reader"
        if path.exists():
            with path.open("ab"):
                return None
        above = next(part for part in path.absolute().parents if part.exists())
        with tempfile.TemporaryFile(dir=above):
            return None
    except OSError as error:
        return error.strerror or str(error)


def folder_problem(folder: Path) -> str | None:
    """What to tell of a folder that nothing could be written into now; ``None`` if something could."""
    why = why_unwritable(folder / "written")
    return None if why is None else f"{folder}: cannot be written to ({why}); name another folder"


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot write: {error.strerror or error}", str(path))
