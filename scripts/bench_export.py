"""What loading an exported checkpoint takes: see ``harness/bench/export.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.export:main")
