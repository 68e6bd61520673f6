"""One table of everything that is measured: see ``harness/bench/summary.py``."""

import sys

from harness.bench.summary import main

if __name__ == "__main__":
    sys.exit(main())
