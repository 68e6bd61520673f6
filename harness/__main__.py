"""``python -m harness``: the command ``mx-world``."""

from harness.cli import main

main()
