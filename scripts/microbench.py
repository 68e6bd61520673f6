"""Time the kernels and attention of a model by themselves: see ``harness/commands/microbench.py``."""

import sys

from harness.commands.microbench import main

if __name__ == "__main__":
    sys.exit(main())
