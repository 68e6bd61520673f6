"""How often each end of an interval misses the truth, by method, sample size and shape: why gates use the ones they do.

python scripts/check_intervals.py --samples 2000

Prints, for samples of known mean, in how many of a hundred the mean lies above the upper end (a gate would let pass
what it should not) and below the lower end. Every method claims 5 of 100 on either side.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from harness.entries import command_parser
from harness.entries import count as at_least_one
from harness.report.gates.intervals import mean_interval, t_quantile
from harness.streams import complain, patient

CONFIDENCE, RESAMPLES = 0.95, 2000
Draw = Callable[[np.random.Generator, int], np.ndarray]
Ends = tuple[float, float]

SHAPES: Mapping[str, tuple[Draw, float]] = {
    "normal": (lambda draw, count: draw.normal(0, 1, count), 0.0),
    "heavy tails (Student, 3)": (lambda draw, count: draw.standard_t(3, count), 0.0),
    "skewed (log-normal, 0.5)": (lambda draw, count: draw.lognormal(0, 0.5, count), math.exp(0.125)),
    "very skewed (exponential)": (lambda draw, count: draw.exponential(1, count), 1.0),
    "one in ten loses 5 more": (lambda draw, count: draw.normal(0, 1, count) + 5 * (draw.random(count) < 0.1), 0.5),
}
"""What is drawn, and its mean."""


def students_t(sample: np.ndarray, draw: np.random.Generator) -> Ends:
    """Student's t."""
    reach = t_quantile(CONFIDENCE, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - reach), float(sample.mean() + reach)


def _means(sample: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return sample[draw.integers(0, len(sample), (RESAMPLES, len(sample)))].mean(axis=1)


def percentile(sample: np.ndarray, draw: np.random.Generator) -> Ends:
    """The percentile bootstrap (Efron & Tibshirani 1993, ch. 13)."""
    low, high = np.quantile(_means(sample, draw), (1 - CONFIDENCE, CONFIDENCE))
    return float(low), float(high)


def bca(sample: np.ndarray, draw: np.random.Generator) -> Ends:
    """The bias-corrected and accelerated bootstrap (Efron & Tibshirani 1993, ch. 14.3)."""
    means, normal, least = _means(sample, draw), NormalDist(), 1 / RESAMPLES
    below = np.mean(means < sample.mean()) + 0.5 * np.mean(means == sample.mean())
    bias = normal.inv_cdf(min(max(float(below), least), 1 - least))
    left_out = (sample.sum() - sample) / (len(sample) - 1)
    off = left_out.mean() - left_out
    acceleration = float((off**3).sum() / (6 * (off**2).sum() ** 1.5))

    def level(probability: float) -> float:
        shifted = bias + normal.inv_cdf(probability)
        return normal.cdf(bias + shifted / (1 - acceleration * shifted))

    low, high = np.quantile(means, (level(1 - CONFIDENCE), level(CONFIDENCE)))
    return float(low), float(high)


def gates(sample: np.ndarray, draw: np.random.Generator) -> Ends:
    """What gates use."""
    found = mean_interval(list(sample), CONFIDENCE, RESAMPLES, 0)
    assert found is not None
    return found


METHODS = {"percentile": percentile, "BCa": bca, "t": students_t, "gates": gates}


def misses(shape: str, count: int, samples: int) -> dict[str, tuple[float, float]]:
    """Per method: percent of samples whose upper end lies too low, and whose lower end lies too high."""
    (drawn, mean), draw = SHAPES[shape], np.random.default_rng(count)
    found = dict.fromkeys(METHODS, (0, 0))
    for _ in range(samples):
        sample = drawn(draw, count)
        for name, method in METHODS.items():
            low, high = method(sample, draw)
            above, below = found[name]
            found[name] = (above + (high < mean), below + (low > mean))
    return {name: (100 * above / samples, 100 * below / samples) for name, (above, below) in found.items()}


@patient
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 where an argument makes no sense."""
    parser = command_parser(__doc__)
    parser.add_argument("--samples", type=at_least_one, default=2000, help="samples of each kind (default 2000)")
    parser.add_argument("--clips", type=at_least_one, nargs="+", default=[4, 8, 12, 24], help="sizes of a sample")
    args = parser.parse_args(argv)
    if min(args.clips) < 2:
        complain("--clips: at least 2 give an interval")
        return 2
    print("| drops | clips | " + " | ".join(f"{name}: above, below" for name in METHODS) + " |")
    print("|---|---|" + "---|" * len(METHODS))
    for shape in SHAPES:
        for count in args.clips:
            cells = [f"{above:.1f}, {below:.1f}" for above, below in misses(shape, count, args.samples).values()]
            print(f"| {shape} | {count} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
