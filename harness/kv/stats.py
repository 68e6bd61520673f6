"""What quantisation does to K and V over a rollout: sampled per frame from what the cache holds, after the frame.

Nothing is counted while a frame runs, so compiled code and CUDA graphs are those of an unobserved run. A sample is a
few reductions over the newest frame of every ring.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.kv.cache import KVCache
from harness.kv.codecs import Codec, Stored
from harness.kv.storage import FrameRing

Array = NDArray[np.float64]


FIGURES = ("saturated", "nonfinite", "log2_scale_min", "log2_scale_mean", "log2_scale_max")
"""Of one frame of one ring: elements of magnitude max, scales that stand for NaN or Inf, and the log2 of the others.

Scales of zeros count neither way; NaN where no scale is left. For an unquantised ring ``nonfinite`` counts elements and
there is nothing else.
"""
SCALES = FIGURES[2:]
REPORTED = 20
"""Places with NaN or Inf that a report names, at most."""


@dataclass
class KVSamples:
    """Figures of consecutive samples, as plain data: ``figures[sample][ring]`` are :data:`FIGURES`."""

    frames: list[int]
    figures: list[list[list[float]]]


@dataclass
class _Frame:
    """A frame's figures over all rollouts that reached it, each float64 ``[rings]``."""

    rollouts: int
    saturated: Array
    nonfinite: Array
    low: Array
    mean_sum: Array
    means: Array
    high: Array

    @classmethod
    def empty(cls, rings: int) -> _Frame:
        zeros = np.zeros(rings)
        return cls(0, zeros, zeros, np.full(rings, np.inf), zeros, zeros, np.full(rings, -np.inf))

    def add(self, figures: Array) -> None:
        """Take one rollout's figures ``[rings, 5]`` in."""
        saturated, nonfinite, low, mean, high = figures.T
        self.rollouts += 1
        self.saturated = self.saturated + saturated
        self.nonfinite = self.nonfinite + nonfinite
        self.low = np.fmin(self.low, low)
        self.mean_sum = self.mean_sum + np.nan_to_num(mean)
        self.means = self.means + ~np.isnan(mean)
        self.high = np.fmax(self.high, high)


class KVStats:
    """Saturation, scales and non-finite values of every layer's K and V, frame by frame.

    What is kept grows with the frames of a rollout, not with the number of rollouts.

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
        self._new: list[tuple[int, Tensor]] = []
        self._frames: dict[int, _Frame] = {}

    def sample(self) -> None:
        """Take note of the frame just stored; waits for the device, so only between frames."""
        figures = torch.cat([self._figures(group) for group in self._groups])
        self._new.append((int(self.cache.frame), figures.double().cpu()))

    def _figures(self, group: list[tuple[int, str]]) -> Tensor:
        frames = [self.cache.rings[layer][name].frame(self.cache.slot(layer)) for layer, name in group]
        layer, name = group[0]
        return _figures(frames, self.cache.rings[layer][name].codec)

    def take(self) -> KVSamples:
        """The samples since the last call, which :meth:`report` counts from now on."""
        new, self._new = self._new, []
        samples = KVSamples([frame for frame, _ in new], [figures.tolist() for _, figures in new])
        self.add(samples)
        return samples

    def add(self, samples: KVSamples) -> None:
        """Count samples of another cache of the same shape and formats: another process's, or an earlier run's."""
        for frame, figures in zip(samples.frames, samples.figures, strict=True):
            if frame not in self._frames:
                self._frames[frame] = _Frame.empty(len(self._places))
            self._frames[frame].add(np.asarray(figures, dtype=np.float64))

    def report(self) -> dict[str, Any]:
        """All samples so far, as plain data.

        ``frames``: absolute frame indices that were sampled, in order and once each. ``layers``: an entry per
        quantised ring, with ``layer``, ``tensor``, ``format``; totals (``elements``, ``saturated``,
        ``saturated_share``, ``nonfinite``, ``log2_scale_min/mean/max``); and ``over_time``, lists beside ``frames``
        of ``saturated_share`` and the log2 scales, over all rollouts. ``nonfinite``: where NaN or Inf was stored
        (plain rings too), in order of frame and layer, the first twenty.
        """
        self.take()
        indices = sorted(self._frames)
        frames = [self._frames[index] for index in indices]
        return {
            "frames": indices,
            "layers": self._layers(frames) if frames else [],
            "nonfinite": self._nonfinite(indices, frames),
        }

    def _layers(self, frames: list[_Frame]) -> list[dict[str, Any]]:
        table = _Table(frames)
        found = ((place, self.cache.rings[place[0]][place[1]], row) for row, place in enumerate(self._places))
        entries = [
            {"layer": layer, "tensor": name, "format": ring.format_name, **table.entry(ring, row)}
            for (layer, name), ring, row in found
            if ring.codec is not None
        ]
        return sorted(entries, key=lambda entry: (entry["layer"], entry["tensor"]))

    def _nonfinite(self, indices: list[int], frames: list[_Frame]) -> list[dict[str, Any]]:
        """Frame by frame, layer by layer."""
        found: list[dict[str, Any]] = []
        for index, frame in zip(indices, frames, strict=True):
            places = [(*self._places[row], int(frame.nonfinite[row])) for row in np.flatnonzero(frame.nonfinite)]
            found += [
                {"frame": index, "layer": layer, "tensor": name, "count": count}
                for layer, name, count in sorted(places)
            ]
            if len(found) >= REPORTED:
                break
        return found[:REPORTED]


def _figures(frames: list[Stored], codec: Codec | None) -> Tensor:
    """The :data:`FIGURES` of rings of one format, float32 ``[rings, 5]``."""
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


class _Table:
    """The figures of all frames, each float64 ``[frames, rings]``."""

    def __init__(self, frames: list[_Frame]) -> None:
        self.rollouts = np.array([frame.rollouts for frame in frames])
        self.saturated, self.nonfinite, self.mean_sum, self.means, self.low, self.high = (
            np.stack([getattr(frame, name) for frame in frames])
            for name in ("saturated", "nonfinite", "mean_sum", "means", "low", "high")
        )

    def entry(self, ring: FrameRing, row: int) -> dict[str, Any]:
        """A ring's totals, and its figures over time."""
        size = ring.shape.numel // ring.shape.frames
        elements, saturated = size * int(self.rollouts.sum()), int(self.saturated[:, row].sum())
        count = self.means[:, row]
        low, high, total = self.low[:, row], self.high[:, row], self.mean_sum[:, row]
        with np.errstate(invalid="ignore"):
            means = total / count
            mean = total.sum() / count.sum()
        shares = self.saturated[:, row] / (size * self.rollouts)
        return {
            "elements": elements,
            "saturated_share": saturated / elements,
            "saturated": saturated,
            "nonfinite": int(self.nonfinite[:, row].sum()),
            **dict(zip(SCALES, _rounded(np.array([low.min(), mean, high.max()])), strict=True)),
            "over_time": {
                "saturated_share": shares.round(6).tolist(),
                **dict(zip(SCALES, map(_rounded, (low, means, high)), strict=True)),
            },
        }


def _rounded(values: Array) -> list[float | None]:
    """Three decimals; None for what is not finite: no scale was left."""
    return [value if math.isfinite(value) else None for value in values.round(3).tolist()]
