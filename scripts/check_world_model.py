"""Is a checkpoint really a world model? See ``harness/bench/world_model.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.world_model:main")
