"""The statistics behind a verdict: intervals cover as often as they claim, and blocks know about neighbours."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.gates.blocks import block_ratios, correlated
from harness.report.gates.intervals import difference_interval, mean_interval, t_cdf, t_quantile, values_needed


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [
        (0.95, 1, 6.3138),
        (0.95, 2, 2.9200),
        (0.95, 3, 2.3534),
        (0.975, 10, 2.2281),
        (0.95, 11, 1.7959),
        (0.99, 30, 2.4573),
    ],
)
def test_students_quantiles_are_the_tables(probability, freedom, quantile):
    """Abramowitz & Stegun 1964, table 26.10."""
    assert t_quantile(probability, freedom) == pytest.approx(quantile, abs=1e-4)


@given(st.floats(-50, 50), st.integers(1, 200))
def test_students_distribution_is_symmetric(t, freedom):
    assert t_cdf(t, freedom) + t_cdf(-t, freedom) == pytest.approx(1)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_interval_holds_the_mean_and_repeats(values):
    low, high = mean_interval(values, 0.95, 2000, 3)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert mean_interval(values, 0.95, 2000, 3) == (low, high)
    assert mean_interval(values[:1], 0.95, 2000, 3) is None


@pytest.mark.parametrize("count", [3, 4, 8, 12])
def test_each_end_misses_the_mean_of_normal_drops_as_rarely_as_it_claims(count):
    """300 samples: 5 % is 15 of them; beyond 26 has a chance of 0.3 %."""
    generator = np.random.default_rng(count)
    ends = [mean_interval(generator.normal(1.0, 0.5, count), 0.95, 2000, 0) for _ in range(300)]
    assert sum(high < 1.0 for _, high in ends) <= 26
    assert sum(low > 1.0 for low, _ in ends) <= 26
    assert sum(high < 1.0 or low > 1.0 for low, high in ends) >= 2  # and is not wide beyond reason


def test_a_skewed_sample_is_missed_less_often_than_by_students_t_alone():
    """Of 12 exponential drops t's upper end lies too low in 13 % of samples; this one in about 8 %."""
    generator = np.random.default_rng(0)
    samples = [generator.exponential(1.0, 12) for _ in range(400)]
    reach = t_quantile(0.95, 11) / math.sqrt(12)
    alone = sum(sample.mean() + reach * sample.std(ddof=1) < 1 for sample in samples)
    both = sum(mean_interval(sample, 0.95, 2000, 0)[1] < 1 for sample in samples)
    assert both < 0.75 * alone
    assert both / 400 < 0.11


def test_the_difference_of_two_runs_is_covered_too():
    generator = np.random.default_rng(0)
    ends = [difference_interval(generator.normal(0, 1, 6), generator.normal(0, 3, 9), 0.95) for _ in range(400)]
    assert sum(high < 0 for _, high in ends) <= 34
    assert sum(low > 0 for low, _ in ends) <= 34
    assert difference_interval([1.0, 1.0], [0.5, 0.5, 0.5], 0.95) == (0.5, 0.5)
    assert difference_interval([1.0], [0.5, 0.5], 0.95) is None


def test_so_many_values_decide_and_fewer_do_not():
    values = [-0.1, 0.1, 0.5, 0.0, 0.3]
    needed = values_needed(values, 0.3, 0.95)
    mean, spread = np.mean(values), np.std(values, ddof=1)
    for count, decided in ((needed, True), (needed - 1, False)):
        assert bool(mean + t_quantile(0.95, count - 1) * spread / math.sqrt(count) <= 0.3) is decided
    assert values_needed([0.3, 0.3 + 1e-9, 0.3 - 1e-9], 0.3, 0.95) is None
    assert values_needed([1.0], 0.3, 0.95) is None


def test_blocks_are_paired_frame_by_frame():
    bf16 = [[10.0] * 24, [20.0] * 24]  # the second clip ran on a slower machine, in both arms
    candidate = [[5.0] * 24, [10.0] * 24]
    ratios = block_ratios(bf16, candidate)
    assert len(ratios) == 6
    assert ratios == pytest.approx([math.log(2)] * 6)


def test_one_late_frame_does_not_move_a_block():
    late = [10.0] * 24
    late[3] = 1e6
    assert block_ratios([[10.0] * 24] * 2, [late, [10.0] * 24]) == [0.0] * 6


def test_blocks_grow_where_neighbours_are_correlated():
    generator = np.random.default_rng(1)
    bf16 = [[10.0] * 64] * 8
    slow = [[10.0 * (1 + 0.1 * shift)] * 64 for shift in generator.normal(0, 1, 8)]  # each clip off as a whole
    assert len(block_ratios(bf16, slow)) == 8
    independent = [list(10.0 * np.exp(generator.normal(0, 0.05, 64))) for _ in range(8)]
    assert len(block_ratios(bf16, independent)) == 64


def test_correlated_noise_is_covered_by_blocks_and_not_by_frames():
    """Noise that lasts 30 frames, on average: the mean of log ratios is 0."""
    generator = np.random.default_rng(5)

    def misses(sample):
        missed = 0
        for _ in range(100):
            clips = []
            for _ in range(12):
                noise = [generator.normal()]
                for _ in range(63):
                    noise.append(0.967 * noise[-1] + generator.normal() * math.sqrt(1 - 0.967**2))
                clips.append([10 * math.exp(0.02 * value) for value in noise])
            low, high = mean_interval(sample([[10.0] * 64] * 12, clips), 0.95, 2000, 0)
            missed += not low <= 0 <= high
        return missed

    frames = misses(
        lambda bf16, ours: [
            math.log(a / b) for one, two in zip(bf16, ours, strict=True) for a, b in zip(one, two, strict=True)
        ]
    )
    assert frames > 50
    assert misses(block_ratios) <= 20


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=40))
def test_equal_values_are_not_correlated_and_nothing_breaks(values):
    assert correlated([[values[0]] * 3, [values[0]] * 3]) is False
    assert correlated([values]) in (True, False)
    assert correlated([[value] for value in values]) is False  # no neighbours within a clip
