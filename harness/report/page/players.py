"""The stage of a page: videos of clips, and what lies where in their pictures."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.report.page.figures import ARMS
from harness.report.record import RunRecord
from harness.report.sections import ClipRecord
from harness.report.video import CAPTION_HEIGHT, GAP

GAIN = 8
"""How many times as bright the difference of two panels is shown; a power of two, since the page doubles it."""

Panels = list[dict[str, Any]]


def video_path(record: RunRecord, folder: Path, clip: ClipRecord) -> Path | None:
    """A clip's video; ``None`` where it is missing or not the record's own.

    A record may come from anywhere: nothing outside its folder gets into the page, nor another run's file that has
    taken the place of its own; older records name no files.
    """
    root, name, files = folder.resolve(), str(clip.video), record.files
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        return None
    same = files[name].fits(path) if name in files else not files and path.is_file()
    return path if same else None


def embedded_bytes(path: Path) -> int:
    """Bytes that a file takes inside a page, as base64."""
    return 4 * -(-path.stat().st_size // 3)


def source(path: Path, folder: Path, embedded: bool) -> dict[str, str]:
    """Where a player finds a video: ``data`` inside the page, or a ``link`` from ``folder``, one of them empty."""
    if embedded:
        return {"data": "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode(), "link": ""}
    return {"data": "", "link": quote(Path(os.path.relpath(path, folder.resolve())).as_posix())}


def panels(record: RunRecord, clip: ClipRecord, video: int = 0) -> Panels:
    """What a clip's video shows from left to right, as :mod:`harness.ab.callbacks` composes it.

    Each panel has ``label``, the ``video`` it is in, its ``column`` of ``columns`` and ``psnr`` of its frames against
    the recording (empty without one).
    """
    arms = [(name, record.arms[name].label) for name, _ in ARMS if name in record.arms]
    # An arm was scored against the recording, so the video has that as well.
    scored = any(name in clip.scores for name, _ in arms)
    names = [*([("recording", "recording")] if scored else []), *arms]
    return [
        {
            "label": label,
            "video": video,
            "column": column,
            "columns": len(names),
            "psnr": _rounded(clip.scores[name].frames.psnr if name in clip.scores else []),
        }
        for column, (name, label) in enumerate(names)
    ]


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [round(value, 2) if value is not None and math.isfinite(value) else None for value in values]


def stage(players: Sequence[Mapping[str, Any]], frames: int, total: int, embedded: bool) -> dict[str, Any]:
    """What the template's stage needs: ``players`` of clips with ``frames`` frames, ``total`` bytes of videos.

    ``compares``: whether a clip shows two panels; a run of one arm without a recording has nothing to swipe between.
    """
    return {
        "players": players,
        "frames": frames,
        "total": total,
        "embedded": embedded,
        "compares": any(len(player["panels"]) > 1 for player in players),
        "caption": CAPTION_HEIGHT,
        "gap": GAP,
        "gain": GAIN,
    }
