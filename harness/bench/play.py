"""How much of an engine's speed reaches a player, how long an action takes to be seen, and whether memory stays flat.

    python scripts/bench_play.py model=doom quant=mxfp8_all
    python scripts/bench_play.py --seconds 600 --curve 60 model=smoke quant=mxfp4_all

First the session by itself, each arm, nobody looking: frames a second step by step, and with a frame decoded while
the next is denoised, as in play. Then the server of harness/play.py in this process and a client in another over a
WebSocket on loopback. Action to frame is from the moment an input is sent until the first frame made with it has come,
undecoded: a browser adds its own decoding. Inputs are sent as a frame comes, when the next has just begun, which is the
longest wait there is, and at any moment, as hands do. Needs the extras [play] and websocket-client ([pages] brings it).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

import torch
import uvicorn
from torch import Tensor

from harness.bench.child import child
from harness.entries import command_parser, count
from harness.live.pipeline import Pipeline
from harness.live.process import settle_threads
from harness.live.server import SWITCH_S, Game, build_app, uvicorn_config
from harness.session import Action, Session
from harness.session.open import load_play
from harness.session.session import Rolled
from harness.streams import patient

WARM = 10


def engine_fps(session: Session, arm: str, clip: Any, frames: int, split: bool) -> tuple[float, float]:
    """Frames a second of the session alone: step by step, and decoding beside denoising."""
    session.switch(arm)
    session.reset(clip)
    session.split(split)
    actions = [Action(("W",), (float(i % 3 - 1), 0.0)) for i in range(frames)]
    for action in actions[:WARM]:
        session.step(action)
    start = time.perf_counter()
    for action in actions:
        session.step(action)
    stepped = frames / (time.perf_counter() - start)
    pipeline: Pipeline[None] = Pipeline(session, _forget)
    start = time.perf_counter()
    for action in actions:
        pipeline.put(session.advance(action), None)
    pipeline.drain()
    piped = frames / (time.perf_counter() - start)
    pipeline.close()
    return stepped, piped


def _forget(rolled: Rolled, picture: Tensor, note: None) -> None:
    pass


def played(game: Game, port: int, arm: str, view: str, seconds: float, curve: float | None) -> dict[str, Any]:
    """Figures of a game of so many seconds."""
    asked = [str(x) for x in (port, arm, view, seconds, curve or 0)]
    client = subprocess.Popen(**child("play_client", *asked), stdout=subprocess.PIPE, text=True)
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


COLUMNS = (
    f"{'':24}    alone, fps       played, fps    share      answering    any moment            encode         memory\n"
    f"{'':24} stepped  piped    made delivered           p50    p99    p50    p99    KiB     ms  dropped   MiB"
)


def shown(name: str, stepped: float, piped: float, row: dict[str, Any]) -> str:
    """A line under ``COLUMNS``; the share is of frames delivered in what the session makes alone, decoding beside."""
    speed = f"{stepped:7.1f} {piped:6.1f} {row['made']:7.1f} {row['delivered']:9.1f} {row['delivered'] / piped:8.2f}"
    waits = " ".join(f"{row[f'{when}_{p}']:6.1f}" for when in ("answer", "any") for p in (50, 99))
    rest = (
        f"{row['bytes'] / 1024:6.1f} {row['encode']:6.2f} {row['dropped']:8d}  {row['rss'][0]:.1f}, {row['rss'][1]:.1f}"
    )
    return f"{name:24} {speed} {waits} {rest}"


@patient
def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of each game")
    parser.add_argument("--frames", type=count, default=100, help="of the engine alone")
    parser.add_argument("--curve", type=float, help="print the memory every so many seconds")
    parser.add_argument("--arms", default="bf16,candidate", help="which to play, and split")
    parser.add_argument("words", nargs="*", help="as for harness/play.py")
    given = parser.parse_args(argv)
    sys.setswitchinterval(SWITCH_S)
    words = ["play.fps=1000", "play.max_sessions=1", "play.idle_s=86400", "play.port=0", *given.words]
    engine, conf, labels = load_play(words)
    settle_threads(engine)
    game = Game.of(engine, conf, labels, words)
    server = uvicorn.Server(uvicorn_config(build_app(game), conf))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{' '.join(given.words)} on {device}, torch {torch.__version__}", flush=True)
    print(COLUMNS)
    clip = game.shelf.context(game.shelf.first().id, 0)
    for arm in (arm for arm in given.arms.split(",") if arm in (*engine.arms, "split")):
        session = game.pool.lend()
        assert session is not None
        name, view = (engine.default_arm, "split") if arm == "split" else (arm, "one")
        stepped, piped = engine_fps(session, name, clip, given.frames, view == "split")
        game.pool.take_back(session)
        row = played(game, port, name, view, given.seconds, given.curve)
        print(shown(labels.get(arm, arm), stepped, piped, row), flush=True)
    server.should_exit = True
    return 0


if __name__ == "__main__":
    sys.exit(main())
