"""Take away what a run judged as one file: see ``harness/commands/export.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.commands.export:main")
