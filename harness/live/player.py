"""One player's game: a session in a thread of its own, the newest input in, the newest frame out."""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from harness.config.play import PlayConf
from harness.live.inputs import Inputs, Taken
from harness.live.outbox import Outbox, PackedFrame
from harness.live.pictures import compress, difference, psnr
from harness.live.process import resident_bytes
from harness.live.protocol import Message, pack_frame
from harness.live.shelf import Shelf
from harness.session import BF16, CANDIDATE, Recorder, Recording, Session, SessionError
from harness.session.recording import Replayer
from harness.threads import usable_cores

log = logging.getLogger(__name__)
RATE_FRAMES = 40
"""Frames over which the rate that is shown is measured."""
MOST_COMMANDS = 64
RECORD_UNIT = 1 << 20
"""Bytes of ``play.record_mb``."""


@dataclass(frozen=True)
class World:
    """What a player chose to start from."""

    clip: str
    start: int
    seed: int | None


@dataclass
class Drawing:
    """A generated frame on its way to the encoder."""

    serial: int
    header: dict[str, Any]
    panes: dict[str, Tensor]
    codec: str
    quality: int


@dataclass
class Fidelity:
    """Running PSNR of the candidate against BF16 since the split."""

    total: float = 0.0
    frames: int = 0

    def add(self, value: float) -> float:
        """The mean so far, with ``value``."""
        self.total, self.frames = self.total + value, self.frames + 1
        return self.total / self.frames


@dataclass
class Choices:
    """What the player set."""

    fps: float
    codec: str
    quality: int
    view: str = "one"
    fidelity: Fidelity = field(default_factory=Fidelity)


