"""What loading an exported checkpoint takes: see ``harness/bench/export.py``."""

import sys

from harness.bench.export import main

if __name__ == "__main__":
    sys.exit(main())
