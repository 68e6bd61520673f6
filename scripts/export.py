"""Take away what a run judged as one file: see ``harness/commands/export.py``."""

import sys

from harness.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