class Player:
    """Plays a session for one browser. Everything public may be called from any thread, and returns at once.

    Args:
        session: used by this alone until :meth:`close` has returned.
        shelf: the clips to start from, and where recordings go.
        conf: of play.
        wake: called when :attr:`outbox` has something to send.
        words: the command's words, for what to type next.
    """

    def __init__(
        self, session: Session, shelf: Shelf, conf: PlayConf, wake: Callable[[], None], words: Sequence[str] = ()
    ) -> None:
        self._session, self._shelf, self._conf, self._words = session, shelf, conf, words
        self.outbox = Outbox(conf.in_flight, wake)
        self.inputs = Inputs(session.engine.button_names)
        self.released = False
        self._choices = Choices(conf.fps, str(conf.codec), conf.quality)
        self._reason: str | None = "start"
        self._paused_at = self._active_at = time.monotonic()
        self._commands: deque[Message] = deque(maxlen=MOST_COMMANDS)
        self._changed = threading.Condition()
        self._closing = False
        self._world: World | None = None
        self._recorder: Recorder | None = None
        self._replayer: Replayer | None = None
        self._skipped = False
        self._serial, self._due, self._show_at = 0, 0.0, 0.0
        self._done_at: deque[float] = deque(maxlen=RATE_FRAMES)
        self._waiting: Drawing | None = None
        # Beside a GPU, cores are free to encode on; on a CPU they are the model's.
        self._encoders = 1 if session.engine.device.type == "cpu" else min(4, usable_cores())
        self._encoding = 0
        self._encode_lock = threading.Lock()
        self._encoder = ThreadPoolExecutor(self._encoders, "play-encode")
        self._saver = ThreadPoolExecutor(1, "play-save")
        self._encode_ms, self._dropped = 0.0, 0
        self._thread = threading.Thread(target=self._run, name="play", daemon=True)

    # What the network calls.

    def start(self) -> None:
        """Begin, paused, at the first frame of the first clip."""
        self._thread.start()

    def receive(self, message: Message) -> None:
        """A checked message from the browser."""
        if message.type == "drawn":
            self.outbox.drawn(message["serial"])
            with self._changed:
                self._changed.notify()
            return
        with self._changed:
            self._active_at = time.monotonic()
            if message.type == "input":
                self.inputs.put(message["seq"], message["t"], message["buttons"], message["mouse"])
            else:
                self._commands.append(message)
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait until the session is nobody's again."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._encoder.shutdown(wait=True)
        self._saver.shutdown(wait=True)

    # The game's thread.

    def _run(self) -> None:
        try:
            self._guarded(self._begin)
            while not self._closing:
                self._guarded(self._turn)
        except Exception as error:  # whatever it is, it must not take the server with it
            log.exception("a player's thread ended")
            self.outbox.put_notice("error", f"the game broke: {error}")
            self.released = True
            self.outbox.put_state("state", **self._state())

    def _guarded(self, act: Callable[[], None]) -> None:
        """Errors that a player can put right are told, and the game pauses."""
        try:
            act()
        except (ValueError, SessionError, OSError) as error:
            self._replayer = None
            self.outbox.put_notice("error", str(error)[:600])
            self._pause("unstable" if isinstance(error, SessionError) else "error")

    def _begin(self) -> None:
        first = self._shelf.first()
        self._reset(World(first.id, 0, None))

    def _turn(self) -> None:
        while self._commands:
            message = self._commands.popleft()
            getattr(self, f"_on_{message.type}")(message)
        if self._reason is not None:
            self._rest()
        elif self._wait_until_due():
            self._frame()
            self._watch()

    def _rest(self) -> None:
        if self._reason == "stalled" and self.outbox.waiting_s() < self._conf.stall_s:
            self._resume()
            return
        if time.monotonic() - max(self._paused_at, self._active_at) > self._conf.release_s:
            self.released = True
            self.outbox.put_notice("error", "released: nothing happened for long, others may play; reload to go on")
            self._closing = True
            return
        with self._changed:
            if not self._commands and not self._closing:
                self._changed.wait(0.25)

    def _wait_until_due(self) -> bool:
        """Sleep until the next frame may begin; False if a command came first."""
        with self._changed:
            while not self._closing and not self._commands:
                left = self._due - time.monotonic()
                if left <= 0:
                    return True
                self._changed.wait(left)
        return False

    def _watch(self) -> None:
        """Pause by itself where nobody sees or plays."""
        if self.outbox.waiting_s() > self._conf.stall_s:
            self._pause("stalled")
        elif time.monotonic() - self._active_at > self._conf.idle_s and self._replayer is None:
            self._pause("idle")

    def _frame(self) -> None:
        now = time.monotonic()
        self._due = max(now, self._due + 1 / self._choices.fps)
        taken, frame = self._replayed() if self._replayer else self._played()
        self._done_at.append(time.monotonic())
        self._show(frame, taken)
        if self._replayer and self._replayer.done:
            self._end_of_replay(self._replayer)

    def _played(self) -> tuple[Taken, Tensor]:
        taken = self.inputs.take()
        frame = self._session.step(taken.action)
        if self._recorder is not None:
            self._recorder.step(taken.action, frame)
            if self._recorder.full:
                self.outbox.put_notice("info", "the recording is as long as play.record_mb allows, and was saved")
                self._save()
        return taken, frame

    def _replayed(self) -> tuple[Taken, Tensor]:
        assert self._replayer is not None
        action, frame = self._replayer.step()
        return Taken(action, 0, 0.0), frame

    def _end_of_replay(self, replayer: Replayer) -> None:
        outcome, self._replayer = replayer.outcome, None
        if outcome.identical:
            self.outbox.put_notice("good", f"replayed: all {outcome.frames} frames are what they were, bit for bit")
        else:
            text = f"replayed {outcome.frames} frames; from played frame {outcome.first_difference} on they differ"
            self.outbox.put_notice("error", f"{text} (another CPU, GPU or torch)")
        self._choices.view = self._choices.view if len(self._session.live) > 1 else "one"
        self._pause("replayed")

    # Frames out.

    def _show(self, frame: Tensor, taken: Taken | None) -> None:
        """Hand the newest frame of every live arm to the encoder; one that still waits there is dropped."""
        session, now = self._session, time.monotonic()
        self._serial += 1
        if self._reason is None and now < self._show_at:
            self._dropped += 1
            self._skipped = True
            return
        self._skipped = False
        self._show_at = max(now, self._show_at + 1 / self._conf.show_fps)
        header = {
            "serial": self._serial,
            "frame": session.frame,
            "arm": session.arm,
            "seq": taken.seq if taken else 0,
            "t": taken.t if taken else 0.0,
            "buttons": list(taken.action.buttons) if taken else [],
            "mouse": [round(moved, 3) for moved in taken.action.mouse] if taken else [0.0, 0.0],
            "ms": {arm: {part: round(ms, 2) for part, ms in row.items()} for arm, row in session.ms.items()},
            "fps": round(self._rate(), 1),
            "recorded": self._recorder.frames if self._recorder else 0,
            "rss": resident_bytes(),
        }
        if session.engine.device.type == "cuda":
            header["gpu"] = torch.cuda.memory_allocated(session.engine.device)
        # In a split BF16 is always the left one; alone, the arm that is played.
        panes = {arm: session.frame_of(arm) for arm in session.live} if len(session.live) > 1 else {session.arm: frame}
        drawing = Drawing(self._serial, header, panes, self._choices.codec, self._choices.quality)
        with self._encode_lock:
            self._dropped += self._waiting is not None
            self._waiting = drawing
            if self._encoding == self._encoders:
                return
            self._encoding += 1
        self._encoder.submit(self._encode_all)

    def _encode_all(self) -> None:
        """Encode what waits, until nothing does; runs beside the next frame."""
        while True:
            with self._encode_lock:
                drawing, self._waiting = self._waiting, None
                if drawing is None:
                    self._encoding -= 1
                    return
            try:
                self.outbox.put_frame(PackedFrame(drawing.serial, self._encode(drawing)))
            except Exception as error:
                log.exception("a frame could not be encoded")
                self.outbox.put_notice("error", f"a frame could not be encoded: {error}")

    def _encode(self, drawing: Drawing) -> bytes:
        start, panes, choices = time.perf_counter(), dict(drawing.panes), self._choices
        header = drawing.header
        if len(panes) > 1:
            value = psnr(panes[CANDIDATE], panes[BF16])
            header["psnr"] = {"now": round(value, 2), "mean": round(choices.fidelity.add(value), 2)}
            if choices.view == "difference":
                panes["difference"] = difference(panes[CANDIDATE], panes[BF16])
        packed = {name: compress(picture, drawing.codec, drawing.quality) for name, picture in panes.items()}
        self._encode_ms = (time.perf_counter() - start) * 1e3
        header["encode"] = round(self._encode_ms, 2)
        header["dropped"] = self._dropped + self.outbox.dropped
        mime = f"image/{drawing.codec}"
        header["panes"] = [{"name": name, "type": mime, "bytes": len(data)} for name, data in packed.items()]
        return pack_frame(header, list(packed.values()))

    def _rate(self) -> float:
        times = self._done_at
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0

    # What the player asked for.

    def _reset(self, world: World) -> None:
        self._stop_recording()
        self._replayer = None
        context = self._shelf.context(world.clip, world.start)
        split = self._choices.view != "one"
        self.inputs.clear()
        frame = self._session.reset(context, world.seed)
        self._session.ms = {}
        self._choices.fidelity = Fidelity()
        if split:
            self._session.split(True)
        self._world = World(world.clip, world.start, self._session.seed)
        self._show(frame, None)
        self._tell()

    def _on_reset(self, message: Message) -> None:
        last = self._world
        clip = message["clip"] or (last.clip if last else self._shelf.first().id)
        self._reset(World(clip, message["start"], message["seed"]))
        if self._reason not in (None, "start"):
            self._resume()

    def _on_play(self, message: Message) -> None:
        if self._session.live:
            self._resume()
        else:
            self.outbox.put_notice("error", "there is no world to go on with: reset")

    def _on_pause(self, message: Message) -> None:
        self._pause("player")

    def _on_step(self, message: Message) -> None:
        if self._reason is None:
            self._pause("player")
        if self._session.live:
            self._frame()

    def _on_arm(self, message: Message) -> None:
        arm = message["arm"]
        if arm != self._session.arm:
            self._session.switch(arm)
            if self._recorder is not None:
                self._recorder.event("switch", arm)
            self._redraw()

    def _on_view(self, message: Message) -> None:
        view = message["view"]
        if view != "one" and len(self._session.engine.arms) < 2:
            raise ValueError("a split needs a candidate: start with quant= or kv= words, such as quant=mxfp4_mlp")
        was, self._choices.view = self._choices.view, view
        if (view == "one") != (was == "one"):
            self._session.split(view != "one")
            self._choices.fidelity = Fidelity()
            if self._recorder is not None:
                self._recorder.event("split", view != "one")
        self._redraw()

    def _redraw(self) -> None:
        if self._session.live and self._reason is not None:
            self._show(self._session.frame_of(self._session.arm), None)
        self._tell()

    def _on_limit(self, message: Message) -> None:
        self._choices.fps = float(message["fps"])
        self._done_at.clear()
        self._tell()

    def _on_codec(self, message: Message) -> None:
        self._choices.codec, self._choices.quality = message["codec"], message["quality"]
        self._redraw()

    def _on_record(self, message: Message) -> None:
        if message["on"] and self._recorder is None:
            self._recorder = Recorder(self._session, self._conf.record_mb * RECORD_UNIT)
        elif not message["on"]:
            self._save()
        self._tell()

    def _on_replay(self, message: Message) -> None:
        self._stop_recording()
        recording = Recording.load(self._shelf.recording(message["id"]))
        self._replayer = Replayer(self._session, recording)
        self._choices.view = "split" if len(self._session.live) > 1 else "one"
        self._choices.fidelity = Fidelity()
        self.outbox.put_notice("info", f"replaying {len(recording.digests)} frames")
        self._resume()

    def _stop_recording(self) -> None:
        if self._recorder is not None and self._recorder.frames:
            self._save()
        self._recorder = None

    def _save(self) -> None:
        """Write the recording beside the game: it takes x264 a few seconds."""
        recorder, self._recorder, world = self._recorder, None, self._world
        if recorder is None or world is None:
            return
        if not recorder.frames:
            self.outbox.put_notice("error", "nothing was played since recording began; nothing is saved")
            return
        name = f"played_{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
        self.outbox.put_notice("info", f"saving {recorder.frames} frames")
        self._saver.submit(self._write, recorder, name, world)
        self._tell()

    def _write(self, recorder: Recorder, name: str, world: World) -> None:
        try:
            video = self._shelf.save(recorder, name, world.clip)
        except (ValueError, OSError) as error:
            self.outbox.put_notice("error", f"not saved: {error}")
            return
        words = [word for word in self._words if not word.startswith("play.")]
        clip = ["data.source=clips", f"data.paths=[{video}]", f"data.future_frames={recorder.frames}"]
        command = shlex.join(["python", "harness/run.py", *words, *clip])
        text = f"saved {recorder.frames} frames as {video}"
        self.outbox.put_notice("good", text, saved=name, frames=recorder.frames, command=command)
        self._tell_clips()

    def _pause(self, reason: str) -> None:
        if self._reason is None:
            self._paused_at = time.monotonic()
        self._reason = reason
        if self._skipped and self._session.live:
            self._show(self._session.frame_of(self._session.arm), None)  # what it stops at is seen
        self._tell()

    def _resume(self) -> None:
        self._reason, self._due = None, time.monotonic()
        self._active_at = time.monotonic()
        self._done_at.clear()
        self._tell()

    # How things stand.

    def _tell(self) -> None:
        self.outbox.put_state("state", **self._state())

    def _tell_clips(self) -> None:
        self.outbox.put_state("clips", clips=self._shelf.listing())

    def _state(self) -> dict[str, Any]:
        world, choices = self._world, self._choices
        return {
            "playing": self._reason is None,
            "reason": self._reason,
            "released": self.released,
            "arm": self._session.arm,
            "view": choices.view,
            "fps": choices.fps,
            "codec": choices.codec,
            "quality": choices.quality,
            "clip": world.clip if world else None,
            "start": world.start if world else 0,
            "seed": world.seed if world else None,
            "recording": self._recorder is not None,
            "replaying": self._replayer is not None,
        }
