"""How often each end of an interval misses the truth: see ``harness/bench/intervals.py``."""

import sys

from harness.bench.intervals import main

if __name__ == "__main__":
    sys.exit(main())
