"""How often each end of an interval misses the truth: see ``harness/bench/intervals.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.intervals:main")
