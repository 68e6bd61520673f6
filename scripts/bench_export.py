"""What loading an exported checkpoint takes: see ``harness/commands/bench_export.py``."""

import sys

from harness.commands.bench_export import main

if __name__ == "__main__":
    sys.exit(main())
