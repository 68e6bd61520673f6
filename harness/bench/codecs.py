"""What a frame costs as JPEG and as WebP: bytes, milliseconds on one core, and what is lost of it.

    python -m harness.bench.codecs model=doom

Frames are those of a session played for ``--frames``. PSNR is of the picture that a browser decodes against the frame.
Needs the extra [play].
"""

from __future__ import annotations

import io
import statistics
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.entries import command_parser, count
from harness.live.pictures import compress, psnr
from harness.session import Action, open_session

WAYS = (("jpeg", 80), ("jpeg", 90), ("jpeg", 95), ("webp", 80), ("webp", 90), ("webp", 95))


def played(words: list[str], count: int) -> list[Tensor]:
    """So many frames of the first clip in which something moves."""
    with open_session(*words) as session:
        clips = session.engine.clips()
        session.reset(next((clip for clip in clips if clip.tag == "motion"), clips[0]).id)
        return [session.step(Action(("W",), (2.0 if i % 20 < 10 else -2.0, 0.0))) for i in range(count)]


def measured(frames: list[Tensor], codec: str, quality: int) -> tuple[float, float, float]:
    """Medians over frames: KiB, milliseconds of encoding, PSNR in dB."""
    rows = []
    for frame in frames:
        start = time.perf_counter()
        data = compress(frame, codec, quality)
        took = (time.perf_counter() - start) * 1e3
        seen = torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy())
        rows.append((len(data) / 1024, took, psnr(seen, frame)))
    sizes, times, values = zip(*rows, strict=True)
    return statistics.median(sizes), statistics.median(times), statistics.median(values)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(__doc__)
    parser.add_argument("--frames", type=count, default=60)
    parser.add_argument("words", nargs="*", help="as for harness/play.py")
    given = parser.parse_args(argv)
    frames = played(given.words, given.frames)
    noise = [torch.randint(256, (360, 640, 3), dtype=torch.uint8) for _ in range(5)]
    height, width = frames[0].shape[:2]
    print(f"{'':10} {f'{width} x {height}, played':>28} {'640 x 360, noise':>28}")
    print(f"{'':10} {'KiB':>10} {'ms':>8} {'dB':>8} {'KiB':>10} {'ms':>8} {'dB':>8}")
    for codec, quality in WAYS:
        cells = [*measured(frames, codec, quality), *measured(noise, codec, quality)]
        print(f"{codec} {quality:<5} " + " ".join(f"{x:{w}.2f}" for x, w in zip(cells, (10, 8, 8) * 2, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
