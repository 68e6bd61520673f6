"""Judge a finished run again, from its record alone: see ``harness/judge.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.judge:main")
