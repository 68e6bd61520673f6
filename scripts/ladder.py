"""Climb from BF16 to the most aggressive MX configuration that ships: see ``harness/ladder/command.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.ladder.command:cli")
