"""Climb from BF16 to the most aggressive MX configuration that ships: see ``harness/ladder/command.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.ladder.command import cli

if __name__ == "__main__":
    cli()
