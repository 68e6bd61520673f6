"""What is played, kept: as a clip that a run judges, and as a recording that replays bit for bit.

Beside the clip's ``<id>.mp4`` and ``<id>.json`` (:mod:`harness.data.clips`) lies ``<id>.session.safetensors``: the
session's state where recording began, every action since, when formats were switched, and the SHA-256 of every frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from harness.data.clips import Clip, derive_tag, write_clip
from harness.session.action import Action
from harness.session.engine import Engine
from harness.session.session import Session
from harness.session.state import SessionState, StateError, read_tensors, write_tensors

FORMAT = "mx-world-harness recorded session"
VERSION = 1
SUFFIX = ".session.safetensors"
MOST_EVENTS = 10_000
SAME = ("model", "decoder", "quant", "kv", "calib", "sampler", "attention", "compile", "device")
"""Parts of :func:`fingerprint` that a replay has to share; the version of torch is told, but not asked for."""


@dataclass(frozen=True)
class Event:
    """Formats switched (``switch``, to arm ``value``) or split (``split``, on or off) before step ``step``."""

    step: int
    kind: str
    value: str | bool


@dataclass
class Recording:
    """A stretch of play.

    Attributes:
        state: where it began. about: what it was played on, see :func:`fingerprint`.
        mouse: float32 ``[2]`` and btn: float32 ``[K]`` of each step. digests: SHA-256 of each step's frame of the arm
            that was played.
        events: in order.
    """

    state: SessionState
    about: dict[str, Any]
    mouse: list[Tensor] = field(default_factory=list)
    btn: list[Tensor] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it, complete or not at all. Raises ``OSError`` if it cannot be written."""
        played = {
            "played.mouse": torch.stack(self.mouse),
            "played.btn": torch.stack(self.btn).to(torch.uint8),
            "played.digests": torch.frombuffer(bytearray(b"".join(self.digests)), dtype=torch.uint8).view(-1, 32),
        }
        header = {
            "about": self.about,
            "counters": self.state.counters(),
            "events": [[event.step, event.kind, event.value] for event in self.events],
        }
        write_tensors(path, {**self.state.tensors(), **played}, FORMAT, VERSION, header)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what :meth:`save` wrote; nothing in the file can run code.

        Raises:
            StateError: if it is no such file, or its parts do not fit together.
        """
        tensors, header = read_tensors(path, FORMAT, VERSION)
        played = {name: tensors.pop(f"played.{name}", None) for name in ("mouse", "btn", "digests")}
        mouse, btn, digests = played["mouse"], played["btn"], played["digests"]
        if mouse is None or btn is None or digests is None or mouse.ndim != 2 or btn.ndim != 2 or digests.ndim != 2:
            raise StateError(f"{path}: holds no actions")
        if not len(mouse) == len(btn) == len(digests) > 0 or digests.shape[1] != 32 or digests.dtype != torch.uint8:
            raise StateError(f"{path}: {len(mouse)} mouse rows, {len(btn)} of buttons, {len(digests)} digests")
        if mouse.shape[1] != 2 or mouse.dtype != torch.float32 or not torch.isfinite(mouse).all():
            raise StateError(f"{path}: its rows of the mouse are no pairs of finite numbers")
        if btn.dtype != torch.uint8 or (btn > 1).any():
            raise StateError(f"{path}: its rows of buttons are not of 0 and 1")
        about, rows_of_events = header.get("about"), header.get("events")
        if not isinstance(about, dict) or not isinstance(rows_of_events, list):
            raise StateError(f"{path}: does not say what it was played on, or what happened")
        try:
            state = SessionState.of(tensors, header.get("counters"))
        except StateError as error:
            raise StateError(f"{path}: {error}") from error
        events = [_event(path, row) for row in rows_of_events]
        found = [bytes(row.tolist()) for row in digests]
        rows = list(mouse.float()), list(btn.float())
        return cls(state, about, *rows, found, events)


def _event(path: Path, row: Any) -> Event:
    if isinstance(row, list) and len(row) == 3 and type(row[0]) is int:
        step, kind, value = row
        if (kind, type(value)) in (("switch", str), ("split", bool)):
            return Event(step, kind, value)
    raise StateError(f"{path}: not an event: {row!r:.80}")


class Recorder:
    """Records a session of one world from now on: tell it of every step, switch and split.

    Args:
        session: reset, and played by nobody else meanwhile.
        limit: the most bytes that frames may take.

    ``full``: whether no more is taken.
    """

    def __init__(self, session: Session, limit: int) -> None:
        if session.batch != 1:
            raise ValueError(f"a session of {session.batch} worlds: one that is recorded has one")
        self.recording = Recording(session.state(), fingerprint(session.engine))
        self._session, self._limit = session, limit
        self._context = [
            (
                session.picture_of(moment.latent)[0] if moment.picture is None else moment.picture[0],
                moment.mouse[0].cpu(),
                moment.btn[0].cpu(),
            )
            for moment in session.history()
        ]
        self._frames: list[Tensor] = []

    @property
    def frames(self) -> int:
        """Frames played so far, the context not among them."""
        return len(self._frames)

    @property
    def full(self) -> bool:
        """Whether nothing more is taken."""
        taken = (len(self._frames) + 1) * self._context[0][0].nbytes
        return taken > self._limit or len(self.recording.events) >= MOST_EVENTS

    def step(self, action: Action, frame: Tensor) -> None:
        """The session made a step under ``action`` and gave ``frame``, uint8 ``[h, w, 3]``."""
        if self.full:
            return
        mouse, btn = action.rows(self._session.engine.button_names)
        self.recording.mouse.append(mouse)
        self.recording.btn.append(btn)
        self.recording.digests.append(digest(frame))
        self._frames.append(frame)

    def event(self, kind: str, value: str | bool) -> None:
        """The session will switch or split before its next step."""
        if not self.full:
            self.recording.events.append(Event(len(self._frames), kind, value))

    def clip(self, clip_id: str, fps: float, scenario: str) -> Clip:
        """The clip: the window in which recording began, then what was played."""
        mouse = torch.stack([row for _, row, _ in self._context] + self.recording.mouse)
        btn = torch.stack([row for _, _, row in self._context] + self.recording.btn).to(torch.uint8)
        frames = torch.stack([picture for picture, _, _ in self._context] + self._frames)
        return Clip(
            id=clip_id,
            frames=frames.permute(0, 3, 1, 2).contiguous(),
            buttons=btn,
            mouse=mouse,
            fps=fps,
            tag=derive_tag(btn, mouse),
            scenario=scenario,
            seed=self.recording.state.seed,
            button_names=self._session.engine.button_names,
        )

    def save(self, folder: Path, clip_id: str, fps: float, scenario: str) -> Path:
        """Write clip and recording into ``folder``; returns the video's path.

        Raises:
            ValueError: if nothing was played, or frames have odd sides.
            OSError: if the folder cannot be written.
        """
        if not self._frames:
            raise ValueError("nothing was played since recording began")
        video = write_clip(folder, self.clip(clip_id, fps, scenario))
        self.recording.save(folder / f"{clip_id}{SUFFIX}")
        return video


@dataclass(frozen=True)
class Replay:
    """Outcome: ``frames`` played again, and the first (0 = the first played) that differs, None if none does."""

    frames: int
    first_difference: int | None

    @property
    def identical(self) -> bool:
        """Whether every frame is what it was, bit for bit."""
        return self.first_difference is None


class Replayer:
    """Plays a recording again in a session, step by step. Raises :class:`StateError` if it is of another model.

    ``done``: whether all is played. ``outcome``: so far.
    """

    def __init__(self, session: Session, recording: Recording) -> None:
        check_same(recording.about, fingerprint(session.engine))
        buttons, names = recording.btn[0].shape[0], session.engine.button_names
        if buttons != len(names):
            raise StateError(f"recorded with {buttons} buttons; this model has {len(names)}")
        session.restore(recording.state)
        self.session, self.recording = session, recording
        self._at = 0
        self._difference: int | None = None
        self._events = list(recording.events)

    @property
    def done(self) -> bool:
        """Whether all is played."""
        return self._at == len(self.recording.digests)

    @property
    def outcome(self) -> Replay:
        """What was found so far."""
        return Replay(self._at, self._difference)

    def step(self) -> tuple[Action, Tensor]:
        """The next frame of the recording, and its action."""
        session, at = self.session, self._at
        while self._events and self._events[0].step <= at:
            event = self._events.pop(0)
            session.switch(str(event.value)) if event.kind == "switch" else session.split(bool(event.value))
        rows = self.recording.mouse[at], self.recording.btn[at]
        action = Action.of_rows(*rows, session.engine.button_names)
        frame = session.step(action)
        if self._difference is None and digest(frame) != self.recording.digests[at]:
            self._difference = at
        self._at += 1
        return action, frame


def replay(session: Session, path: str | Path, on_frame: Callable[[Tensor], None] = lambda frame: None) -> Replay:
    """Play a recorded session (its ``.session.safetensors``) again and compare every frame.

    Raises:
        StateError: if the file is no recording, or of another model or other formats.
    """
    replayer = Replayer(session, Recording.load(Path(path)))
    while not replayer.done:
        on_frame(replayer.step()[1])
    return replayer.outcome


def digest(frame: Tensor) -> bytes:
    """SHA-256 of a frame's bytes."""
    return hashlib.sha256(frame.contiguous().numpy().tobytes()).digest()


def fingerprint(engine: Engine) -> dict[str, Any]:
    """What a session's frames depend on, as JSON holds it: configs, checkpoints by SHA-256, device, torch."""
    conf = engine.plan.conf
    parts = {name: _container(getattr(conf, name)) for name in SAME if name != "device"}
    for name, keys in (("model", ("checkpoint", "config_file")), ("decoder", ("checkpoint", "config_file", "encoder"))):
        parts[name] |= {key: None if parts[name][key] is None else _file_sha256(parts[name][key]) for key in keys}
    device = engine.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**parts, "device": kind, "torch": str(torch.__version__)}


def _container(conf: Any) -> dict[str, Any]:
    return dict(OmegaConf.to_container(OmegaConf.structured(conf), enum_to_str=True))  # type: ignore[arg-type]


@cache
def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same(recorded: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise :class:`StateError` naming every part of the config in which a recording differs from this session's."""
    different = [name for name in SAME if recorded.get(name) != ours[name]]
    if different:
        raise StateError(
            f"recorded with another {', '.join(different)}; start with the words that it was recorded with to replay it"
        )
