"""The server: one page, and a WebSocket whose every connection plays a session of its own.

Starlette and uvicorn, since ASGI is what Python's web servers and tests have in common, both are small, pure Python and
well kept, and Starlette's test client drives a WebSocket without a network. wsproto, also pure Python, speaks the
WebSocket; it bounds messages and pings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from harness.config.play import PlayConf
from harness.live.page import Page
from harness.live.player import Player
from harness.live.process import give_memory_back, resident_bytes
from harness.live.protocol import LARGEST_MESSAGE, MOST_MESSAGES, PROTOCOL, Close, ProtocolError, parse
from harness.live.shelf import Shelf
from harness.session import Engine, Session

log = logging.getLogger(__name__)
SWITCH_S = 1e-4
"""How long a Python thread may keep the others waiting; by default 5 ms, more than a frame on a GPU."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SEND_TIMEOUT_S = 60.0
"""Seconds in which a message must have left; a connection that takes none for so long is lost."""
MOST_COMPLAINTS = 8
"""Messages that cannot be read before the connection is closed."""


class Pool:
    """Sessions, made once and lent to one connection each.

    Nothing is allocated when somebody comes, and nothing is left when they go.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self._free = [Session(engine, batch=1) for _ in range(size)]
        self._lock = threading.Lock()
        self.size = size

    @property
    def used(self) -> int:
        """Sessions that are lent."""
        with self._lock:
            return self.size - len(self._free)

    def lend(self) -> Session | None:
        """A session, or None if all are lent."""
        with self._lock:
            return self._free.pop() if self._free else None

    def take_back(self, session: Session) -> None:
        """It is nobody's again, and remembers nothing."""
        session.leave()
        with self._lock:
            self._free.append(session)


@dataclass
class Game:
    """What all connections share."""

    engine: Engine
    conf: PlayConf
    pool: Pool
    shelf: Shelf
    labels: dict[str, str]
    words: Sequence[str] = ()
    token: str | None = None
    started: float = field(default_factory=time.monotonic)
    players: int = 0

    @classmethod
    def of(cls, engine: Engine, conf: PlayConf, labels: dict[str, str], words: Sequence[str] = ()) -> Game:
        """Sessions and clips made ready; a token where the address is not this machine's own."""
        token = conf.token or (None if conf.is_local else secrets.token_hex(16))
        shelf = Shelf(engine, Path(conf.folder))
        return cls(engine, conf, Pool(engine, conf.max_sessions), shelf, labels, words, token)

    def greeting(self) -> dict[str, Any]:
        """What a browser has to know of the model."""
        engine, plan = self.engine, self.engine.plan
        height, width = plan.dcae.sample_size
        arms = {
            name: {
                "label": self.labels.get(name, name),
                "path": arm.summary.numeric_path,
                "kv": str(arm.kv.storage.value if arm.kv.enabled else "bf16"),
                "weights": arm.kept.note,
                "emulated": arm.summary.emulated,
            }
            for name, arm in engine.arms.items()
        }
        return {
            "type": "ready",
            "protocol": PROTOCOL,
            "arms": arms,
            "buttons": list(engine.button_names),
            "width": width,
            "height": height,
            "window": engine.shape.window,
            "sensitivity": self.conf.sensitivity,
            "fps": self.conf.fps,
            "device": str(engine.device),
            "random_weights": plan.conf.model.checkpoint is None,
            "clips": self.shelf.listing(),
        }


def refusal(connection: HTTPConnection, game: Game) -> str | None:
    """Why a request is not answered, or None.

    A page elsewhere may not use this server: a WebSocket's ``Origin``, where there is one, must be the page's own, and
    on a loopback address ``Host`` must be such a name (a name that someone else makes resolve to here is not). Other
    addresses are protected by the token.
    """
    host = connection.headers.get("host", "")
    origin = connection.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        page = host if origin is None else urlsplit(origin).netloc
    except ValueError:
        return "the Host or the Origin header is no address"
    if game.conf.is_local and name not in {*LOOPBACK, game.conf.host}:
        return f"Host {host!r} is not this server's"
    if page != host:
        return f"Origin {origin!r} is not this server's page"
    given = connection.query_params.get("token", "")
    if game.token is not None and not secrets.compare_digest(given.encode(), game.token.encode()):
        return "the token is missing or wrong; use the whole URL that the server printed"
    return None


def build_app(game: Game) -> Starlette:
    """The ASGI application."""
    page = Page.load()

    async def index(request: Request) -> Response:
        if (reason := refusal(request, game)) is not None:
            return PlainTextResponse(reason, 403)
        return HTMLResponse(page.html, headers=page.headers)

    async def status(request: Request) -> Response:
        if (reason := refusal(request, game)) is not None:
            return PlainTextResponse(reason, 403)
        up = round(time.monotonic() - game.started, 1)
        sessions = {"used": game.pool.used, "size": game.pool.size, "served": game.players}
        return JSONResponse({"protocol": PROTOCOL, "sessions": sessions, "rss": resident_bytes(), "up_s": up})

    async def socket(websocket: WebSocket) -> None:
        if (reason := refusal(websocket, game)) is not None:
            log.warning("refused a WebSocket: %.200s", reason)
            await websocket.close(Close.POLICY, reason[:120])
            return
        await websocket.accept()
        await serve(websocket, game)

    return Starlette(routes=[Route("/", index), Route("/status", status), WebSocketRoute("/play", socket)])


