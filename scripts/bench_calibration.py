"""What formats cost a model, rounded to nearest and calibrated: see ``harness/bench/calibration.py``."""

import sys

from harness.bench.calibration import main

if __name__ == "__main__":
    sys.exit(main())
