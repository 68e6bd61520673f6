"""How much of an engine's speed reaches a player: see ``harness/bench/play.py``."""

import sys

from harness.bench.play import main

if __name__ == "__main__":
    sys.exit(main())
