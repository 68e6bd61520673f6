"""Time the kernels and attention of a model by themselves: see ``harness/bench/micro.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.micro:main")
