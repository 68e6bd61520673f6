import json

import pytest
import torch

from harness.measure.quality import (
    PSNR_CAP,
    ClipQuality,
    FrameScores,
    clip_row,
    score_frames,
    summarise_quality,
)


def test_psnr_is_that_of_the_definition_per_frame():
    reference = torch.rand(20, 3, 16, 16)
    frames = reference.clone()
    frames[1] += 0.1
    frames[2] += 0.01
    scores = score_frames(frames, reference)
    assert scores.psnr[0] == PSNR_CAP
    assert scores.psnr[1] == pytest.approx(20, abs=1e-3)
    assert scores.psnr[2] == pytest.approx(40, abs=1e-2)
    assert scores.ssim[0] == pytest.approx(1)
    assert scores.ssim[1] < scores.ssim[2] < 1
    assert len(scores.psnr) == len(scores.ssim) == 20


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        score_frames(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 8))


def clip(name, tag, bf16, candidate):
    scores = {
        "bf16": FrameScores(bf16, [0.9] * len(bf16)),
        "candidate": FrameScores(candidate, [0.8] * len(bf16)),
        "fidelity": FrameScores([40.0] * len(bf16), [0.99] * len(bf16)),
    }
    return ClipQuality(name, tag, scores)


def test_drop_is_paired_and_tags_are_apart():
    clips = [
        clip("a", "motion", [30.0, 20.0], [29.0, 19.0]),
        clip("b", "stand_still", [40.0, 40.0], [40.0, 37]),
    ]
    summary = summarise_quality(clips)
    assert summary["all"]["bf16"]["psnr"] == pytest.approx(32.5)
    assert summary["all"]["drop"]["psnr"] == pytest.approx((1 + 1.5) / 2)
    assert summary["all"]["drop"]["ssim"] == pytest.approx(0.1)
    assert summary["by_tag"]["motion"]["drop"]["psnr"] == pytest.approx(1)
    assert summary["by_tag"]["stand_still"]["clips"] == 1
    assert summary["all"]["candidate"]["curve"]["psnr"] == pytest.approx([34.5, 28.0])
    row = clip_row(clips[1])
    assert row["drop"]["psnr"] == pytest.approx(1.5)
    json.dumps(summary, allow_nan=False)


def test_without_a_recording_only_fidelity_remains():
    scores = {"fidelity": FrameScores([50.0], [0.9])}
    summary = summarise_quality([ClipQuality("a", "motion", scores)])
    assert summary["all"]["fidelity"]["psnr"] == 50
    assert "drop" not in summary["all"]
    assert summarise_quality([ClipQuality("a", "motion", {})]) is None


def test_a_lone_baseline_has_no_drop():
    lone = ClipQuality("a", "motion", {"bf16": FrameScores([30.0], [0.9])})
    assert "drop" not in summarise_quality([lone])["all"]
    assert clip_row(lone)["drop"] is None
