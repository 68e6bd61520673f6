"""Find the fastest launch shapes in whole layers: see ``harness/bench/tune_layer.py``."""

import sys

from harness.bench.tune_layer import main

if __name__ == "__main__":
    sys.exit(main())
