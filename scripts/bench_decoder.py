"""Time the frame decoder, as a whole and by kernel: see ``harness/bench/decoder.py``."""

import sys

from harness.bench.decoder import main

if __name__ == "__main__":
    sys.exit(main())