async def serve(websocket: WebSocket, game: Game) -> None:
    """One connection, from its hello to its end, however that comes."""
    try:
        hello = parse(await asyncio.wait_for(websocket.receive_text(), 10))
        if hello.type != "hello" or hello["protocol"] != PROTOCOL:
            raise ProtocolError(f"this server speaks protocol {PROTOCOL}; reload the page")
    except (ProtocolError, TimeoutError) as error:
        await _close(websocket, Close.PROTOCOL, str(error) or "no hello")
        return
    except KeyError:
        await _close(websocket, Close.PROTOCOL, "a binary message; messages to the server are text")
        return
    except WebSocketDisconnect:
        return
    session = game.pool.lend()
    if session is None:
        text = f"all {game.pool.size} sessions are in use (play.max_sessions); close another tab or try again later"
        await _close(websocket, Close.BUSY, text)
        return
    game.players += 1
    await _play(websocket, game, session)


async def _play(websocket: WebSocket, game: Game, session: Session) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            loop.call_soon_threadsafe(ready.set)

    player = Player(session, game.shelf, game.conf, wake, game.words)
    sender = asyncio.create_task(_send(websocket, player, ready, game))
    receiver = asyncio.create_task(_receive(websocket, player))
    player.start()
    try:
        done, _ = await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
        for error in (task.exception() for task in done):
            if error is not None and not _gone(websocket, error):
                log.error("a connection ended", exc_info=error)
    finally:
        # Nothing is waited for: this task may itself have been cancelled, and the session has to come back anyway.
        for task in (sender, receiver):
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or it is told as forgotten
            task.cancel()
        threading.Thread(target=_end, args=(player, game, session), name="play-end").start()


def _gone(websocket: WebSocket, error: BaseException) -> bool:
    """Whether ``error`` only says that nobody is there any more."""
    closed = websocket.application_state is WebSocketState.DISCONNECTED
    return isinstance(error, WebSocketDisconnect | TimeoutError | ConnectionError) or (
        closed and isinstance(error, RuntimeError)
    )


def _end(player: Player, game: Game, session: Session) -> None:
    try:
        player.close()
    finally:
        game.pool.take_back(session)
        give_memory_back()


async def _send(websocket: WebSocket, player: Player, ready: asyncio.Event, game: Game) -> None:
    await websocket.send_json(await asyncio.to_thread(game.greeting))
    while True:
        while (data := player.outbox.take()) is not None:
            sending = websocket.send_text(data) if isinstance(data, str) else websocket.send_bytes(data)
            await asyncio.wait_for(sending, SEND_TIMEOUT_S)
        if player.released:
            await _close(websocket, Close.RELEASED, "released: nothing happened for long")
            return
        await ready.wait()
        ready.clear()


async def _receive(websocket: WebSocket, player: Player) -> None:
    """Messages in; closes the connection of whoever sends too many, or what cannot be read."""
    complaints, second, count = 0, 0, 0
    while True:
        received = await websocket.receive()
        if received["type"] == "websocket.disconnect":
            return
        now = int(time.monotonic())
        second, count = (now, 1) if now != second else (second, count + 1)
        if count > MOST_MESSAGES:
            await _close(websocket, Close.POLICY, f"more than {MOST_MESSAGES} messages a second")
            return
        text = received.get("text")
        try:
            if text is None:
                raise ProtocolError("a binary message; messages to the server are text")
            message = parse(text)
            if message.type == "hello":
                raise ProtocolError("hello: it was said already")
            player.receive(message)
        except ProtocolError as error:
            complaints += 1
            player.outbox.put_notice("error", f"not understood: {error}"[:600])
            if complaints > MOST_COMPLAINTS:
                await _close(websocket, Close.POLICY, "too many messages that cannot be read")
                return


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect, ConnectionError):
        await websocket.close(code, reason[:120])


def url(game: Game, port: int) -> str:
    """Where the game is."""
    host = f"[{game.conf.host}]" if ":" in game.conf.host else game.conf.host
    return f"http://{host}:{port}/" + (f"?token={game.token}" if game.token else "")


class _Server(uvicorn.Server):
    """Says where it is once it listens."""

    def __init__(self, config: uvicorn.Config, game: Game) -> None:
        super().__init__(config)
        self.game = game

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.servers:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"Play at {url(self.game, port)}", flush=True)


def run_server(game: Game) -> None:
    """Serve until Ctrl-C."""
    sys.setswitchinterval(SWITCH_S)
    _Server(uvicorn_config(build_app(game), game.conf), game).run()


def uvicorn_config(app: Starlette, conf: PlayConf) -> uvicorn.Config:
    """How the application is served: small messages, pings, no log of requests (a URL may hold a token)."""
    return uvicorn.Config(
        app,
        host=conf.host,
        port=conf.port,
        ws="wsproto",
        ws_max_size=2 * LARGEST_MESSAGE,
        ws_per_message_deflate=False,  # frames are compressed already
        ws_ping_interval=15.0,
        ws_ping_timeout=20.0,
        http="h11",
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
    )
