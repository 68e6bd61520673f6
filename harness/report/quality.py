"""The quality section of a record, from its clips: means over clips, over all of them and for each tag."""

from __future__ import annotations

from collections.abc import Sequence

from harness.measure.figures import Appearance
from harness.report.sections import ClipRecord, Curve, MeanScores, Quality, QualitySection, Scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summarise_quality(clips: Sequence[ClipRecord]) -> Quality | None:
    """The section; ``None`` where nothing was scored."""
    if not any(clip.scores for clip in clips):
        return None
    tags = sorted({clip.tag for clip in clips})
    return Quality(_section(clips), {tag: _section([clip for clip in clips if clip.tag == tag]) for tag in tags})


def _section(clips: Sequence[ClipRecord]) -> QualitySection:
    """Means and per-frame curves over ``clips``, which all hold the same scores."""
    section = QualitySection(len(clips), _means(clips, "bf16"), _means(clips, "candidate"), _means(clips, "fidelity"))
    drops = [clip.drop for clip in clips if clip.drop is not None]
    if drops:
        section.drop = Scores(_mean([drop.psnr for drop in drops]), _mean([drop.ssim for drop in drops]))
    names = clips[0].appearance
    section.appearance = {name: Appearance.mean([clip.appearance[name] for clip in clips]) for name in names}
    return section


def _means(clips: Sequence[ClipRecord], name: str) -> MeanScores | None:
    if name not in clips[0].scores:
        return None
    scores = [clip.scores[name] for clip in clips]
    # Clips of one run have equally many frames, so frame i of the curve is a mean over all of them.
    curve = Curve(
        [_mean(frame) for frame in zip(*(score.frames.psnr for score in scores), strict=True)],
        [_mean(frame) for frame in zip(*(score.frames.ssim for score in scores), strict=True)],
    )
    return MeanScores(_mean([score.psnr for score in scores]), _mean([score.ssim for score in scores]), curve)
