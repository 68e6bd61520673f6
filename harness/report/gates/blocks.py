"""Frame times become blocks: a neighbour, a clock that changes or a collector disturb many frames in a row.

Single frames are therefore no independent samples. Both arms' frames are cut into blocks at the same frames of the same
clips, each block gives one ratio (of medians, so that a single late frame does not count), and the ratios are the
sample: batch means (Law & Kelton 1991, ch. 9.5.3). Blocks are doubled until neighbours are no longer correlated, as
Flyvbjerg & Petersen (1989, J. Chem. Phys. 91, 461) do; at the latest a block is a whole clip, of which the arms take
turns at going first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SHORTEST = 8
"""Frames of the first blocks that are tried."""
FEWEST = 4
"""Blocks below which correlation between neighbours cannot be told."""
SIGNIFICANT = 1.645
"""Standard errors above which neighbours count as correlated (one-sided 5 %)."""

Clips = Sequence[Sequence[float]]
"""Milliseconds of each frame, clip by clip in the order they ran."""


def block_ratios(bf16: Clips, candidate: Clips) -> list[float]:
    """log(BF16 time / candidate time) of blocks of frames; positive where the candidate is faster.

    Args:
        bf16, candidate: times above 0; the same clips with the same number of frames.

    Returns:
        A ratio per block, of the shortest blocks whose neighbours are not correlated, else a ratio per clip.
    """
    length, longest = SHORTEST, max((len(clip) for clip in bf16), default=0)
    while length < longest:
        ratios = _ratios(bf16, candidate, length)
        if sum(map(len, ratios)) < FEWEST:
            break
        if not correlated(ratios):
            return [ratio for clip in ratios for ratio in clip]
        length *= 2
    return [ratio for clip in _ratios(bf16, candidate, max(longest, 1)) for ratio in clip]


def correlated(clips: Clips) -> bool:
    """Whether neighbours within a clip are alike beyond chance: their correlation against that of independent values.

    Args:
        clips: a value per block, clip by clip.
    """
    sample = np.concatenate([np.asarray(clip, dtype=np.float64) for clip in clips])
    pairs = sum(len(clip) - 1 for clip in clips)
    power = float(np.var(sample))
    if pairs == 0 or np.ptp(sample) == 0 or power == 0:
        return False
    off = [np.asarray(clip, dtype=np.float64) - sample.mean() for clip in clips]
    lag = sum(float(np.dot(clip[1:], clip[:-1])) for clip in off) / pairs / power
    # The mean is the sample's own: independent values correlate by -1/n about it.
    return lag + 1 / len(sample) > SIGNIFICANT / math.sqrt(pairs)


def _ratios(bf16: Clips, candidate: Clips, length: int) -> list[list[float]]:
    ratios = []
    for ours, theirs in zip(candidate, bf16, strict=True):
        count = max(1, len(ours) // length)  # what is left over joins the blocks evenly
        pairs = zip(np.array_split(theirs, count), np.array_split(ours, count), strict=True)
        ratios.append([math.log(float(np.median(before)) / float(np.median(after))) for before, after in pairs])
    return ratios
