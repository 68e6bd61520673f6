"""Judge a finished run again, from its record alone: see ``harness/judge.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.judge import main

if __name__ == "__main__":
    sys.exit(main())
