"""Climb from BF16 to the most aggressive MX configuration that ships: see ``harness/ladder/command.py``."""

from __future__ import annotations

from harness.ladder.command import cli

if __name__ == "__main__":
    cli()
