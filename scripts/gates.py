"""Judge a finished run again, from its record alone: see ``harness/judge.py``."""

import sys

from harness.judge import main

if __name__ == "__main__":
    sys.exit(main())
