"""Whether the times of a run can be trusted is told by what both arms share."""

import pytest
from gate_cases import arm, record

from harness.measure.trust import distrust


def test_even_times_are_trusted():
    assert distrust(record()["arms"]) == []
    assert distrust({"bf16": arm("BF16")}) == []


@pytest.mark.parametrize("factor", [0.5, 0.96, 1.04, 2.0])
def test_a_decoder_that_differs_between_the_arms_is_told(factor):
    arms = {"bf16": arm("BF16"), "candidate": arm("mx", decoder=2.0 * factor)}
    (said,) = distrust(arms)
    assert said.startswith(f"Timing cannot be trusted: the decoder, the same in both arms, took {factor:.2f} times")
    assert "nothing else on the machine" in said


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_decoder_within_what_gate_a_allows_is_not(factor):
    assert distrust({"bf16": arm("BF16"), "candidate": arm("mx", decoder=2.0 * factor)}) == []


@pytest.mark.parametrize("name", ["bf16", "candidate"])
@pytest.mark.parametrize("span", ["dit_ms", "decoder_ms"])
def test_a_tenth_of_frames_far_beyond_the_median_is_told(name, span):
    arms = {"bf16": arm("BF16"), "candidate": arm("mx")}
    arms[name]["speed"][span]["p90"] *= 60
    (said,) = distrust(arms)
    assert "over 66.0 times as long as its median" in said


@pytest.mark.parametrize("broken", [None, "fast", -1.0, 0, float("nan"), float("inf"), True, {}])
def test_what_is_no_time_is_not_judged(broken):
    arms = {"bf16": arm("BF16"), "candidate": arm("mx", decoder=9.0)}
    arms["bf16"]["speed"]["decoder_ms"] = broken
    assert distrust(arms) == []
    arms["bf16"]["speed"] = broken
    assert distrust(arms) == []
