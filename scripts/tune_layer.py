"""Find the fastest launch shapes in whole layers: see ``harness/bench/tune_layer.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.tune_layer:main")
