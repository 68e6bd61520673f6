"""The files of a run's folder: their names, what a record says of them, and whether a run is at work there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from harness.files.locks import lock

RECORD, TABLE, PAGE, FRAMES, LOG = "record.json", "table.txt", "report.html", "frames.csv", "run.log"
ERROR = "error.txt"
"""What ended a job of a sweep; there even if the job never came to a record."""
VIDEOS, LOGGED, JOURNAL, CONFIG = "videos", "log", "journal", ".hydra"
LOCK = "run.lock"
"""Locked by the run at work, and so by nobody once that has ended, however it did."""


@dataclass(frozen=True)
class FileRecord:
    """What a record says of a file of its run: so another run's file is not taken for it."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The file as it is now. Raises ``OSError`` if it cannot be read."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.stat().st_size, digest)

    def fits(self, path: Path) -> bool:
        """Whether ``path`` is that file still."""
        try:
            return path.stat().st_size == self.bytes and FileRecord.of(path) == self
        except OSError:
            return False


def is_running(folder: Path) -> bool:
    """Whether a run is at work in ``folder`` on this machine."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        lock(handle, shared=True)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
