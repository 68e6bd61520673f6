"""A game over the tiny model, and a client that talks to it as a browser does."""

import json
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("starlette", reason="starlette is not installed (extra [play])")
pytest.importorskip("httpx", reason="httpx is not installed (extra [dev])")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra [play])")

import uvicorn
from starlette.testclient import TestClient

from harness.live.protocol import PROTOCOL, unpack_frame
from harness.live.server import Game, build_app, uvicorn_config
from harness.session.open import load_play

BASE = "http://127.0.0.1:8000"
NOT_OF_PLAY = ("measure.", "data.limit")


class Client:
    """One connection. ``frames``: headers of those that came; ``last``: the newest text message of each type."""

    def __init__(self, socket):
        self.socket, self.frames, self.last, self.notices, self.pictures, self.seq = socket, [], {}, [], [], 0
        self.draws = True

    def send(self, **message):
        self.socket.send_text(json.dumps(message))

    def hold(self, buttons, mouse=(0, 0), t=1.0):
        self.seq += 1
        self.send(type="input", seq=self.seq, t=t, buttons=buttons, mouse=list(mouse))

    def hear(self):
        message = self.socket.receive()
        if message["type"] == "websocket.close":
            raise ConnectionError(message["code"], message.get("reason"))
        if message.get("bytes"):
            header, self.pictures = unpack_frame(message["bytes"])
            self.frames.append(header)
            if self.draws:
                self.send(type="drawn", serial=header["serial"])
        else:
            content = json.loads(message["text"])
            self.last[content["type"]] = content
            if content["type"] == "notice":
                self.notices.append(content)

    def until(self, true, seconds=30):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, (self.last.get("state"), self.notices, len(self.frames))
            self.hear()

    def until_closed(self):
        """The code with which the server closes."""
        while True:
            try:
                self.hear()
            except ConnectionError as closed:
                return closed.args[0]

    def until_frames(self, count):
        wanted = len(self.frames) + count
        self.until(lambda: len(self.frames) >= wanted)

    def until_state(self, **fields):
        self.until(lambda: all(self.last.get("state", {}).get(name) == value for name, value in fields.items()))

    def until_notice(self, words):
        self.until(lambda: any(words in notice["text"] for notice in self.notices))
        return next(notice for notice in self.notices if words in notice["text"])


@pytest.fixture(scope="session")
def loaded(game):
    words = [f"{key}={value}" for key, value in game.items() if not key.startswith(NOT_OF_PLAY)]
    return load_play([*words, "quant=mxfp4_all", "kv=mx_v_only"])


@pytest.fixture
def make_game(loaded, tmp_path):
    engine, conf, labels = loaded

    def make(**fields):
        own = type(conf)(**{**vars(conf), "folder": str(tmp_path / "played"), "fps": 60.0, **fields})
        return Game.of(engine, own, labels, ["model=doom", "quant=mxfp4_all", "play.port=1"])

    return make


@pytest.fixture
def connect():
    """Open the app's socket, say hello and wait for the first frame."""

    @contextmanager
    def opened(client, path="/play", hello=True, **headers):
        with client.websocket_connect(f"ws://127.0.0.1:8000{path}", headers=headers) as socket:
            player = Client(socket)
            if hello:
                player.send(type="hello", protocol=PROTOCOL)
                player.until(lambda: player.frames and "ready" in player.last and "state" in player.last)
            yield player

    return opened


@pytest.fixture
def serve():
    """A test client of a game's app."""

    @contextmanager
    def started(game):
        with TestClient(build_app(game), base_url=BASE) as client:
            yield client

    return started


class Served:
    """A game on a port of its own. ``config``: changes to uvicorn's."""

    def __init__(self, game, **config):
        settings = uvicorn_config(build_app(game), game.conf)
        for name, value in config.items():
            assert hasattr(settings, name)
            setattr(settings, name, value)
        self.game, self.server = game, uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def listen():
    """Serve a game on loopback."""
    started = []

    def begun(game, **config):
        started.append(Served(game, **config))
        return started[-1]

    yield begun
    for served in started:
        served.stop()
