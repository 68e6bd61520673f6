"""Intervals: what a sample says about the mean behind it, in one place for drops, speed and memory.

Each end of an interval is a one-sided bound: with ``confidence`` 0.95 the mean lies above the upper end in about 5 % of
all samples, and below the lower end as rarely (both ends together: a 90 % interval). That is what a test of
non-inferiority asks, one side at a time: a gate passes if its bound lies within the threshold. Since *every* criterion
has to pass, none needs a stricter level for there being several (Berger 1982, Technometrics 24, 295).

An end is the wider one of two:

* Student's t: exact for normal samples of any size. The percentile and BCa bootstraps are not used: with 4 clips either
  misses the mean on each side in 12 % of normal samples, where 5 % are claimed (simulated in ``docs/gates.md``).
* the bootstrap-t (Efron & Tibshirani 1993, ch. 12.5), from 5 values on: it follows a skewed sample, a few clips that
  lose much, where t's upper end lies too low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]

FEWEST_FOR_BOOTSTRAP = 5
"""Values below which resampling says nothing: too many resamples are one value repeated."""
MOST_CLIPS = 1_000_000
"""More than this count as "no number of clips"."""


def t_cdf(t: float, freedom: int) -> float:
    """Student's distribution function for a whole number of degrees of freedom, by its finite series.

    Abramowitz & Stegun 1964, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    squared = math.cos(angle) ** 2
    odd = freedom % 2 == 1
    total = 0.0 if odd and freedom == 1 else 1.0
    k = np.arange(3 if odd else 2, freedom - 1, 2, dtype=np.float64)
    total += float(np.cumprod(squared * (k - 1) / k).sum())
    inner = math.sin(angle) * total
    if odd:
        inner = 2 / math.pi * (angle + math.cos(angle) * inner)
    return 0.5 + inner / 2


def t_quantile(probability: float, freedom: int) -> float:
    """Student's quantile for ``probability`` in [0.5, 1) and at least one degree of ``freedom``, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


def mean_interval(values: Sequence[float], confidence: float, resamples: int, seed: int) -> Interval | None:
    """One-sided bounds at ``confidence`` each on the mean behind ``values``; ``None`` for fewer than two."""
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    centre, error = float(sample.mean()), _standard_error(sample)
    reach = t_quantile(confidence, len(sample) - 1) * error
    low, high = centre - reach, centre + reach
    if len(sample) >= FEWEST_FOR_BOOTSTRAP and error > 0:
        below, above = _bootstrap_t(sample, confidence, resamples, seed)
        low, high = min(low, centre - above * error), max(high, centre - below * error)
    return low, high


def difference_interval(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Interval | None:
    """The same for the difference of the means behind two independent samples: Welch's t."""
    if min(len(ours), len(theirs)) < 2:
        return None
    first, second = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    centre = float(first.mean() - second.mean())
    parts = [_standard_error(sample) ** 2 for sample in (first, second)]
    total = sum(parts)
    if total == 0:
        return centre, centre
    spread = sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (first, second), strict=True))
    freedom = max(1, min(math.floor(total**2 / spread) if spread else len(first), len(first) + len(second) - 2))
    reach = t_quantile(confidence, freedom) * math.sqrt(total)
    return centre - reach, centre + reach


def values_needed(values: Sequence[float], threshold: float, confidence: float) -> int | None:
    """How many values of this mean and spread would put ``threshold`` outside the interval (by Student's t).

    ``None`` if the mean lies so near the threshold that no number of them would, or there is no spread to go by.
    """
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    distance, spread = abs(float(sample.mean()) - threshold), float(sample.std(ddof=1))
    if distance == 0 or spread / distance > math.sqrt(MOST_CLIPS) / 2:
        return None
    # Student's quantile lies beyond the normal one, which says of most counts at once that they do not suffice.
    normal, count = NormalDist().inv_cdf(confidence), 2

    def beyond(quantile: float) -> bool:
        return quantile * spread / math.sqrt(count) > distance

    while beyond(normal) or beyond(t_quantile(confidence, count - 1)):
        count += max(1, count // 50)  # coarse where it is a thousand anyway
    return count


def _standard_error(sample: np.ndarray) -> float:
    # Of equal values the mean may differ in its last bit, and so would they spread.
    return 0.0 if np.ptp(sample) == 0 else float(sample.std(ddof=1) / math.sqrt(len(sample)))


def _bootstrap_t(sample: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    """Quantiles of (mean - centre) / error over resamples."""
    drawn = sample[np.random.default_rng(seed).integers(0, len(sample), (resamples, len(sample)))]
    off, error = drawn.mean(axis=1) - sample.mean(), drawn.std(axis=1, ddof=1) / math.sqrt(len(sample))
    # A resample of one value repeated has no error: it lies infinitely far off, on its side.
    spread = error > 1e-12 * np.ptp(sample)
    studentised = np.where(spread, off / np.where(spread, error, 1.0), np.sign(off) * 1e6)
    low, high = np.quantile(studentised, (1 - confidence, confidence))
    return float(low), float(high)
