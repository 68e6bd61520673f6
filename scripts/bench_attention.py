"""Measure one layer's attention by itself: see ``harness/bench/attention.py``."""

import sys

from harness.bench.attention import main

if __name__ == "__main__":
    sys.exit(main())
