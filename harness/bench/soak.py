"""An hour of play at full speed, everything a player can do in it: does memory stay flat, and does nothing break?

    python -m harness.bench.soak --minutes 60 --out soak.csv model=doom quant=mxfp4_all kv=mx_v_only

Serves the game of harness/play.py in a process of its own and plays it over a WebSocket: formats switched and split,
resets, recordings saved and replayed bit for bit (which saves a state and comes back to it), codecs, limits, pauses, a
browser that stalls, tabs that leave politely and that vanish, a second tab beside the first. Every 10 s the server's
resident memory, threads and open files go into the CSV; at the end a table, and the slope of the memory. Needs Linux,
the extra [play] and websocket-client.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import websocket

import harness
from harness.bench.play_client import Client
from harness.entries import command_parser, output

SAMPLE_S, ROW_S = 10.0, 300.0
SETTLE_S = 900.0
"""Left out of the slope: allocators and caches fill."""


class Sampler(threading.Thread):
    """Reads what a process holds every ``SAMPLE_S``: seconds, MiB, threads, open files, frames played so far."""

    def __init__(self, pid: int, frames: Callable[[], int], out: TextIO) -> None:
        super().__init__(daemon=True)
        self._pid, self._frames, self._out = pid, frames, csv.writer(out)
        self._flush = out.flush
        self._stopped = threading.Event()
        self.rows: list[tuple[float, float, int, int, int]] = []
        self._out.writerow(("seconds", "rss_mib", "threads", "files", "frames"))

    def run(self) -> None:
        """Until it is stopped."""
        start = time.monotonic()
        while not self._stopped.is_set():
            with suppress(FileNotFoundError, ProcessLookupError):  # the process ended: whoever plays is told
                status = dict(line.split(":", 1) for line in Path(f"/proc/{self._pid}/status").read_text().splitlines())
                held = int(status["VmRSS"].split()[0]) / 1024
                files = len(os.listdir(f"/proc/{self._pid}/fd"))
                seconds = round(time.monotonic() - start, 1)
                self.rows.append((seconds, round(held, 1), int(status["Threads"]), files, self._frames()))
                self._out.writerow(self.rows[-1])
                self._flush()
            self._stopped.wait(SAMPLE_S)

    def stop(self) -> None:
        """Take no more."""
        self._stopped.set()
        self.join()


class Soak:
    """A player who does everything, in an order drawn from ``seed``. ``done`` counts what was done."""

    def __init__(self, port: int, folder: Path, seed: int) -> None:
        self.port, self.folder, self.random = port, folder, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.frames = 0
        self.client = self._connected()

    def run(self, seconds: float) -> None:
        """Play for so long."""
        playing = [self.switch, self.split, self.reset, self.tape, self.codec, self.limit, self.rest]
        acts = [*playing, self.stall, self.leave, self.vanish, self.beside]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            act = self.random.choice(acts)
            try:
                act()
                self.play(self.random.uniform(3, 12))
            except (websocket.WebSocketException, OSError):  # a player who answers nothing for long is let go
                self.done["cut"] += 1
                self.client = self._connected()
            else:
                self.done[act.__name__] += 1

    def play(self, seconds: float) -> None:
        """Frames for so long, with an action for each."""
        self.client.send(type="play")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._hear()

    def switch(self) -> None:
        """The other formats."""
        arms = [arm for arm in self.client.last["ready"]["arms"] if arm != self.client.last["state"]["arm"]]
        self.client.send(type="arm", arm=arms[0] if arms else self.client.last["state"]["arm"])

    def split(self) -> None:
        """Both formats, their difference, one again."""
        views = ("split", "difference", "one") if len(self.client.last["ready"]["arms"]) > 1 else ("one",)
        for view in views:
            self.client.send(type="view", view=view)
            self.play(2)

    def reset(self) -> None:
        """Another clip, another seed."""
        clip = self.random.choice(self.client.last["ready"]["clips"])["id"]
        self.client.send(type="reset", clip=clip, start=0, seed=self.random.randrange(1000))

    def tape(self) -> None:
        """Record, save, and replay bit for bit."""
        self.client.send(type="record", on=True)
        self.play(3)
        self.client.notices.clear()
        self.client.send(type="record", on=False)
        saved = self._notice("saved")["saved"]
        self.client.send(type="replay", id=f"played/{saved}")
        self._notice("bit for bit")
        for path in self.folder.glob("*"):
            path.unlink()
        self.reset()

    def codec(self) -> None:
        """How frames travel."""
        for codec, quality in (("webp", 80), ("jpeg", 90)):
            self.client.send(type="codec", codec=codec, quality=quality)
            self.play(1)

    def limit(self) -> None:
        """The speed limit."""
        for fps in (5, 1000):
            self.client.send(type="limit", fps=fps)
            self.play(1)

    def rest(self) -> None:
        """Pause, and single steps."""
        self.client.send(type="pause")
        for _ in range(3):
            self.client.send(type="step")
            self._hear()

    def stall(self) -> None:
        """A browser that draws nothing for longer than ``play.stall_s``."""
        time.sleep(4)

    def leave(self) -> None:
        """Close the tab, open another."""
        self.client.close()
        self.client = self._connected()

    def vanish(self) -> None:
        """The connection breaks without a word."""
        self.client.socket.shutdown()  # of the transport: no closing frame is sent
        self.client = self._connected()

    def beside(self) -> None:
        """A second tab plays for a while; if there is no room, it is told."""
        other = Client(self.port)
        with suppress(websocket.WebSocketException):
            other.send(type="play")
            for _ in range(20):
                other.hear()
        other.close()

    def _connected(self) -> Client:
        end = time.monotonic() + 60
        while True:  # the last session is given back beside the connection that ends
            client = Client(self.port)
            try:
                while "ready" not in client.last or "state" not in client.last:
                    client.hear()
                return client
            except websocket.WebSocketException:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def _hear(self) -> None:
        heard = self.client.hear()
        if heard is not None:
            self.frames += 1
            self.client.hold(self.random.randrange(16), (self.random.uniform(-3, 3), 0.0))
        for notice in self.client.notices:
            if notice["level"] == "error":
                raise RuntimeError(f"the game said: {notice['text']}")

    def _notice(self, words: str) -> dict[str, Any]:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            self._hear()
            for notice in self.client.notices:
                if words in notice["text"] and notice["level"] == "good":
                    self.client.notices.clear()
                    return notice
        raise RuntimeError(f"no word of {words!r} within 120 s")


def serve(words: list[str], folder: Path) -> tuple[subprocess.Popen[str], int]:
    """The game in a process of its own, and its port."""
    own = ["play.port=0", "play.fps=1000", f"play.folder={folder}", *words]
    package = str(Path(harness.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "harness.play", *own]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("Play at "):
            return server, int(line.rsplit(":", 1)[1].strip().rstrip("/"))
    raise SystemExit("the game did not start")


def slope(rows: list[tuple[float, float, int, int, int]]) -> float:
    """MiB an hour: least squares over what came after ``SETTLE_S``; NaN of fewer than two."""
    late = [(seconds / 3600, held) for seconds, held, *_ in rows if seconds >= SETTLE_S]
    if len(late) < 2:
        return float("nan")
    mean_t, mean_m = (sum(column) / len(late) for column in zip(*late, strict=True))
    return sum((t - mean_t) * (m - mean_m) for t, m in late) / sum((t - mean_t) ** 2 for t, _ in late)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=output, default="soak.csv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="as for harness/play.py")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, given.out.open("w", newline="") as out:
        server, port = serve(given.words, Path(folder))
        try:
            soak = Soak(port, Path(folder), given.seed)
            sampler = Sampler(server.pid, lambda: soak.frames, out)
            sampler.start()
            soak.run(given.minutes * 60)
            sampler.stop()
        finally:
            server.terminate()
            server.wait()
    rows = sampler.rows
    print("minutes  MiB     threads  files  frames")
    shown = [row for i, row in enumerate(rows) if i == 0 or row[0] // ROW_S > rows[i - 1][0] // ROW_S] + rows[-1:]
    for seconds, held, threads, files, frames in shown:
        print(f"{seconds / 60:7.1f}  {held:6.1f}  {threads:7d}  {files:5d}  {frames:6d}")
    print(", ".join(f"{count} x {name}" for name, count in soak.done.most_common()))
    most = max(held for _, held, *_ in rows)
    print(f"after {SETTLE_S / 60:.0f} minutes: {slope(rows):+.2f} MiB an hour; most {most:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
