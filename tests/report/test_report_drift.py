import pytest

from harness.measure.figures import FrameScores
from harness.report.drift import DriftConf, decoherence_horizon, sentences, summarise_drift, validate
from harness.report.sections import ClipRecord


def test_the_horizon_is_where_fidelity_goes_for_good():
    assert decoherence_horizon([40, 30, 20, 30, 20, 10], 25) == 4
    assert decoherence_horizon([40, 30, 20, 30], 25) is None
    assert decoherence_horizon([20, 10], 25) == 0
    assert decoherence_horizon([25, 25], 25) is None
    assert decoherence_horizon([], 25) is None


def test_the_horizon_of_so_many_frames_in_a_row():
    assert decoherence_horizon([40, 20, 30, 20, 20, 30], 25, frames=2) == 3
    assert decoherence_horizon([40, 20, 30, 20], 25, frames=2) is None
    assert decoherence_horizon([40, 20], 25, frames=1) == 1


def clip(name, tag, psnr, change):
    return ClipRecord.of(name, tag, {"fidelity": FrameScores(psnr, [1.0] * len(psnr))}, change=change)


def test_the_section_counts_clips_and_looks_at_still_ones_apart():
    clips = [
        clip("a", "motion", [30, 20, 20], {"bf16": [0.5, 0.5]}),
        clip("b", "stand_still", [30, 30, 30], {"bf16": [0.01, 0.03], "candidate": [0.02, 0.04]}),
    ]
    found = summarise_drift(clips, DriftConf())
    assert found.horizons == {"a": 1, "b": None}
    assert (found.decohered, found.first_horizon) == (1, 1)
    assert found.stand_still.clips == 1
    assert found.stand_still.change == pytest.approx({"bf16": 0.02, "candidate": 0.03})
    text = " ".join(sentences(found))
    assert "1 of 2 clips, first at frame 1" in text
    assert "candidate 0.0300" in text


def test_a_baseline_alone_has_no_horizon():
    found = summarise_drift([ClipRecord("a", "motion")], DriftConf(frames=3))
    assert found.horizons == {}
    assert found.stand_still is None
    assert not list(sentences(found))
    with pytest.raises(ValueError, match="drift.frames=0"):
        validate(DriftConf(frames=0))
