"""One table of everything that is measured: see ``harness/bench/summary.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.summary:main")
