"""Compare this package's numbers with reference outputs: see ``harness/bench/parity.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.parity:main")
