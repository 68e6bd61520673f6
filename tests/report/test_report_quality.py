import pytest

from harness.measure.figures import Appearance, FrameScores
from harness.report.quality import summarise_quality
from harness.report.sections import ClipRecord


def clip(name, tag, bf16, candidate):
    scores = {
        "bf16": FrameScores(bf16, [0.9] * len(bf16)),
        "candidate": FrameScores(candidate, [0.8] * len(bf16)),
        "fidelity": FrameScores([40.0] * len(bf16), [0.99] * len(bf16)),
    }
    return ClipRecord.of(name, tag, scores)


def test_drop_is_paired_and_tags_are_apart():
    clips = [
        clip("a", "motion", [30.0, 20.0], [29.0, 19.0]),
        clip("b", "stand_still", [40.0, 40.0], [40.0, 37]),
    ]
    summary = summarise_quality(clips)
    assert summary.all.bf16.psnr == pytest.approx(32.5)
    assert summary.all.drop.psnr == pytest.approx((1 + 1.5) / 2)
    assert summary.all.drop.ssim == pytest.approx(0.1)
    assert summary.by_tag["motion"].drop.psnr == pytest.approx(1)
    assert summary.by_tag["stand_still"].clips == 1
    assert summary.all.candidate.curve.psnr == pytest.approx([34.5, 28.0])
    assert clips[1].drop.psnr == pytest.approx(1.5)


def test_without_a_recording_only_fidelity_remains():
    scores = {"fidelity": FrameScores([50.0], [0.9])}
    summary = summarise_quality([ClipRecord.of("a", "motion", scores)])
    assert summary.all.fidelity.psnr == 50
    assert (summary.all.bf16, summary.all.drop) == (None, None)
    assert summarise_quality([ClipRecord.of("a", "motion", {})]) is None


def test_a_lone_baseline_has_no_drop():
    lone = ClipRecord.of("a", "motion", {"bf16": FrameScores([30.0], [0.9])})
    assert summarise_quality([lone]).all.drop is None
    assert lone.drop is None


def test_appearance_is_averaged_over_the_clips_that_have_it():
    looks = [{"bf16": Appearance(0.8, 2.0, 0.9)}, {"bf16": Appearance(0.6, 4.0, None)}]
    scores = {"bf16": FrameScores([30.0], [0.9])}
    clips = [ClipRecord.of(name, "motion", scores, appearance=look) for name, look in zip("ab", looks, strict=True)]
    assert summarise_quality(clips).all.appearance == {"bf16": Appearance(pytest.approx(0.7), 3.0, 0.9)}
