"""Whether the times of a run can be trusted is told by what both arms share."""

from dataclasses import replace

import pytest
from gate_cases import full

from harness.measure.figures import Stats
from harness.measure.trust import distrust
from harness.report.codec import read
from harness.report.record import RunRecord


def speeds(factor=1.0):
    """What both arms took, the candidate's decoder ``factor`` times as long."""
    found = {name: arm.speed for name, arm in read(RunRecord, full()).arms.items()}
    median, p90 = 2.0 * factor, 2.2 * factor
    found["candidate"].decoder_ms = Stats(median, median, p90, median, 24)
    return found


def test_even_times_are_trusted():
    assert distrust(speeds()) == []
    assert distrust({"bf16": speeds()["bf16"]}) == []


@pytest.mark.parametrize("factor", [0.5, 0.96, 1.04, 2.0])
def test_a_decoder_that_differs_between_the_arms_is_told(factor):
    (said,) = distrust(speeds(factor))
    assert said.startswith(f"Timing cannot be trusted: the decoder, the same in both arms, took {factor:.2f} times")
    assert "nothing else on the machine" in said


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_decoder_within_what_gate_a_allows_is_not(factor):
    assert distrust(speeds(factor)) == []


@pytest.mark.parametrize("name", ["bf16", "candidate"])
@pytest.mark.parametrize("span", ["dit_ms", "decoder_ms"])
def test_a_tenth_of_frames_far_beyond_the_median_is_told(name, span):
    arms = speeds()
    stats = getattr(arms[name], span)
    setattr(arms[name], span, replace(stats, p90=60 * stats.p90))
    (said,) = distrust(arms)
    assert "over 66.0 times as long as its median" in said


@pytest.mark.parametrize("broken", [-1.0, 0, float("nan"), float("inf")])
def test_what_is_no_time_is_not_judged(broken):
    arms = speeds(4.5)
    arms["bf16"].decoder_ms = replace(arms["bf16"].decoder_ms, median=broken)
    assert distrust(arms) == []
    arms["bf16"].decoder_ms = None
    assert distrust(arms) == []
