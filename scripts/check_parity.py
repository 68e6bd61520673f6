"""Compare this package's numbers with reference outputs: see ``harness/bench/parity.py``."""

import sys

from harness.bench.parity import main

if __name__ == "__main__":
    sys.exit(main())
