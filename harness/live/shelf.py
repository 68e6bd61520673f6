"""The clips that a game can start from: those of ``data``, and what was played and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.data.clips import ClipError, probe_clip
from harness.data.sources import ClipEntry
from harness.session import Context, Engine, Recorder
from harness.session.recording import SUFFIX
from harness.session.state import StateError

PLAYED = "played/"
"""Before the ids of saved clips, which may be called as others are."""
MOST_PLAYED = 200


class Shelf:
    """Clips by id.

    Args:
        engine: whose ``data`` they are.
        folder: where saved clips go; made when the first one is.

    Raises:
        ClipError: if ``data`` has none to start from.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._given = engine.clips()

    def first(self) -> ClipEntry:
        """What a game starts with: the first clip in which something moves."""
        return next((entry for entry in self._given if entry.tag == "motion"), self._given[0])

    def played(self) -> list[ClipEntry]:
        """Saved clips, newest first; what cannot be read is left out."""
        entries = []
        for path in sorted(self.folder.glob("*.json"), reverse=True)[:MOST_PLAYED]:
            try:
                info = probe_clip(path)
            except ClipError:
                continue
            if info.frames >= self.engine.shape.window:
                entries.append(ClipEntry(PLAYED + info.id, info.tag, info.frames, str(path)))
        return entries

    def listing(self) -> list[dict[str, Any]]:
        """All clips, as the page is told of them."""
        given = [_described(entry, own=False) for entry in self._given]
        return given + [
            {**_described(entry, own=True), "replayable": self._recording_file(entry.id).is_file()}
            for entry in self.played()
        ]

    def context(self, clip: str, start: int) -> Context:
        """The window of a clip.

        Raises:
            ClipError: if there is no such clip, or it cannot be read.
        """
        if not clip.startswith(PLAYED):
            return self.engine.context(clip, start)
        paths = {entry.id: entry.origin for entry in self.played()}
        if clip not in paths:
            raise ClipError(f"{clip}: no such saved clip")
        return self.engine.context_of_file(paths[clip], start)

    def recording(self, clip: str) -> Path:
        """The recording beside a saved clip. Raises :class:`StateError` if there is none."""
        if clip not in {entry.id for entry in self.played()} or not self._recording_file(clip).is_file():
            raise StateError(f"{clip}: no recorded session of that name")
        return self._recording_file(clip)

    def save(self, recorder: Recorder, name: str, clip: str) -> Path:
        """Write a recording as clip ``name``, begun in ``clip``; returns the video's path."""
        fps = self.engine.context(clip).fps if not clip.startswith(PLAYED) else self.context(clip, 0).fps
        return recorder.save(self.folder, name, fps, clip.removeprefix(PLAYED))

    def _recording_file(self, clip: str) -> Path:
        return self.folder / f"{clip.removeprefix(PLAYED)}{SUFFIX}"


def _described(entry: ClipEntry, own: bool) -> dict[str, Any]:
    return {"id": entry.id, "tag": entry.tag, "frames": entry.frames, "own": own, "replayable": False}
