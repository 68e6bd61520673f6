"""How much of an engine's speed reaches a player, how long an action takes to be seen, and whether memory stays flat.

    python scripts/bench_play.py model=doom quant=mxfp8_all
    python scripts/bench_play.py --seconds 600 --curve 60 model=smoke quant=mxfp4_all

First the session by itself, each arm: frames a second with decoding, nobody looking. Then the server of harness/play.py
in this process and a client in another over a WebSocket on loopback, which changes its input with every frame.
Action to frame is from the moment an input is sent until the first frame made with it has come, undecoded: a browser
adds its own decoding. Needs the extras [play] and websocket-client (which [pages] brings).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import torch
import uvicorn
import websocket

from harness.bench.child import child
from harness.live.protocol import PROTOCOL, unpack_frame
from harness.live.server import SWITCH_S, Game, build_app, uvicorn_config
from harness.session import Action, Session
from harness.session.open import load_play
from harness.threads import usable_cores

WARM = 10


def engine_fps(session: Session, arm: str, clip: Any, frames: int) -> float:
    """Frames a second of the session alone."""
    session.switch(arm)
    session.reset(clip)
    for _ in range(WARM):
        session.step(Action())
    start = time.perf_counter()
    for i in range(frames):
        session.step(Action(("W",), (float(i % 3 - 1), 0.0)))
    return frames / (time.perf_counter() - start)


class Player:
    """A client that plays: answers every frame, and changes its input with it."""

    def __init__(self, port: int) -> None:
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}/play", timeout=60)
        self.seq, self.seen = 0, 0
        self.latencies: list[float] = []
        self.frames: list[tuple[float, dict[str, Any], int]] = []
        self.send(type="hello", protocol=PROTOCOL)

    def send(self, **message: Any) -> None:
        """A message to the server."""
        self.socket.send(json.dumps(message))

    def play(self, seconds: float, curve: float | None) -> None:
        """Play for so many seconds; print the memory every `curve` seconds."""
        end, told = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < end:
            data = self.socket.recv()
            if isinstance(data, str):
                message = json.loads(data)
                if message["type"] == "notice":
                    print(message["text"], flush=True)
                continue
            now = time.perf_counter() * 1e3
            header, _ = unpack_frame(data)
            self.send(type="drawn", serial=header["serial"])
            if header["seq"] > self.seen:
                self.seen = header["seq"]
                self.latencies.append(now - header["t"])
            self.frames.append((now / 1e3, header, len(data)))
            self.seq += 1
            buttons = 1 if self.seq % 40 < 20 else 2
            self.send(
                type="input", seq=self.seq, t=time.perf_counter() * 1e3, buttons=buttons, mouse=[self.seq % 3 - 1, 0]
            )
            if curve and time.monotonic() - told >= curve:
                told = time.monotonic()
                left = round(end - told)
                print(f"  {left:5d} s left: {header['rss'] / 2**20:8.1f} MiB, frame {header['frame']}", flush=True)


def played(game: Game, port: int, arm: str, view: str, seconds: float, curve: float | None) -> dict[str, Any]:
    """Figures of a game of so many seconds."""
    asked = [str(x) for x in ("--client", port, arm, view, "--seconds", seconds, "--curve", curve or 0)]
    client = subprocess.Popen(**child("play", *asked), stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    figures = {}
    for line in client.stdout:
        if line.startswith("{"):
            figures = json.loads(line)
        else:
            print(line, end="", flush=True)
    if client.wait():
        raise SystemExit("the client failed")
    while game.pool.used:
        time.sleep(0.05)
    return figures


def client(port: int, arm: str, view: str, seconds: float, curve: float) -> dict[str, Any]:
    """The other process."""
    player = Player(port)
    player.send(type="arm", arm=arm)
    player.send(type="view", view=view)
    player.send(type="play")
    player.play(min(2.0, seconds / 4), None)
    player.frames.clear()
    player.latencies.clear()
    player.play(seconds, curve)
    player.socket.close()
    frames, waits = player.frames, sorted(player.latencies)
    rss = [header["rss"] / 2**20 for _, header, _ in frames]
    return {
        "fps": (frames[-1][1]["frame"] - frames[0][1]["frame"]) / (frames[-1][0] - frames[0][0]),
        "shown": (len(frames) - 1) / (frames[-1][0] - frames[0][0]),
        "p50": waits[len(waits) // 2],
        "p99": waits[min(len(waits) - 1, int(len(waits) * 0.99))],
        "bytes": statistics.mean(size for *_, size in frames),
        "encode": statistics.median(header["encode"] for _, header, _ in frames),
        "dropped": frames[-1][1]["dropped"] - frames[0][1]["dropped"],
        "rss": (rss[0], rss[-1]),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each game")
    parser.add_argument("--frames", type=int, default=100, help="of the engine alone")
    parser.add_argument("--curve", type=float, help="print the memory every so many seconds")
    parser.add_argument("--arms", default="bf16,candidate", help="which to play, and split")
    parser.add_argument("words", nargs="*", help="as for harness/play.py")
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.client:
        port, arm, view = given.client
        print(json.dumps(client(int(port), arm, view, given.seconds, given.curve)))
        return 0
    sys.setswitchinterval(SWITCH_S)
    words = ["play.fps=1000", "play.max_sessions=1", "play.idle_s=86400", "play.port=0", *given.words]
    engine, conf, labels = load_play(words)
    torch.set_num_threads(engine.plan.conf.threads or min(torch.get_num_threads(), usable_cores()))
    game = Game.of(engine, conf, labels, words)
    server = uvicorn.Server(uvicorn_config(build_app(game), conf))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{' '.join(given.words)} on {device}, torch {torch.__version__}", flush=True)
    columns = "engine fps  played fps  share  shown fps   p50 ms   p99 ms  KiB/frame  encode ms  dropped  MiB, end"
    print(f"{'':24} {columns}")
    arms = [arm for arm in given.arms.split(",") if arm in (*engine.arms, "split")]
    clip = game.shelf.context(game.shelf.first().id, 0)
    for arm in arms:
        session = game.pool.lend()
        assert session is not None
        base = engine_fps(session, engine.default_arm if arm == "split" else arm, clip, given.frames)
        game.pool.take_back(session)
        view = "split" if arm == "split" else "one"
        row = played(game, port, engine.default_arm if arm == "split" else arm, view, given.seconds, given.curve)
        speed = f"{base:10.1f} {row['fps']:11.1f} {row['fps'] / base:6.2f} {row['shown']:10.1f}"
        waits = f"{row['p50']:8.1f} {row['p99']:8.1f} {row['bytes'] / 1024:10.1f} {row['encode']:10.2f}"
        held = f"{row['dropped']:8d}  {row['rss'][0]:.1f}, {row['rss'][1]:.1f}"
        print(f"{labels.get(arm, arm):24} {speed} {waits} {held}", flush=True)
    server.should_exit = True
    return 0


if __name__ == "__main__":
    sys.exit(main())
