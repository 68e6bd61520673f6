"""Time the kernels and attention of a model by themselves: see ``harness/bench/micro.py``."""

import sys

from harness.bench.micro import main

if __name__ == "__main__":
    sys.exit(main())
