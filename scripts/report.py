"""Write a run's or a sweep's page again, from records alone: see ``harness/commands/report.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.commands.report:main")
