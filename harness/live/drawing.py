"""Frames on their way out: compressed beside the game, newest wins."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harness.live.outbox import Outbox, PackedFrame
from harness.live.pictures import compress, difference, psnr
from harness.live.protocol import pack_frame
from harness.session import BF16, CANDIDATE

log = logging.getLogger(__name__)


@dataclass
class Fidelity:
    """Running PSNR of the candidate against BF16 since the split. Any thread may add to it."""

    total: float = 0.0
    frames: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, value: float) -> float:
        """The mean so far, with ``value``."""
        with self.lock:
            self.total, self.frames = self.total + value, self.frames + 1
            return self.total / self.frames


@dataclass
class Drawing:
    """A generated frame to be compressed.

    ``panes``: pictures uint8 ``[h, w, 3]`` by name. ``difference``: whether that of two arms is shown beside them.
    """

    serial: int
    header: dict[str, Any]
    panes: dict[str, Tensor]
    codec: str
    quality: int
    difference: bool
    fidelity: Fidelity

    def packed(self) -> bytes:
        """The message: pictures compressed, compared in a split; ``header`` is completed."""
        start, panes = time.perf_counter(), dict(self.panes)
        if len(panes) > 1:
            value = psnr(panes[CANDIDATE], panes[BF16])
            self.header["psnr"] = {"now": round(value, 2), "mean": round(self.fidelity.add(value), 2)}
            if self.difference:
                panes["difference"] = difference(panes[CANDIDATE], panes[BF16])
        pictures = {name: compress(picture, self.codec, self.quality) for name, picture in panes.items()}
        self.header["encode"] = round((time.perf_counter() - start) * 1e3, 2)
        mime = f"image/{self.codec}"
        self.header["panes"] = [{"name": name, "type": mime, "bytes": len(data)} for name, data in pictures.items()]
        return pack_frame(self.header, list(pictures.values()))


class FrameEncoder:
    """Compresses frames in threads of its own and puts them into an outbox.

    A frame that no thread has begun when the next one comes is dropped. ``dropped`` counts them, and may be added to.

    Args:
        outbox: where frames go.
        workers: threads, and so the most frames compressed at once.
    """

    def __init__(self, outbox: Outbox, workers: int) -> None:
        self._outbox, self._workers = outbox, workers
        self._pool = ThreadPoolExecutor(workers, "play-encode")
        self._lock = threading.Lock()
        self._waiting: Drawing | None = None
        self._busy = 0
        self.dropped = 0

    def put(self, drawing: Drawing) -> None:
        """Compress it soon."""
        with self._lock:
            self.dropped += self._waiting is not None
            self._waiting = drawing
            if self._busy == self._workers:
                return
            self._busy += 1
        self._pool.submit(self._work)

    def close(self) -> None:
        """Wait until all is done."""
        self._pool.shutdown(wait=True)

    def _work(self) -> None:
        """Compress what waits, until nothing does."""
        while True:
            with self._lock:
                drawing, self._waiting = self._waiting, None
                if drawing is None:
                    self._busy -= 1
                    return
            drawing.header["dropped"] = self.dropped + self._outbox.dropped
            try:
                self._outbox.put_frame(PackedFrame(drawing.serial, drawing.packed()))
            except Exception as error:
                log.exception("a frame could not be encoded")
                self._outbox.put_notice("error", f"a frame could not be encoded: {error}")
