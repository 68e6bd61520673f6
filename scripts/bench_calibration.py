"""What formats cost a model, rounded to nearest and calibrated: see ``harness/bench/calibration.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.calibration:main")
