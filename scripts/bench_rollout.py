"""Measure rollouts side by side: see ``harness/bench/rollout.py``."""

import sys

from harness.bench.rollout import main

if __name__ == "__main__":
    sys.exit(main())
