"""Where one frame's time goes: see ``harness/bench/profile.py``."""

import sys

from harness.bench.profile import main

if __name__ == "__main__":
    sys.exit(main())
