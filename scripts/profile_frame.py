"""Where one frame's time goes: see ``harness/bench/profile.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.profile:main")
