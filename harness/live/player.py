"""One player's game: a session in a thread of its own, the newest input in, the newest frame out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harness.config.play import PlayConf
from harness.live.drawing import Drawing, Fidelity, FrameEncoder
from harness.live.inputs import Inputs, Taken
from harness.live.outbox import Outbox
from harness.live.pipeline import Pipeline
from harness.live.process import Memory
from harness.live.protocol import Message
from harness.live.shelf import Shelf
from harness.live.taping import Tape
from harness.session import Session, SessionError
from harness.session.session import Rolled
from harness.threads import usable_cores

log = logging.getLogger(__name__)
RATE_FRAMES = 40
"""Frames over which the rate that is shown is measured."""
MOST_COMMANDS = 64


@dataclass(frozen=True)
class World:
    """What a player chose to start from."""

    clip: str
    start: int
    seed: int | None


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
        self._session, self._shelf, self._conf = session, shelf, conf
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
        self._tape = Tape(session, shelf, self.outbox, conf.record_mb, words, self._tell_clips)
        self._pipeline: Pipeline[Taken] = Pipeline(session, self._done)
        # Beside a GPU, cores are free to encode on; on a CPU they are the model's.
        self._encoder = FrameEncoder(self.outbox, 1 if session.engine.device.type == "cpu" else min(4, usable_cores()))
        self._memory = Memory(session.engine.device)
        self._skipped = False
        self._serial, self._due, self._show_at = 0, 0.0, 0.0
        self._done_at: deque[float] = deque(maxlen=RATE_FRAMES)
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
        self._pipeline.close()
        self._encoder.close()
        self._tape.close()

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
            self._tape.replayer = None
            self.outbox.put_notice("error", str(error)[:600])
            self._pause("unstable" if isinstance(error, SessionError) else "error")

    def _begin(self) -> None:
        first = self._shelf.first()
        self._reset(World(first.id, 0, None))

    def _turn(self) -> None:
        while self._commands:
            message = self._commands.popleft()
            self._pipeline.drain()  # what is asked for comes after every frame that was begun
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
        elif time.monotonic() - self._active_at > self._conf.idle_s and self._tape.replayer is None:
            self._pause("idle")

    def _frame(self) -> None:
        now = time.monotonic()
        self._due = max(now, self._due + 1 / self._choices.fps)
        if self._tape.replayer is not None:
            self._replay_frame()
            return
        taken = self.inputs.take()
        self._pipeline.put(self._session.advance(taken.action), taken)

    def _done(self, rolled: Rolled, picture: Tensor, taken: Taken) -> None:
        """A frame is decoded; in the decoder's thread."""
        self._done_at.append(time.monotonic())
        if self._tape.step(taken.action, picture, self._world.clip if self._world else ""):
            self._tell()
        # In a split BF16 is always the left one; alone, the arm that is played.
        panes = {arm: moment.picture[0] for arm, moment in rolled.moments.items() if moment.picture is not None}
        self._show(rolled.frame, rolled.arm, panes, rolled.ms, taken)

    def _replay_frame(self) -> None:
        replayer, session = self._tape.replayer, self._session
        assert replayer is not None
        action, _ = replayer.step()
        self._done_at.append(time.monotonic())
        self._show_newest(Taken(action, 0, 0.0), session.ms)
        if replayer.done:
            self._tape.end_replay()
            self._choices.view = self._choices.view if len(session.live) > 1 else "one"
            self._pause("replayed")

    # Frames out.

    def _show_newest(self, taken: Taken | None = None, ms: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Show what the session stands at."""
        session = self._session
        panes = {arm: session.frame_of(arm) for arm in session.live}
        self._show(session.frame, session.arm, panes, ms or {}, taken)

    def _show(
        self,
        frame: int,
        arm: str,
        panes: dict[str, Tensor],
        ms: Mapping[str, Mapping[str, float]],
        taken: Taken | None,
    ) -> None:
        """Hand a frame of every live arm to the encoder, unless the last one was only just shown."""
        now = time.monotonic()
        self._serial += 1
        self._skipped = self._reason is None and now < self._show_at
        if self._skipped:
            self._encoder.dropped += 1
            return
        self._show_at = max(now, self._show_at + 1 / self._conf.show_fps)
        header = {
            "serial": self._serial,
            "frame": frame,
            "arm": arm,
            "seq": taken.seq if taken else 0,
            "t": taken.t if taken else 0.0,
            "buttons": list(taken.action.buttons) if taken else [],
            "mouse": [round(moved, 3) for moved in taken.action.mouse] if taken else [0.0, 0.0],
            "ms": {name: {part: round(value, 2) for part, value in row.items()} for name, row in ms.items()},
            "fps": round(self._rate(), 1),
            "recorded": self._tape.frames,
            **self._memory.held(),
        }
        choices = self._choices
        how = choices.codec, choices.quality, choices.view == "difference", choices.fidelity
        self._encoder.put(Drawing(self._serial, header, panes, *how))

    def _rate(self) -> float:
        times = self._done_at
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0

    # What the player asked for.

    def _reset(self, world: World) -> None:
        self._tape.stop(self._world.clip if self._world else None)
        context = self._shelf.context(world.clip, world.start)
        split = self._choices.view != "one"
        self.inputs.clear()
        self._session.reset(context, world.seed)
        self._choices.fidelity = Fidelity()
        if split:
            self._session.split(True)
        self._world = World(world.clip, world.start, self._session.seed)
        self._show_newest()
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
            self._tape.event("switch", arm)
            self._redraw()

    def _on_view(self, message: Message) -> None:
        view = message["view"]
        if view != "one" and len(self._session.engine.arms) < 2:
            raise ValueError("a split needs a candidate: start with quant= or kv= words, such as quant=mxfp4_mlp")
        was, self._choices.view = self._choices.view, view
        if (view == "one") != (was == "one"):
            self._session.split(view != "one")
            self._choices.fidelity = Fidelity()
            self._tape.event("split", view != "one")
        self._redraw()

    def _redraw(self) -> None:
        if self._session.live and self._reason is not None:
            self._show_newest()
        self._tell()

    def _on_limit(self, message: Message) -> None:
        self._choices.fps = float(message["fps"])
        self._done_at.clear()
        self._tell()

    def _on_codec(self, message: Message) -> None:
        self._choices.codec, self._choices.quality = message["codec"], message["quality"]
        self._redraw()

    def _on_record(self, message: Message) -> None:
        if message["on"]:
            self._tape.record()
        elif self._world is not None:
            self._tape.save(self._world.clip)
        self._tell()

    def _on_replay(self, message: Message) -> None:
        self._tape.stop(self._world.clip if self._world else None)
        frames = self._tape.replay(message["id"])
        self._choices.view = "split" if len(self._session.live) > 1 else "one"
        self._choices.fidelity = Fidelity()
        self.outbox.put_notice("info", f"replaying {frames} frames")
        self._resume()

    def _pause(self, reason: str) -> None:
        if self._reason is None:
            self._paused_at = time.monotonic()
        self._pipeline.drain()
        self._reason = reason
        if self._skipped and self._session.live:
            self._show_newest()  # what it stops at is seen
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
            "recording": self._tape.recorder is not None,
            "replaying": self._tape.replayer is not None,
        }
