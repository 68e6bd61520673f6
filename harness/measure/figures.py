"""Figures that are measured in one room and read in another: plain data, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("psnr", "ssim")


@dataclass(frozen=True)
class Stats:
    """Summary of a sample of times in milliseconds; percentiles are linearly interpolated."""

    median: float
    p10: float
    p90: float
    mean: float
    n: int


def summarise(values: Sequence[float]) -> Stats | None:
    """Median, 10th and 90th percentile, mean and count of ``values``; ``None`` for an empty sample."""
    if not len(values):
        return None
    p10, median, p90 = np.percentile(np.asarray(values, dtype=np.float64), (10, 50, 90))
    return Stats(float(median), float(p10), float(p90), float(np.mean(values)), len(values))


@dataclass(frozen=True)
class FrameScores:
    """PSNR in dB (at most ``PSNR_CAP`` of :mod:`harness.measure.quality`) and SSIM of consecutive frames."""

    psnr: list[float]
    ssim: list[float]

    def mean(self, metric: str) -> float:
        """Mean of ``psnr`` or ``ssim`` over the frames."""
        values: list[float] = getattr(self, metric)
        return sum(values) / len(values)


@dataclass(frozen=True)
class Appearance:
    """How an arm's frames look and move beside the recording's, or a difference of two arms.

    See :mod:`harness.measure.appearance`. ``sharpness``: 1 = as sharp as the recording. ``texture``: distance, 0 = the
    same textures. ``action_fidelity``: 1 = moves as the recording does under the same controls, 0 = as a still picture
    would; ``None`` where the recording stands still.
    """

    sharpness: float | None
    texture: float | None
    action_fidelity: float | None

    def worse_than(self, other: Appearance) -> Appearance:
        """What this arm loses against ``other``, positive = worse; ``None`` where either has no figure."""
        return Appearance(
            _difference(other.sharpness, self.sharpness),
            _difference(self.texture, other.texture),
            _difference(other.action_fidelity, self.action_fidelity),
        )

    @classmethod
    def mean(cls, several: Sequence[Appearance]) -> Appearance:
        """Means over clips, of each figure over those that have it."""
        return cls(*(_mean([getattr(one, name) for one in several]) for name in APPEARANCE))


APPEARANCE = ("sharpness", "texture", "action_fidelity")


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
