"""What quantisation does to K and V over a rollout: sampled per frame from what the cache holds, after the frame.

Nothing is counted while a frame runs, so compiled code and CUDA graphs are those of an unobserved run. A sample is a
few reductions over the newest frame of every ring.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.kv.cache import KVCache
from harness.kv.codecs import Codec, Stored
from harness.kv.storage import FrameRing


class FrameFigures(NamedTuple):
    """One frame of one ring: elements of magnitude max, scales that stand for NaN or Inf, and the log2 of the others.

    Scales of zeros count neither way; ``None`` where no scale is left. For an unquantised ring ``nonfinite`` counts
    elements and there is nothing else.
    """

    saturated: int
    nonfinite: int
    log2_scale_min: float | None
    log2_scale_mean: float | None
    log2_scale_max: float | None


class KVStats:
    """Saturation, scales and non-finite values of every layer's K and V, frame by frame.

    Args:
        cache: whose frames are sampled.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for layer, rings in enumerate(cache.rings):
            for name, ring in rings.items():
                groups[ring.format_name].append((layer, name))
        self._groups = list(groups.values())  # those of a format are reduced together
        self._places = [place for group in self._groups for place in group]
        self._samples: dict[int, list[Tensor]] = defaultdict(list)
        """By frame, of each rollout that reached it: figures float64 ``[rings, 5]`` on the CPU."""

    def sample(self) -> None:
        """Take note of the frame just stored; waits for the device, so only between frames."""
        figures = torch.cat([self._figures(group) for group in self._groups])
        self._samples[int(self.cache.frame)].append(figures.double().cpu())

    def _figures(self, group: list[tuple[int, str]]) -> Tensor:
        frames = [self.cache.rings[layer][name].frame(self.cache.slot(layer)) for layer, name in group]
        layer, name = group[0]
        return _figures(frames, self.cache.rings[layer][name].codec)

    def report(self) -> dict[str, Any]:
        """All samples so far, as plain data.

        ``frames``: absolute frame indices that were sampled, in order and once each. ``layers``: an entry per
        quantised ring, with ``layer``, ``tensor``, ``format``; totals (``elements``, ``saturated``,
        ``saturated_share``, ``nonfinite``, ``log2_scale_min/mean/max``); and ``over_time``, lists beside ``frames``
        of ``saturated_share`` and the log2 scales, over all rollouts. ``nonfinite``: where NaN or Inf was stored
        (plain rings too), in order of frame and layer, the first twenty.
        """
        frames = sorted(self._samples)
        over = {frame: torch.stack(self._samples[frame]) for frame in frames}  # [rollouts, rings, 5]
        return {
            "frames": frames,
            "layers": self._layers(list(over.values())) if frames else [],
            "nonfinite": self._nonfinite(over)[:20],
        }

    def _layers(self, samples: list[Tensor]) -> list[dict[str, Any]]:
        found = ((place, self.cache.rings[place[0]][place[1]], row) for row, place in enumerate(self._places))
        entries = [
            {"layer": layer, "tensor": name, "format": ring.format_name, **_entry(ring, [s[:, row] for s in samples])}
            for (layer, name), ring, row in found
            if ring.codec is not None
        ]
        return sorted(entries, key=lambda entry: (entry["layer"], entry["tensor"]))

    def _nonfinite(self, over: dict[int, Tensor]) -> list[dict[str, Any]]:
        """Frame by frame, layer by layer."""
        found = [
            {"frame": frame, "layer": layer, "tensor": name, "count": count}
            for frame, figures in over.items()
            for row, (layer, name) in enumerate(self._places)
            if (count := int(figures[:, row, 1].sum()))
        ]
        return sorted(found, key=lambda entry: (entry["frame"], entry["layer"], entry["tensor"]))


def _figures(frames: list[Stored], codec: Codec | None) -> Tensor:
    """:class:`FrameFigures` of rings of one format, float32 ``[rings, 5]``; NaN stands for None."""
    elements = torch.stack([frame.elements for frame in frames]).flatten(1)
    none = torch.full((len(frames),), math.nan, device=elements.device)
    if codec is None:
        return torch.stack((torch.zeros_like(none), (~elements.isfinite()).sum(1), none, none, none), dim=1)
    log2 = codec.log2_scales(torch.stack([frame.scales for frame in frames]).flatten(1))
    some = log2.isfinite()
    count = some.sum(1)
    lowest = torch.where(some, log2, math.inf).amin(1)
    highest = torch.where(some, log2, -math.inf).amax(1)
    mean = torch.where(some, log2, 0).sum(1) / count
    scales = (torch.where(count > 0, value, none) for value in (lowest, mean, highest))
    return torch.stack((codec.saturated(elements), log2.isnan().sum(1), *scales), dim=1)


def _entry(ring: FrameRing, samples: list[Tensor]) -> dict[str, Any]:
    """A ring's figures from its rows ``[rollouts, 5]`` of every frame."""
    size = ring.shape.numel // ring.shape.frames
    total, over_time = _summary(torch.cat(samples)), [_summary(rows) for rows in samples]
    elements = size * sum(len(rows) for rows in samples)
    shares = [figures.saturated / (size * len(rows)) for figures, rows in zip(over_time, samples, strict=True)]
    scales = ("log2_scale_min", "log2_scale_mean", "log2_scale_max")
    return {
        "elements": elements,
        "saturated_share": total.saturated / elements,
        **total._asdict(),
        "over_time": {
            "saturated_share": [round(share, 6) for share in shares],
            **{key: [getattr(figures, key) for figures in over_time] for key in scales},
        },
    }


def _summary(rows: Tensor) -> FrameFigures:
    """Figures ``[N, 5]`` of several frames as one: sums, the lowest, the mean and the highest."""
    saturated, nonfinite, low, mean, high = rows.unbind(1)
    means = mean[~mean.isnan()]
    if not len(means):
        return FrameFigures(int(saturated.sum()), int(nonfinite.sum()), None, None, None)
    return FrameFigures(
        int(saturated.sum()),
        int(nonfinite.sum()),
        round(float(low.nan_to_num(math.inf).min()), 3),
        round(float(means.mean()), 3),
        round(float(high.nan_to_num(-math.inf).max()), 3),
    )
