"""Time the frame decoder, as a whole and by kernel: see ``harness/bench/decoder.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.decoder:main")
