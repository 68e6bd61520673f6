"""Is a checkpoint really a world model? See ``harness/bench/world_model.py``."""

import sys

from harness.bench.world_model import main

if __name__ == "__main__":
    sys.exit(main())
