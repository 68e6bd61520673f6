"""Measure one layer's attention by itself: see ``harness/bench/attention.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.attention:main")
