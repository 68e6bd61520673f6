"""Playing a world model from a program: reset, then one action in, one frame out.

The model, its formats, cache, attention, compilation and noise are those of a run (:mod:`harness.run`): a session fed a
clip's actions gives the frames that a run rolls out of that clip, bit for bit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from harness.data.noise import CONTEXT, FUTURE, frame_noise
from harness.measure.stability import finite_clips
from harness.measure.timing import Clock
from harness.rollout import Rollout
from harness.rollout.compile import without_grad
from harness.session.action import Action
from harness.session.engine import Context, Engine, to_pictures
from harness.session.state import SessionState, StateError, WorldState

RETAKEN, APPENDED = "retaken", "appended"
"""What noise is for beside a context and new frames: a history re-encoded by another arm, a frame put in."""


class SessionError(RuntimeError):
    """A session that cannot go on; the message says why and what to do."""


class UnstableWorldError(SessionError):
    """A frame came out with NaN or Inf: the world it belongs to is lost; reset, or restore an earlier state."""

    def __init__(self, arm: str, frame: int) -> None:
        super().__init__(f"arm {arm}: NaN or Inf in frame {frame}; reset the session or restore an earlier state")
        self.arm, self.frame = arm, frame


@dataclass
class Moment:
    """A frame of a history: latent ``[B, C, S, S]``, controls, and the picture uint8 ``[B, h, w, 3]``, once known."""

    latent: Tensor
    mouse: Tensor
    btn: Tensor
    picture: Tensor | None


@dataclass(frozen=True)
class Rolled:
    """A frame that :meth:`Session.advance` rolled out; :meth:`Session.decode` makes its pictures.

    ``frame``: absolute index. ``arm``: the one that was played. ``moments``: of each live arm. ``ms``: milliseconds of
    ``dit`` in each, and of ``decoder`` once decoded.
    """

    frame: int
    arm: str
    moments: dict[str, Moment]
    ms: dict[str, dict[str, float]]


class World:
    """One arm of a session: its rollout, and the frames of its window."""

    def __init__(self, rollout: Rollout, window: int) -> None:
        self.rollout = rollout
        self.history: deque[Moment] = deque(maxlen=window)

    def controls(self) -> tuple[Tensor, Tensor]:
        """Mouse and buttons of the window, ``[B, W, …]``."""
        return torch.stack([m.mouse for m in self.history], 1), torch.stack([m.btn for m in self.history], 1)

    def latents(self) -> Tensor:
        """Latents of the window, ``[B, W, C, S, S]``."""
        return torch.stack([m.latent for m in self.history], 1)

    def saved(self) -> WorldState:
        """A copy of it, on the CPU."""
        parts = ([getattr(m, name) for m in self.history] for name in ("latent", "mouse", "btn"))
        cache = tuple(tensor.cpu() for tensor in self.rollout.saved())
        return WorldState(cache, *(torch.stack(part).cpu() for part in parts))

    def restore(self, state: WorldState) -> None:
        """Come back to it."""
        if len(state.latents) != self.history.maxlen:
            raise StateError(f"a state of window {len(state.latents)}; this session's is {self.history.maxlen}")
        for name, shape in self.rollout.frame_shapes.items():
            given: Tensor = getattr(state, name)
            if given.dtype != torch.float32 or given.shape != (self.history.maxlen, *shape):
                raise StateError(
                    f"a state whose {name} are {given.dtype} {list(given.shape)}; this session's are torch.float32 "
                    f"{[self.history.maxlen, *shape]}"
                )
            if not torch.isfinite(given).all():
                raise StateError(f"a state whose {name} hold NaN or infinite values")
        self.rollout.restore(state.cache)
        rows = zip(state.latents, state.mouse, state.btn, strict=True)
        self.history = deque((Moment(*row, picture=None) for row in rows), maxlen=self.history.maxlen)


class Session:
    """A world to play, or ``batch`` of them side by side under their own actions.

    Args:
        engine: the loaded model; sessions share its weights, each has its own cache and graphs.
        arm: the arm that is played at first; the candidate by default where there is one.
        batch: contexts played at once; as ``data.batch_size`` by default.

    One thread at a time may use a session, but for :meth:`decode`, which another may call beside it. ``arm``: the arm
    that is played. ``frame``: absolute index of the newest frame; the context's are 0 … W-1. ``latent``: of the newest
    frame. ``ms``: milliseconds that the last step's ``dit`` and ``decoder`` took in each arm.
    """

    def __init__(self, engine: Engine, arm: str | None = None, batch: int | None = None) -> None:
        self.engine = engine
        self.batch = engine.plan.conf.data.batch_size if batch is None else batch
        self.window = engine.shape.window
        self.arm = self._known(engine.default_arm if arm is None else arm)
        self._decode = engine.decoder(self.batch)
        self._worlds = {name: World(engine.rollout(name, self.batch), self.window) for name in engine.arms}
        self._live: tuple[str, ...] = ()
        self._decoding = threading.Lock()
        self._stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        """The decoder's, so that it decodes while the next frame is denoised."""
        self._clock = Clock(engine.device)
        self._drawn: tuple[tuple[int, tuple[str, ...], int], Tensor] | None = None
        """Noise that was drawn ahead of its frame, and of which seed, names and frame it is."""
        self.frame, self.seed = -1, engine.plan.conf.sampler.seed
        self.names: tuple[str, ...] = ()
        self.ms: dict[str, dict[str, float]] = {}
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give caches and graphs back; the engine stays loaded."""
        self._worlds.clear()
        self._live, self._closed = (), True

    def leave(self) -> None:
        """Forget the world and everything chosen: as a new session, but warm."""
        self.arm, self._live, self.names, self.frame = self.engine.default_arm, (), (), -1
        for world in self._worlds.values():
            world.history.clear()

    @property
    def live(self) -> tuple[str, ...]:
        """Arms that step: the one that is played, and in a split the other too."""
        return self._live

    @property
    def latent(self) -> Tensor:
        """Latent of the newest frame of the arm that is played, float32 ``[B, C, S, S]`` at the model's scale."""
        return self._playing().history[-1].latent

    def history(self, arm: str | None = None) -> tuple[Moment, ...]:
        """The W newest frames of a live arm, oldest first."""
        return tuple(self._playing(arm).history)

    @without_grad
    def reset(self, context: str | Context | Sequence[str | Context], seed: int | None = None) -> Tensor:
        """Begin anew from known frames.

        Args:
            context: id of a clip of ``data``, or a :class:`Context`; several for several worlds.
            seed: of all noise to come; the config's ``sampler.seed`` by default.

        Returns:
            The context's last frame, decoded: uint8 ``[h, w, 3]``, or ``[B, h, w, 3]`` for several worlds.

        Raises:
            ValueError: if there are not as many contexts as worlds, or one does not fit the model.
        """
        self._check_open()
        given = [context] if isinstance(context, str | Context) else list(context)
        if len(given) != self.batch:
            raise ValueError(f"{len(given)} contexts for {self.batch} worlds: give one each")
        contexts = [self.engine.context(one) if isinstance(one, str) else one for one in given]
        for one in contexts:
            self._check_context(one)
        self.seed = self.engine.plan.conf.sampler.seed if seed is None else seed
        self.names, self.frame = tuple(one.name for one in contexts), self.window - 1
        self._live = (self.arm,)
        world = self._worlds[self.arm]
        latents, mouse, btn = (
            torch.stack([getattr(c, part) for c in contexts]) for part in ("latents", "mouse", "btn")
        )
        noise = torch.stack([self._noise(CONTEXT, frame) for frame in range(self.window)], 1)
        device = self.engine.device
        latents, mouse, btn = latents.to(device), mouse.to(device), btn.to(device)
        world.rollout.prefill(latents, mouse, btn, noise.to(device))
        seen = [one.pictures for one in contexts]
        known = None if any(one is None for one in seen) else torch.stack([one for one in seen if one is not None])
        world.history.clear()
        for i in range(self.window):
            picture = None if known is None else known[:, i]
            world.history.append(Moment(latents[:, i], mouse[:, i], btn[:, i], picture))
        self._check_finite()
        return self._shaped(self.picture_of(world.history[-1].latent))

    @without_grad
    def step(self, action: Action | Sequence[Action]) -> Tensor:
        """Roll every live arm one frame on, under ``action`` (one each for several worlds).

        Returns:
            The new frame of the arm that is played: uint8 ``[h, w, 3]``, or ``[B, h, w, 3]`` for several worlds.
            :meth:`frame_of` has that of the other in a split.

        Raises:
            UnstableWorldError: if a frame comes out with NaN or Inf.
            SessionError: before :meth:`reset`, or after :meth:`close`.
            ValueError: for an action that the model cannot take.
        """
        return self.decode(self.advance(action))

    @without_grad
    def advance(self, action: Action | Sequence[Action]) -> Rolled:
        """The first half of :meth:`step`: the new frame's latents. Raises as :meth:`step` does.

        The other half is :meth:`decode`, which may run in another thread while this makes the next frame: more frames
        a second, each as long on its way. What follows depends on latents alone.
        """
        self._playing()
        mouse, btn = self._rows(action)
        noise = self._future_noise(self.frame + 1)
        self.frame += 1
        moments, stamps = {}, {}
        for name in self._live:
            world, start = self._worlds[name], self._clock.now()
            moments[name] = Moment(world.rollout.next_frame(noise, mouse, btn), mouse, btn, None)
            world.history.append(moments[name])
            stamps[name] = start, self._clock.now()
        if self._stream is not None:
            self._future_noise(self.frame + 1)  # while the GPU works
        self._check_finite()  # waits for it
        self.ms = {name: {"dit": self._clock.elapsed_ms(*both)} for name, both in stamps.items()}
        return Rolled(self.frame, self.arm, moments, self.ms)

    @without_grad
    def decode(self, rolled: Rolled) -> Tensor:
        """The second half of :meth:`step`: decode a frame of :meth:`advance`, in any thread, and return what
        :meth:`step` does."""
        for name, moment in rolled.moments.items():
            if moment.picture is None:
                moment.picture, rolled.ms[name]["decoder"] = self._decoded(moment.latent)
        picture = rolled.moments[rolled.arm].picture
        assert picture is not None
        return self._shaped(picture)

    def frame_of(self, arm: str) -> Tensor:
        """The newest frame of a live arm, as :meth:`step` gives that of the one that is played."""
        newest = self._playing(arm).history[-1]
        return self._shaped(self.picture_of(newest.latent) if newest.picture is None else newest.picture)

    @without_grad
    def append_frame(self, picture: Tensor, action: Action | Sequence[Action]) -> None:
        """Put a real picture in the place of the next generated one, in every live arm.

        It is encoded, noised to ``sampler.context_noise`` and evaluated once at that level, as a context's frames are;
        what is rolled out next sees it as the newest frame.

        Args:
            picture: uint8 ``[h, w, 3]``, or ``[B, h, w, 3]`` for several worlds.
            action: what was held while it was produced.

        Raises:
            ValueError: for a picture or an action that does not fit, or a model without an encoder.
        """
        self._playing()
        pictures = picture[None] if picture.ndim == 3 else picture
        if len(pictures) != self.batch:
            raise ValueError(f"{len(pictures)} pictures for {self.batch} worlds: give one each")
        latent = self.engine.encode(pictures).to(self.engine.device)
        mouse, btn = self._rows(action)
        self.frame += 1
        noise = self._noise(APPENDED, self.frame).to(self.engine.device)
        for name in self._live:
            world = self._worlds[name]
            world.rollout.append(latent, noise, mouse, btn)
            world.history.append(Moment(latent, mouse, btn, pictures.cpu()))

    def switch(self, arm: str) -> None:
        """Play on in ``arm``, in the same world.

        Where that arm is not live (no split), it takes the world over: the latents and actions of the newest W frames
        are encoded by a prefill of its own, with the frames' own absolute positions and noise that depends on seed,
        name and position alone. That is how a context is encoded; the cache of the other arm, which its sampler filled
        frame by frame, cannot be had in this arm's formats, so frames differ by that too, not by the formats alone.
        Frame numbers and the noise of the frames to come go on.

        Raises:
            ValueError: for an arm that the engine does not have.
        """
        self._known(arm)
        if self._live and arm not in self._live:
            self._take_over(arm)
            self._live = (arm,)
        self.arm = arm

    def split(self, on: bool) -> None:
        """Roll the other arms on beside the one that is played, or stop.

        They take the world over as in :meth:`switch`; from there on every arm keeps its own history.
        """
        self._playing()
        if on:
            for arm in self._worlds:
                if arm not in self._live:
                    self._take_over(arm)
        self._live = tuple(self._worlds) if on else (self.arm,)

    @without_grad
    def _take_over(self, arm: str) -> None:
        source, world = self._playing(), self._worlds[arm]
        first = self.frame + 1 - self.window
        noise = torch.stack([self._noise(RETAKEN, first + i) for i in range(self.window)], 1)
        world.rollout.prefill(source.latents(), *source.controls(), noise.to(self.engine.device), first=first)
        world.history = source.history.copy()

    def state(self) -> SessionState:
        """The moment: caches, counters and windows, copied to the CPU."""
        self._playing()
        worlds = {name: self._worlds[name].saved() for name in self._live}
        return SessionState(self.arm, worlds, self.frame, self.seed, self.names)

    @without_grad
    def restore(self, state: SessionState) -> None:
        """Come back to a moment of this session or of one like it: bit for bit the same frames follow.

        Raises:
            StateError: if the state is of other arms, another model or another number of worlds.
        """
        self._check_open()
        missing = sorted(set(state.worlds) - set(self._worlds))
        if missing:
            raise StateError(f"a state of {', '.join(missing)}; this session has {', '.join(self._worlds)}")
        if len(state.names) != self.batch:
            raise StateError(f"a state of {len(state.names)} worlds; this session has {self.batch}")
        try:
            for name, world in state.worlds.items():
                self._worlds[name].restore(_on(world, self.engine.device))
        except ValueError as error:
            self._live = ()  # of several worlds some may have been written
            raise StateError(str(error)) from error
        self.arm, self._live = state.arm, tuple(name for name in self._worlds if name in state.worlds)
        self.frame, self.seed, self.names = state.frame, state.seed, state.names

    @without_grad
    def picture_of(self, latent: Tensor) -> Tensor:
        """Decode latents ``[B, C, S, S]``: uint8 ``[B, h, w, 3]`` on the CPU."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.engine.device))
        return self._decoded(latent)[0]

    def _decoded(self, latent: Tensor) -> tuple[Tensor, float]:
        """The picture, and the milliseconds that decoding took. The decoder's stream does not wait for ``latent``."""
        with self._decoding, nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            start = self._clock.now()
            rgb = self._decode(latent)
            end = self._clock.now()
            return to_pictures(rgb), self._clock.elapsed_ms(start, end)  # on the CPU, so the stream has been waited for

    def _future_noise(self, frame: int) -> Tensor:
        """Noise of frame ``frame`` on the device; it depends on no action, so it may be drawn before it is needed."""
        key = self.seed, self.names, frame
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = key, self._noise(FUTURE, frame - self.window).to(self.engine.device)
        return self._drawn[1]

    def _noise(self, part: str, frame: int) -> Tensor:
        """``[B, C, S, S]``."""
        shape = (self.engine.shape.channels, self.engine.shape.side, self.engine.shape.side)
        return torch.stack([frame_noise(self.seed, name, part, frame, shape) for name in self.names])

    def _rows(self, action: Action | Sequence[Action]) -> tuple[Tensor, Tensor]:
        actions = [action] if isinstance(action, Action) else list(action)
        if len(actions) != self.batch:
            raise ValueError(f"{len(actions)} actions for {self.batch} worlds: give one each")
        rows = [one.rows(self.engine.button_names) for one in actions]
        mouse, btn = (torch.stack(parts).to(self.engine.device) for parts in zip(*rows, strict=True))
        return mouse, btn

    def _shaped(self, pictures: Tensor) -> Tensor:
        return pictures[0] if self.batch == 1 else pictures

    def _known(self, arm: str) -> str:
        if arm not in self.engine.arms:
            raise ValueError(f"arm {arm!r}: this engine has {', '.join(self.engine.arms)}")
        return arm

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("this session is closed; open another")

    def _playing(self, arm: str | None = None) -> World:
        self._check_open()
        if not self._live:
            raise SessionError("no world to play yet: call reset() with a clip first")
        name = self.arm if arm is None else arm
        if name not in self._live:
            raise SessionError(f"arm {name} is not live; live are {', '.join(self._live)} (see split)")
        return self._worlds[name]

    def _check_context(self, context: Context) -> None:
        shape, window = self.engine.shape, self.window
        wanted = {
            "latents": (window, shape.channels, shape.side, shape.side),
            "mouse": (window, 2),
            "btn": (window, shape.buttons),
        }
        given = {name: tuple(getattr(context, name).shape) for name in wanted}
        wrong = [f"{name} {given[name]} instead of {wanted[name]}" for name in wanted if given[name] != wanted[name]]
        if wrong:
            raise ValueError(f"context {context.name}: {'; '.join(wrong)}")

    def _check_finite(self) -> None:
        for name in self._live:
            if not bool(finite_clips(self._worlds[name].history[-1].latent).all()):
                self._live = ()
                raise UnstableWorldError(name, self.frame)


def _on(world: WorldState, device: torch.device) -> WorldState:
    parts = (getattr(world, name).to(device) for name in ("latents", "mouse", "btn"))
    return WorldState(tuple(tensor.to(device) for tensor in world.cache), *parts)
