"""Does a run cost the same at its end as at its beginning? See ``harness/bench/growth.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.growth:main")
