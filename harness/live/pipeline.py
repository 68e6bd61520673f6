"""Decoding beside denoising: a frame becomes a picture while the game makes the next one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from torch import Tensor

from harness.session import Session
from harness.session.session import Rolled

Note = TypeVar("Note")


class Pipeline(Generic[Note]):
    """Decodes the frames of a session in a thread of its own, one behind the thread that rolls it out.

    Args:
        session: whose :meth:`~harness.session.Session.advance` only the calling thread calls, and nothing else of it
            but after :meth:`drain`.
        done: called in that thread with each frame, its picture, and what :meth:`put` was told.
    """

    def __init__(self, session: Session, done: Callable[[Rolled, Tensor, Note], None]) -> None:
        self._session, self._done = session, done
        self._pool = ThreadPoolExecutor(1, "play-decode")
        self._last: Future[None] | None = None

    def put(self, rolled: Rolled, note: Note) -> None:
        """Decode a frame; waits until the one before it is decoded, and raises what that raised."""
        self.drain()
        self._last = self._pool.submit(self._decode, rolled, note)

    def drain(self) -> None:
        """Wait until every frame is decoded; raises what the last one raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait until all is done, whatever comes of it."""
        self._pool.shutdown(wait=True)

    def _decode(self, rolled: Rolled, note: Note) -> None:
        self._done(rolled, self._session.decode(rolled), note)
