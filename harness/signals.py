"""Signals that end a run: within a frame, and with what was finished recorded."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what SLURM, containers, ``timeout`` and CI send; a terminal that is gone."""


SAME_END_S = 2.0
"""Seconds within which a further signal is of the same end, and raises nothing more."""


class Stopped(BaseException):
    """A signal ended the run. No ``Exception``: nothing on the way may take it for an error to put right."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}; finished clips are kept")

    @property
    def exit_code(self) -> int:
        """As shells have it: 128 and the signal's number."""
        return 128 + self.signal


class Signals:
    """Within the context, a signal of :data:`STOPPING` raises :class:`Stopped` in the main thread.

    An exception may be raised where Python drops it, as in a ``__del__``; :meth:`check` raises it again. Signals that
    follow at once raise nothing more, see :data:`SAME_END_S`.

    One that is ignored where the context begins (``nohup``) stays ignored. Outside of the main thread nothing changes:
    Python delivers signals there alone.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._held = False
        self._waiting: int | None = None
        self._arrived: int | None = None
        self._since = 0.0

    def __enter__(self) -> Signals:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def install(self) -> None:
        """Take the signals, again where somebody else has taken them since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOPPING:
            handler = signal.getsignal(number)
            if handler is signal.SIG_IGN or handler is None:
                continue
            self._before.setdefault(number, handler)
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._waiting = self._waiting or number
            return
        # A terminal that is gone ends all processes, and the first one then ends the others: that is one end, whose
        # cleaning up must not be broken off by its second signal.
        if self._arrived is not None and time.monotonic() - self._since < SAME_END_S:
            return
        self._arrived, self._since = number, time.monotonic()
        if frame is None or frame.f_code.co_name != "__del__":
            raise Stopped(number)

    def check(self) -> None:
        """Raise ``Stopped`` if a signal has arrived: after each frame, so that none is lost."""
        if self._arrived is not None:
            raise Stopped(self._arrived)

    @contextmanager
    def held(self, drop: bool = False) -> Iterator[None]:
        """Within the context, signals wait: what is written there is written whole.

        Afterwards the first one acts; with ``drop``, for a run that a signal ends already, none does.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        number, self._waiting = self._waiting, None
        if number is not None and not drop:
            raise Stopped(number)
