"""What is on its way to one browser: the newest frame, the newest word of each kind. It never grows."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NOTICES = 16


@dataclass(frozen=True)
class PackedFrame:
    """A frame, ready to be sent."""

    serial: int
    data: bytes


class Outbox:
    """Filled by the game, emptied by the network.

    A frame that is not sent before the next is ready is dropped. Of words that say how things stand only the newest
    of a kind waits, of notices the newest few.

    Args:
        in_flight: frames that may be sent before the browser says that it drew one.
        wake: called from any thread when there is something to send.
    """

    def __init__(self, in_flight: int, wake: Callable[[], None]) -> None:
        self._most, self._wake = in_flight, wake
        self._lock = threading.Lock()
        self._frame: PackedFrame | None = None
        self._states: dict[str, dict[str, Any]] = {}
        self._notices: deque[dict[str, Any]] = deque(maxlen=NOTICES)
        self._sent: deque[tuple[int, float]] = deque()
        self._newest = 0
        self.dropped = 0

    def put_frame(self, frame: PackedFrame) -> None:
        """The newest frame; one that still waits is dropped, and so is one that comes after a newer one."""
        with self._lock:
            if frame.serial <= self._newest:
                self.dropped += 1
                return
            self.dropped += self._frame is not None
            self._frame, self._newest = frame, frame.serial
        self._wake()

    def put_state(self, kind: str, **fields: Any) -> None:
        """How things stand; an older word of the same kind that still waits is replaced."""
        with self._lock:
            self._states[kind] = {"type": kind, **fields}
        self._wake()

    def put_notice(self, level: str, text: str, **fields: Any) -> None:
        """Something that happened: ``level`` is info, good or error."""
        with self._lock:
            self._notices.append({"type": "notice", "level": level, "text": text, **fields})
        self._wake()

    def take(self) -> str | bytes | None:
        """What is to be sent next: text first; a frame only while few are on their way."""
        with self._lock:
            if self._states:
                return json.dumps(self._states.pop(next(iter(self._states))))
            if self._notices:
                return json.dumps(self._notices.popleft())
            if self._frame is None or len(self._sent) >= self._most:
                return None
            frame, self._frame = self._frame, None
            self._sent.append((frame.serial, time.monotonic()))
            return frame.data

    def drawn(self, serial: int) -> None:
        """The browser drew frame ``serial``, and with it is done with all before it."""
        with self._lock:
            while self._sent and self._sent[0][0] <= serial:
                self._sent.popleft()
        self._wake()

    def waiting_s(self) -> float:
        """Seconds for which the oldest frame on its way has been unanswered; 0 if none is."""
        with self._lock:
            return time.monotonic() - self._sent[0][1] if self._sent else 0.0
