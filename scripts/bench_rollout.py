"""Measure rollouts side by side: see ``harness/bench/rollout.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.rollout:main")
