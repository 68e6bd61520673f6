"""A player without a browser: speaks the protocol of docs/play.md from Python and answers every frame."""

from __future__ import annotations

import json
import random
import select
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import websocket

from harness.live.protocol import PROTOCOL, unpack_frame

WARM_S = 2.0


class Client:
    """One connection, said hello.

    ``last``: the newest text message of each type. ``notices``: their texts, those that were not yet looked at.
    """

    def __init__(self, port: int, timeout: float = 60) -> None:
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}/play", timeout=timeout)
        self.last: dict[str, dict[str, Any]] = {}
        self.notices: list[dict[str, Any]] = []
        self.seq = 0
        self.send(type="hello", protocol=PROTOCOL)

    def send(self, **message: Any) -> None:
        """A message to the server."""
        self.socket.send(json.dumps(message))

    def hold(self, buttons: int, mouse: tuple[float, float]) -> None:
        """An input, as of now."""
        self.seq += 1
        self.send(type="input", seq=self.seq, t=time.perf_counter() * 1e3, buttons=buttons, mouse=list(mouse))

    def hear(self) -> tuple[dict[str, Any], int] | None:
        """The next message: the header and bytes of a frame, which is said to be drawn; None for words.

        Raises:
            websocket.WebSocketException: if the connection ended.
        """
        data = self.socket.recv()
        if isinstance(data, bytes):
            header, _ = unpack_frame(data)
            self.send(type="drawn", serial=header["serial"])
            return header, len(data)
        if not data:
            raise websocket.WebSocketConnectionClosedException("the server closed")
        message = json.loads(data)
        self.last[message["type"]] = message
        if message["type"] == "notice":
            self.notices.append(message)
        return None

    def close(self) -> None:
        """Say goodbye."""
        self.socket.close()


class Measured:
    """Frames that came, and how long inputs took to be seen in one.

    ``when``: ``answer`` sends an input as a frame comes, when the game has just begun the next one: the longest wait.
    ``any`` sends one at a random moment after the last was seen, as a hand does.
    """

    def __init__(self, client: Client, when: str) -> None:
        self.client, self.when = client, when
        self.frames: list[tuple[float, dict[str, Any], int]] = []
        self.waits: list[float] = []
        self._seen, self._next = client.seq, 0.0
        self._random = random.Random(0)

    def play(self, seconds: float, told: Callable[[dict[str, Any]], None] = lambda header: None) -> None:
        """Play for so many seconds."""
        client, end = self.client, time.monotonic() + seconds
        while time.monotonic() < end:
            if self.when == "any":
                self._wait_for_a_frame()
            heard = client.hear()
            if heard is None:
                continue
            now, (header, size) = time.perf_counter(), heard
            if header["seq"] > self._seen:
                self._seen = header["seq"]
                self.waits.append(now * 1e3 - header["t"])
                self._next = now + self._random.uniform(0.0, 0.15)
            self.frames.append((now, header, size))
            if self.when == "answer":
                self._act()
            told(header)

    def _wait_for_a_frame(self) -> None:
        """Until something has come; acts when its moment does."""
        socket = self.client.socket
        while self.client.seq == self._seen:
            left = self._next - time.perf_counter()
            if left <= 0:
                self._act()
            elif _readable(socket, left):
                return

    def _act(self) -> None:
        seq = self.client.seq + 1
        self.client.hold(1 if seq % 40 < 20 else 2, (float(seq % 3 - 1), 0.0))


def _readable(socket: Any, seconds: float) -> bool:
    return bool(select.select([socket.sock], [], [], seconds)[0])


def figures(port: int, arm: str, view: str, seconds: float, curve: float) -> dict[str, Any]:
    """Play a game: half of the time answering frames, half acting at any moment; prints memory every ``curve`` s."""
    client = Client(port)
    client.send(type="arm", arm=arm)
    client.send(type="view", view=view)
    client.send(type="play")
    Measured(client, "answer").play(min(WARM_S, seconds / 4))
    answer = Measured(client, "answer")
    answer.play(seconds / 2, _Curve(curve))
    at_random = Measured(client, "any")
    at_random.play(seconds / 2, _Curve(curve))
    client.close()
    frames = answer.frames
    span, first, last = frames[-1][0] - frames[0][0], frames[0][1], frames[-1][1]
    return {
        "made": (last["frame"] - first["frame"]) / span,
        "delivered": (len(frames) - 1) / span,
        **{f"answer_{p}": percentile(answer.waits, p) for p in (50, 99)},
        **{f"any_{p}": percentile(at_random.waits, p) for p in (50, 99)},
        "bytes": statistics.mean(size for *_, size in frames),
        "encode": statistics.median(header["encode"] for _, header, _ in frames),
        "dropped": last["dropped"] - first["dropped"],
        "rss": (first["rss"] / 2**20, at_random.frames[-1][1]["rss"] / 2**20),
    }


class _Curve:
    """Prints the memory every so many seconds; never for 0."""

    def __init__(self, every: float) -> None:
        self.every, self.at = every, time.monotonic()

    def __call__(self, header: dict[str, Any]) -> None:
        if self.every and time.monotonic() - self.at >= self.every:
            self.at = time.monotonic()
            print(f"  {header['rss'] / 2**20:8.1f} MiB, frame {header['frame']}", flush=True)


def percentile(values: list[float], p: float) -> float:
    """The p-th percentile; NaN of nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * p / 100))] if ranked else float("nan")


def main(argv: list[str] | None = None) -> int:
    """The other process of the benchmark: PORT ARM VIEW SECONDS CURVE."""
    port, arm, view, seconds, curve = sys.argv[1:] if argv is None else argv
    print(json.dumps(figures(int(port), arm, view, float(seconds), float(curve))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
