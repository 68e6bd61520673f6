"""A run's folder, which is that run's alone."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from harness.files.locks import lock
from harness.files.writing import remove_parts
from harness.report.files import CONFIG, ERROR, FRAMES, JOURNAL, LOCK, LOG, LOGGED, PAGE, RECORD, TABLE, VIDEOS
from harness.signals import Stopped

OURS = (RECORD, TABLE, PAGE, FRAMES, LOG, ERROR, VIDEOS, LOGGED, "wandb", JOURNAL, CONFIG)
"""What a run leaves, and what ``overwrite=true`` removes."""
KEPT = (RECORD, FRAMES, VIDEOS)
"""Any of these is worth the folder."""
OTHERS = (LOCK, "console.log")
"""What may lie in a folder that no run has used yet: what a launcher says goes to ``console.log``."""


class FolderError(ValueError):
    """A folder that a run cannot have."""


class RunFolder:
    """The folder of one run: claimed before anything is written to it, and given up if nothing came of the run.

    As a context it is given up where a user's error or a signal ends it before a clip was finished, and released in any
    case. What else goes wrong leaves ``run.log``.

    Args:
        path: need not exist.

    ``unlocked``: why no lock keeps others out of the claimed folder; None where one does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unlocked: str | None = None
        self._lock: int | None = None
        self._fresh = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | OSError | OmegaConfBaseException | Stopped) and not any(
            (self.path / name).exists() for name in KEPT
        ):
            self.abandon()
        else:
            self.release()

    def claim(self, resume: bool, overwrite: bool) -> None:
        """Make it this run's, until :meth:`release` or the end of the process, however that ends.

        Args:
            resume: what an earlier run left there is gone on with.
            overwrite: it is removed.

        Raises:
            FolderError: if another run writes to it, or it is used and neither was said.
            OSError: if it cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        for folder in (self.path, self.path / VIDEOS):
            remove_parts(folder)
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name not in OTHERS)
        foreign = [name for name in found if name not in OURS]
        if foreign and foreign == found:
            self.release()
            raise FolderError(
                f"{self.path}: holds other files ({', '.join(foreign[:3])}); a run needs a folder of its own"
            )
        if overwrite:
            self._remove(OURS)
        elif found and not resume:
            self.release()
            raise FolderError(
                f"{self.path}: an earlier run is in it ({', '.join(found[:3])}). Use another folder, resume=true to go "
                "on after the last clip it finished, or overwrite=true to replace it"
            )
        self._fresh = overwrite or not found

    def _take_lock(self) -> None:
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.unlocked = lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise FolderError(f"{self.path}: another run is writing to it right now; use another folder") from None
        self._lock = handle

    def _remove(self, names: tuple[str, ...]) -> None:
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def abandon(self) -> None:
        """Remove what this run wrote, nothing of it being worth keeping, and the folder if that leaves it empty."""
        if self._lock is not None and self._fresh:
            self._remove(OURS)
        self.release()
        remove_if_empty(self.path)


def remove_if_empty(path: Path) -> None:
    """Remove the folder if nothing is in it."""
    with suppress(OSError):  # it is used, or not there
        path.rmdir()
