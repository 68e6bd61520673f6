"""How much of an engine's speed reaches a player: see ``harness/bench/play.py``."""

from harness.start import start

if __name__ == "__main__":
    start("harness.bench.play:main")
