"""What a player holds right now: written by the network, read by the game, latest wins."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from harness.session.action import Action


@dataclass(frozen=True)
class Taken:
    """The action of a frame, and the newest message that it was made of: its ``seq`` and the browser's time ``t``."""

    action: Action
    seq: int
    t: float


class Inputs:
    """The newest input of one player.

    Buttons are those last said to be held, and those that were pressed and let go since the last frame: a tap shorter
    than a frame is not lost. Movements of the mouse since the last frame add up.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._lock = threading.Lock()
        self._held = self._tapped = 0
        self._mouse = [0.0, 0.0]
        self._seq, self._t = 0, 0.0

    def put(self, seq: int, t: float, buttons: int, mouse: Sequence[float]) -> None:
        """An input from the browser; one that is older than what is known (``seq``) only adds its mouse movement."""
        with self._lock:
            self._mouse = [a + b for a, b in zip(self._mouse, mouse, strict=True)]
            self._tapped |= buttons
            if seq >= self._seq:
                self._held, self._seq, self._t = buttons, seq, t

    def take(self) -> Taken:
        """The action of the next frame."""
        with self._lock:
            pressed = self._held | self._tapped
            self._tapped = 0
            moved, self._mouse = self._mouse, [0.0, 0.0]
            names = tuple(name for bit, name in enumerate(self._names) if pressed >> bit & 1)
            return Taken(Action(names, (moved[0], moved[1])), self._seq, self._t)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._held = self._tapped = 0
            self._mouse = [0.0, 0.0]
