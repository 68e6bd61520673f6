"""A/B videos: recording, BF16 and candidate side by side, in a file that any player opens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from harness.data.yuv import rgb_to_yuv420
from harness.files.writing import replacing

CODE_BT601 = 6
"""The matrix of :func:`rgb_to_yuv420`, as H.264 numbers it; without it a player guesses from the picture's size."""
PANEL_HEIGHT = 400
"""Frames are enlarged by the largest whole factor that keeps a panel within this height (at least 1)."""
CAPTION_HEIGHT = 22
GAP = 4
BACKGROUND = 24
INK = 230

THREADS = min(8, os.cpu_count() or 1)
"""That compose pictures, and that encode them."""
AT_ONCE = 64
"""Pictures that wait for the encoder at most."""

Picture = NDArray[np.uint8]


class Frames(Protocol):
    """Uint8 RGB ``[N, h, w, 3]``, one of which is asked for at a time, from several threads; an array is that too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N, h, w, 3."""

    def __getitem__(self, index: int, /) -> Picture: ...


@dataclass(frozen=True)
class Panel:
    """One column of the video: ``frames`` under a caption, with a note per frame."""

    caption: str
    frames: Frames
    notes: Sequence[str] = ()


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=13)


def _caption(text: str, width: int) -> Picture:
    strip = Image.new("L", (width, CAPTION_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    font = _font()
    while text and draw.textlength(text, font=font) > width - 8:
        text = text[:-1]
    draw.text((4, 3), text, fill=INK, font=font)
    return np.repeat(np.asarray(strip, dtype=np.uint8)[:, :, None], 3, axis=2)


def _scale(height: int) -> int:
    return max(1, PANEL_HEIGHT // height)


def compose_frame(panels: Sequence[Panel], index: int) -> Picture:
    """Frame ``index`` of all panels side by side under their captions, uint8 RGB with even sides."""
    columns: list[Picture] = []
    for panel in panels:
        image = panel.frames[index]
        scale = _scale(image.shape[0])
        image = image.repeat(scale, axis=0).repeat(scale, axis=1)
        note = panel.notes[index] if panel.notes else ""
        captioned = np.concatenate((_caption(f"{panel.caption}  {note}".rstrip(), image.shape[1]), image))
        if columns:
            columns.append(np.full((captioned.shape[0], GAP, 3), BACKGROUND, dtype=np.uint8))
        columns.append(captioned)
    picture = np.concatenate(columns, axis=1)
    odd_height, odd_width = picture.shape[0] % 2, picture.shape[1] % 2
    # yuv420p halves both sides, so players refuse odd ones.
    return np.pad(picture, ((0, odd_height), (0, odd_width), (0, 0)), mode="edge")


def write_comparison(path: Path, panels: Sequence[Panel], fps: float) -> None:
    """Write the panels as H.264 (yuv420p, MP4), complete or not at all.

    Raises:
        ValueError: if the panels are empty or differ in their number of frames or in height.
        OSError: if the file cannot be written.
    """
    shapes = {panel.frames.shape[:2] for panel in panels}
    if len(shapes) != 1 or not next(iter(shapes))[0]:
        raise ValueError(f"panels need the same number of frames and height, given [N, h] = {sorted(shapes)}")
    (frames, _) = shapes.pop()
    with replacing(path) as part:
        _encode(part, panels, frames, fps)


def _encode(path: Path, panels: Sequence[Panel], frames: int, fps: float) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        first = compose_frame(panels, 0)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = CODE_BT601
        # One frame after another is noise to a codec: high quality, or its artefacts would pass for the
        # model's.
        # Without mb-tree, whose AVX-512 code gives small pictures now and then another stream for the same input.
        stream.options = {"crf": "17", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = THREADS
        for planes in _pictures(panels, frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())


def _pictures(panels: Sequence[Panel], frames: int) -> Iterator[Picture]:
    """Each frame's planes, composed by several threads: a clip's verdict waits for its video."""
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, frames, AT_ONCE):
            several = range(first, min(first + AT_ONCE, frames))
            yield from pool.map(lambda index: rgb_to_yuv420(compose_frame(panels, index)), several)
