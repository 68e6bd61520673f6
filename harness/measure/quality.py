"""How far an arm's frames are from the recording, and a candidate's from BF16's.

Frames are float in [0, 1] (data range 1). PSNR and SSIM are torchmetrics', one value per frame, so that
drift is a curve; a clip's value is the mean over its frames and a run's the mean over clips, which keeps
every comparison paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CAP = 100.0
"""dB given to identical frames, whose PSNR is infinite and could be neither averaged nor written as JSON."""
METRICS = ("psnr", "ssim")
CHUNK = 16
"""Frames scored at once: both need several float32 copies of what they score."""


@dataclass(frozen=True)
class FrameScores:
    """PSNR in dB (at most ``PSNR_CAP``) and SSIM of consecutive frames."""

    psnr: list[float]
    ssim: list[float]

    def mean(self) -> dict[str, float]:
        """The clip's PSNR and SSIM: means over frames."""
        return {metric: _mean(getattr(self, metric)) for metric in METRICS}


@dataclass(frozen=True)
class ClipQuality:
    """Scores of one clip.

    ``scores`` has ``bf16`` and ``candidate`` (each against the recording) and ``fidelity`` (candidate
    against BF16); without a candidate arm, ``bf16`` only. ``change``: mean absolute change from frame to frame, of
    each arm and the recording. ``fallback``: what the candidate had fallen back to when it rolled this clip.
    """

    clip_id: str
    tag: str
    scores: dict[str, FrameScores]
    change: dict[str, list[float]] = field(default_factory=dict)
    fallback: str | None = None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def frame_psnr(frames: Tensor, reference: Tensor) -> list[float]:
    """PSNR in dB, at most ``PSNR_CAP``, of each of ``frames [N, 3, h, w]`` against ``reference``, as in `score_frames`.

    Raises:
        ValueError: if the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"frames {list(frames.shape)} and reference {list(reference.shape)} differ in shape")
    psnr: list[float] = []
    for ours, theirs in zip(frames.split(CHUNK), reference.split(CHUNK), strict=True):
        pair = ours.float(), theirs.float()
        decibels = peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))
        psnr += decibels.clamp(max=PSNR_CAP).reshape(-1).tolist()
    return psnr


def score_frames(frames: Tensor, reference: Tensor) -> FrameScores:
    """PSNR and SSIM of ``frames [N, 3, h, w]`` against ``reference`` (same shape, both float in [0, 1]).

    Raises:
        ValueError: if the shapes differ.
    """
    psnr = frame_psnr(frames, reference)
    ssim: list[float] = []
    for ours, theirs in zip(frames.split(CHUNK), reference.split(CHUNK), strict=True):
        # SSIM's blur is a depthwise convolution, four times as fast on a CPU in this memory format.
        ours, theirs = (x.float().contiguous(memory_format=torch.channels_last) for x in (ours, theirs))
        similarity = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
        assert isinstance(similarity, Tensor)
        ssim += similarity.reshape(-1).tolist()
    return FrameScores(psnr, ssim)


def _summary(clips: Sequence[ClipQuality]) -> dict[str, Any]:
    """Means, drop, fidelity and per-frame curves over ``clips``, which all hold the same score names."""
    summary: dict[str, Any] = {"clips": len(clips)}
    for name in clips[0].scores:
        scores = [clip.scores[name] for clip in clips]
        means = [score.mean() for score in scores]
        summary[name] = {metric: _mean([mean[metric] for mean in means]) for metric in METRICS}
        # Clips of one run have equally many frames, so frame i of the curve is a mean over all of them.
        summary[name]["curve"] = {
            metric: [_mean(frame) for frame in zip(*(getattr(score, metric) for score in scores), strict=True)]
            for metric in METRICS
        }
    drops = [dropped for clip in clips if (dropped := drop(clip)) is not None]
    if drops:
        summary["drop"] = {metric: _mean([dropped[metric] for dropped in drops]) for metric in METRICS}
    return summary


def drop(clip: ClipQuality) -> dict[str, float] | None:
    """BF16 minus candidate of one clip, positive when the candidate is worse; ``None`` unless both were scored."""
    if not {"bf16", "candidate"} <= clip.scores.keys():
        return None
    bf16, candidate = clip.scores["bf16"].mean(), clip.scores["candidate"].mean()
    return {metric: bf16[metric] - candidate[metric] for metric in METRICS}


def summarise_quality(clips: Sequence[ClipQuality]) -> dict[str, Any] | None:
    """The quality section of a run record, over all clips and per tag; ``None`` where nothing was scored."""
    if not any(clip.scores for clip in clips):
        return None
    tags = sorted({clip.tag for clip in clips})
    return {
        "all": _summary(clips),
        "by_tag": {tag: _summary([clip for clip in clips if clip.tag == tag]) for tag in tags},
    }


def clip_row(clip: ClipQuality) -> dict[str, Any]:
    """One clip's entry of a run record: per-frame scores, their means and, with a candidate, the drop."""
    return {
        "clip_id": clip.clip_id,
        "tag": clip.tag,
        "scores": {name: {**scores.mean(), "frames": asdict(scores)} for name, scores in clip.scores.items()},
        "drop": drop(clip),
        "change": clip.change,
        "fallback": clip.fallback,
    }
