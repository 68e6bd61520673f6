"""What a player records, saves and has played again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from torch import Tensor

from harness.entries import entry
from harness.live.outbox import Outbox
from harness.live.process import give_memory_back
from harness.live.shelf import Shelf
from harness.session import Action, Recorder, Recording, Session
from harness.session.recording import Replayer

RECORD_UNIT = 1 << 20
"""Bytes of ``play.record_mb``."""


class Tape:
    """A player's recording, if one is running, or being played again.

    Args:
        session: the player's. shelf: where recordings go. outbox: whom to tell.
        limit_mb: the most memory that a recording's frames may take, in MiB.
        words: the command's words, for what to type next.
        changed: called in any thread when there is another saved clip.
    """

    def __init__(
        self,
        session: Session,
        shelf: Shelf,
        outbox: Outbox,
        limit_mb: int,
        words: Sequence[str],
        changed: Callable[[], None],
    ) -> None:
        self._session, self._shelf, self._outbox, self._limit_mb = session, shelf, outbox, limit_mb
        self._words, self._changed = words, changed
        self._saver = ThreadPoolExecutor(1, "play-save")
        self.recorder: Recorder | None = None
        self.replayer: Replayer | None = None

    @property
    def frames(self) -> int:
        """Recorded so far."""
        recorder = self.recorder
        return recorder.frames if recorder else 0

    def record(self) -> None:
        """Begin, unless it is recording."""
        if self.recorder is None:
            self.recorder = Recorder(self._session, self._limit_mb * RECORD_UNIT)

    def event(self, kind: str, value: str | bool) -> None:
        """The session was switched or split."""
        if self.recorder is not None:
            self.recorder.event(kind, value)

    def step(self, action: Action, frame: Tensor, clip: str) -> bool:
        """The session made a step; returns whether the recording is full, and then saves it as begun in ``clip``."""
        if self.recorder is None:
            return False
        self.recorder.step(action, frame)
        if not self.recorder.full:
            return False
        self._outbox.put_notice("info", "the recording is as long as play.record_mb allows, and was saved")
        self.save(clip)
        return True

    def save(self, clip: str) -> None:
        """End the recording, and write it beside the game: it takes x264 a few seconds."""
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return
        if not recorder.frames:
            self._outbox.put_notice("error", "nothing was played since recording began; nothing is saved")
            return
        name = f"played_{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
        self._outbox.put_notice("info", f"saving {recorder.frames} frames")
        self._saver.submit(self._write, recorder, name, clip)
        self._saver.submit(give_memory_back)  # once nothing holds the recording any more

    def stop(self, clip: str | None) -> None:
        """End recording or replay; what was recorded is saved."""
        if self.recorder is not None and self.recorder.frames and clip is not None:
            self.save(clip)
        self.recorder = self.replayer = None

    def replay(self, clip: str) -> int:
        """Go back to where a recording began, to play it again; returns its frames.

        Raises:
            StateError: if there is none of that name, or it is of another model.
        """
        recording = Recording.load(self._shelf.recording(clip))
        self.replayer = Replayer(self._session, recording)
        return len(recording.digests)

    def end_replay(self) -> None:
        """Tell what it showed."""
        assert self.replayer is not None
        outcome, self.replayer = self.replayer.outcome, None
        if outcome.identical:
            self._outbox.put_notice("good", f"replayed: all {outcome.frames} frames are what they were, bit for bit")
            return
        text = f"replayed {outcome.frames} frames; from played frame {outcome.first_difference} on they differ"
        self._outbox.put_notice("error", f"{text} (another CPU, GPU or torch)")

    def close(self) -> None:
        """Wait until what is being saved is."""
        self._saver.shutdown(wait=True)

    def _write(self, recorder: Recorder, name: str, clip: str) -> None:
        try:
            video = self._shelf.save(recorder, name, clip)
        except (ValueError, OSError) as error:
            self._outbox.put_notice("error", f"not saved: {error}")
            return
        words = [word for word in self._words if not word.startswith(("play.", "data.paths=", "data.future_frames="))]
        more = ["data.source=clips", f"data.paths=[{video}]", f"data.future_frames={recorder.frames}"]
        command = f"{entry('run')} {shlex.join([*words, *more])}"
        text = f"saved {recorder.frames} frames as {video}"
        self._outbox.put_notice("good", text, saved=name, frames=recorder.frames, command=command)
        self._changed()
