"""Scores of clips, and over all clips; PSNR in dB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.measure.figures import Appearance, FrameScores


@dataclass
class Scores:
    """PSNR and SSIM: a clip's, or a difference of two."""

    psnr: float
    ssim: float


@dataclass
class ClipScores:
    """A clip's scores: means over its frames, and the ``frames``."""

    psnr: float
    ssim: float
    frames: FrameScores

    @classmethod
    def of(cls, frames: FrameScores) -> ClipScores:
        """The scores of these frames."""
        return cls(frames.mean("psnr"), frames.mean("ssim"), frames)


@dataclass
class ClipRecord:
    """One finished clip.

    ``scores``: ``bf16`` and ``candidate`` against the recording, ``fidelity`` of the candidate against BF16; what has
    no reference is left out. ``drop``: BF16 minus candidate, ``None`` unless both were scored. ``change``: mean change
    from frame to frame, in [0, 1], of the recording and each arm. ``fallback``: in force when it was rolled. ``video``:
    path relative to the run's folder. ``appearance``: of ``bf16`` and ``candidate``, and ``drop``, what the candidate
    loses (positive = worse); empty without a recording.
    """

    clip_id: str
    tag: str
    scores: dict[str, ClipScores] = field(default_factory=dict)
    drop: Scores | None = None
    change: dict[str, list[float]] = field(default_factory=dict)
    fallback: str | None = None
    video: str | None = None
    appearance: dict[str, Appearance] = field(default_factory=dict)

    @classmethod
    def of(cls, clip_id: str, tag: str, scores: dict[str, FrameScores], **more: Any) -> ClipRecord:
        """A clip from the scores of its frames."""
        found = {name: ClipScores.of(frames) for name, frames in scores.items()}
        drop = None
        if {"bf16", "candidate"} <= found.keys():
            bf16, candidate = found["bf16"], found["candidate"]
            drop = Scores(bf16.psnr - candidate.psnr, bf16.ssim - candidate.ssim)
        return cls(clip_id, tag, found, drop, **more)


@dataclass
class Curve:
    """A value per generated frame of each metric."""

    psnr: list[float]
    ssim: list[float]


@dataclass
class MeanScores:
    """Means over clips, and frame by frame."""

    psnr: float
    ssim: float
    curve: Curve | None = None


@dataclass
class QualitySection:
    """Means over ``clips`` clips; ``None`` for what has no reference. ``appearance``: as in :class:`ClipRecord`."""

    clips: int
    bf16: MeanScores | None = None
    candidate: MeanScores | None = None
    fidelity: MeanScores | None = None
    drop: Scores | None = None
    appearance: dict[str, Appearance] = field(default_factory=dict)


@dataclass
class Quality:
    """Over all clips, and over those of each tag."""

    all: QualitySection
    by_tag: dict[str, QualitySection] = field(default_factory=dict)


@dataclass
class StandStill:
    """Mean change from frame to frame of the recording and each arm while the player stands still."""

    clips: int
    change: dict[str, float]


@dataclass
class Drift:
    """How long rollouts stay together; see :func:`harness.report.drift.summarise_drift`."""

    fidelity_psnr: float
    frames: int | None
    horizons: dict[str, int | None]
    decohered: int
    first_horizon: int | None
    median_horizon: float | None
    stand_still: StandStill | None
