"""Write a run's or a sweep's page again, from records alone: see ``harness/commands/report.py``."""

import sys

from harness.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
