"""Does a run cost the same at its end as at its beginning? Runs the harness and watches its journal, CPU and memory.

python scripts/check_growth.py --clips 500          (clips of model=smoke: CPU time and memory per clip)
python scripts/check_growth.py --frames 5000        (one clip of so many frames: per tenth of it)

Other words go to the run. CPU time is what the process used, so that a shared machine does not count. Linux alone.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.config.places import PACKAGE
from harness.entries import command_parser

SMOKE = ["model=smoke", "model.arch.n_layers=2", "data.limit=null", "measure.parts_frames=0"]
MX = ["quant=mxfp8_mlp", "kv=mx_v_only"]
POLL_S = 0.01
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def used(pid: int) -> tuple[float, float]:
    """Seconds of CPU and MiB resident of a process and no other."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS, int(fields[21]) * PAGE_BYTES / 2**20


def watch(words: list[str], folder: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Run it. Returns CPU and memory at each line of the journal, and every second of the run."""
    command = [sys.executable, str(PACKAGE / "run.py"), *words, f"hydra.run.dir={folder}"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal, lines, seconds, read, last = folder / "journal" / "0.jsonl", [], [], 0, 0.0
    while child.poll() is None:
        time.sleep(POLL_S)
        try:
            now = used(child.pid)
            if time.monotonic() - last > 1:
                last = time.monotonic()
                seconds.append(now)
            with journal.open("rb") as file:
                file.seek(read)
                text = file.read()
        except OSError:
            continue
        read += len(text)
        lines += [now] * text.count(b"\n")
    if child.returncode:
        raise SystemExit(f"the run ended with {child.returncode}")
    return lines[1:], seconds  # the first line is no clip


def main() -> int:
    """Run, and print what clips or frames cost at its beginning and at its end."""
    parser = command_parser(__doc__)
    parser.add_argument("--clips", type=int, default=0)
    parser.add_argument("--frames", type=int, default=0)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [*SMOKE, *MX, f"data.synthetic_clips={args.clips or 1}"]
        words += [f"data.future_frames={args.frames or 4}", *args.words]
        lines, seconds = watch(words, Path(folder) / "run")
        if args.clips:
            cost = [1000 * (after[0] - before[0]) for before, after in itertools.pairwise(lines)]
            for name, part in (("first", slice(0, 50)), ("last", slice(-50, None))):
                held = statistics.median(line[1] for line in lines[part])
                print(f"{name} 50 clips: {statistics.mean(cost[part]):.1f} ms of CPU a clip, {held:.0f} MiB resident")
        tenth = max(1, len(seconds) // 10)
        print("MiB resident, each tenth of the run:", *(f"{one[1]:.0f}" for one in seconds[::tenth]))
        sizes = {path.name: path.stat().st_size for path in (Path(folder) / "run").iterdir() if path.is_file()}
        print("bytes:", *(f"{name} {size}" for name, size in sorted(sizes.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
