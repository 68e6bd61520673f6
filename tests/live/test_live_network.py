"""What a player sees over a network that is slow, stalls or ends without a word: real sockets, a proxy between."""

import select
import socket
import threading
import time

import pytest

websocket = pytest.importorskip("websocket", reason="websocket-client is not installed (extra [pages])")

from harness.bench.play_client import Client  # noqa: E402


class Proxy:
    """Between a browser and the server, which it lets have ``rate`` bytes a second on the way to the browser.

    ``frozen``: nothing passes either way, and nothing is closed, as with a lid that is shut.
    """

    def __init__(self, port, rate):
        self.to, self.rate, self.frozen, self.passed = port, rate, False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.ends = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.to))
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.ends += [near, far]
            threading.Thread(target=self.carry, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self.carry, args=(far, near, self.rate), daemon=True).start()

    def carry(self, source, sink, rate):
        try:
            while True:
                if self.frozen or not select.select([source], [], [], 0.05)[0]:
                    time.sleep(0.05 if self.frozen else 0)
                    continue
                data = source.recv(65536 if rate is None else max(64, rate // 50))
                if not data:
                    break
                sink.sendall(data)
                if rate is not None:
                    self.passed += len(data)
                    time.sleep(len(data) / rate)
        except (OSError, ValueError):  # closed beneath it by another thread, of which select says ValueError
            pass
        for end in (source, sink):
            end.close()

    def close(self):
        self.listener.close()
        for end in self.ends:
            end.close()


@pytest.fixture
def between():
    made = []

    def opened(port, rate):
        made.append(Proxy(port, rate))
        return made[-1]

    yield opened
    for proxy in made:
        proxy.close()


def until(true, seconds=15):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "never true"
        time.sleep(0.02)


def frames_of(client, seconds):
    """Headers of frames that come within so many seconds, and how long each took since its input."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        heard = client.hear()
        if heard is not None:
            client.hold(1, (1.0, 0.0))
            found.append((heard[0], heard[1], time.perf_counter() * 1e3 - heard[0]["t"]))
    return found


def test_a_slow_network_shows_fewer_frames_each_the_newest(make_game, listen, between):
    """12 kB a second, the game at its own speed: frames that would have waited are dropped, and none grows old."""
    game = make_game(port=0, in_flight=2, fps=40.0, stall_s=10)
    proxy = between(listen(game).port, 12_000)
    client = Client(proxy.port)
    client.send(type="play")
    frames_of(client, 2)
    seen = frames_of(client, 4)
    headers = [header for header, *_ in seen]
    numbers = [header["frame"] for header in headers]
    assert numbers == sorted(numbers)
    made, came = numbers[-1] - numbers[0], len(numbers) - 1
    assert made > 2 * came, "the game does not wait for the network"
    assert headers[-1]["dropped"] - headers[0]["dropped"] >= made - came - 3
    # An input waits for the frames that are on their way before its own, and for nothing else.
    size = sum(size for _, size, _ in seen) / len(seen)
    on_the_way = (2 + 1) * size / 12_000 * 1e3
    waits = sorted(wait for header, _, wait in seen if header["seq"] > 0)
    assert waits[len(waits) // 2] < 3 * on_the_way + 500
    client.close()


def test_a_shut_lid_frees_the_session_and_another_can_play(make_game, listen, between):
    """No goodbye comes: pings that nobody answers end it, and until then the game is paused."""
    game = make_game(port=0, max_sessions=1, stall_s=0.3)
    served = listen(game, ws_ping_interval=0.5, ws_ping_timeout=1.5)
    proxy = between(served.port, 10_000_000)
    client = Client(proxy.port)
    client.send(type="play")
    assert frames_of(client, 1)
    proxy.frozen = True
    assert game.pool.used == 1
    until(lambda: game.pool.used == 0)
    again = Client(served.port)
    again.send(type="play")
    assert frames_of(again, 1)
    again.close()


def test_a_network_that_comes_back_goes_on_with_the_game(make_game, listen, between):
    """Shorter than the pings' patience: the game pauses as stalled, and goes on with the next frame drawn."""
    game = make_game(port=0, stall_s=0.3)
    proxy = between(listen(game, ws_ping_interval=15, ws_ping_timeout=20).port, 10_000_000)
    client = Client(proxy.port)
    client.send(type="play")
    before = frames_of(client, 1)[-1][0]["frame"]
    proxy.frozen = True
    time.sleep(1.5)
    proxy.frozen = False
    states = []
    end = time.monotonic() + 10
    after = before
    while not (after > before + 20 and client.last["state"]["playing"]):
        assert time.monotonic() < end, client.last["state"]
        heard = client.hear()
        after = heard[0]["frame"] if heard else after
        if heard is None and client.last["state"] not in states:
            states.append(client.last["state"])
    assert "stalled" in [state["reason"] for state in states]
    client.close()


def test_a_second_tab_has_a_world_of_its_own_or_is_told_why_not(make_game, listen):
    game = make_game(port=0, max_sessions=2)
    port = listen(game).port
    one, other = Client(port), Client(port)
    one.send(type="play")
    assert frames_of(one, 0.5)
    other.hear()
    while "state" not in other.last:
        other.hear()
    assert other.last["state"]["reason"] == "start", "the first tab's game is not the second's"
    third = Client(port)
    with pytest.raises(websocket.WebSocketException):
        third.hear()
    one.close()
    other.close()
    until(lambda: game.pool.used == 0)
