"""Drift: how long a candidate's rollout stays the one that BF16 rolls out, and whether a still scene stays still."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

from harness.report.sections import ClipRecord, Drift, StandStill

STAND_STILL = "stand_still"


@dataclass
class DriftConf:
    """Where two rollouts count as apart. Fits an OmegaConf structured config.

    Attributes:
        fidelity_psnr: dB of candidate against BF16 below which a frame is another frame.
        frames: so many in a row make the horizon; null = all that remain.
    """

    fidelity_psnr: float = 25.0
    frames: int | None = None


def validate(conf: DriftConf) -> None:
    """Raise ``ValueError`` if a field of ``conf`` is out of range."""
    if conf.frames is not None and conf.frames < 1:
        raise ValueError(f"drift.frames={conf.frames}: must be at least 1, or null for all remaining frames")


def decoherence_horizon(psnr: Sequence[float], bound: float, frames: int | None = None) -> int | None:
    """First frame from which ``psnr`` stays below ``bound``; ``None`` if it never does.

    Args:
        psnr: fidelity per frame, dB.
        bound: dB.
        frames: for so many frames; ``None`` = for all that remain.
    """
    if frames is None:
        above = [frame for frame, value in enumerate(psnr) if value >= bound]
        first = above[-1] + 1 if above else 0
        return first if first < len(psnr) else None
    run = 0
    for frame, value in enumerate(psnr):
        run = run + 1 if value < bound else 0
        if run == frames:
            return frame - frames + 1
    return None


def summarise_drift(clips: Sequence[ClipRecord], conf: DriftConf) -> Drift:
    """The drift section of a run record, from its clips.

    ``horizons``: per clip, ``None`` where the rollouts stay together; ``decohered``: how many do not, and the first
    and median horizon of those. ``stand_still``: mean change from frame to frame, in [0, 1], of the recording and of
    each arm, over the clips in which the player stands still; ``None`` without such clips.
    """
    horizons = {
        clip.clip_id: decoherence_horizon(clip.scores["fidelity"].frames.psnr, conf.fidelity_psnr, conf.frames)
        for clip in clips
        if "fidelity" in clip.scores
    }
    reached = sorted(horizon for horizon in horizons.values() if horizon is not None)
    return Drift(
        fidelity_psnr=conf.fidelity_psnr,
        frames=conf.frames,
        horizons=horizons,
        decohered=len(reached),
        first_horizon=reached[0] if reached else None,
        median_horizon=median(reached) if reached else None,
        stand_still=_stand_still([clip for clip in clips if clip.tag == STAND_STILL and clip.change]),
    )


def _stand_still(clips: Sequence[ClipRecord]) -> StandStill | None:
    if not clips:
        return None
    names = clips[0].change
    return StandStill(len(clips), {name: mean(mean(clip.change[name]) for clip in clips) for name in names})


def sentences(drift: Drift) -> Iterator[str]:
    """The section for a person."""
    clips = len(drift.horizons)
    if clips:
        lasting = "to the end" if drift.frames is None else f"for {drift.frames} frames"
        where = ""
        if drift.decohered:
            where = f", first at frame {drift.first_horizon}, median {drift.median_horizon:g}"
        bound = f"fidelity below {drift.fidelity_psnr:g} dB {lasting}"
        yield f"Decoherence ({bound}): {drift.decohered} of {clips} clips{where}."
    still = drift.stand_still
    if still:
        changes = ", ".join(f"{name} {value:.4f}" for name, value in still.change.items())
        clips_of = f"{still.clips} clip{'s' * (still.clips != 1)}"
        yield f"Change per frame while standing still ({clips_of}, scale 0 to 1): {changes}."
