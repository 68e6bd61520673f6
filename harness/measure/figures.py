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
