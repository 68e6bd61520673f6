"""What a ladder keeps in its folder: its results, from which a killed one goes on, and a lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.files.locks import lock
from harness.files.text import read_text
from harness.files.writing import why_unwritable, write_text
from harness.report.codec import CodecError, decode, encode, read
from harness.report.sections import Calibration

STATE_VERSION = 2
LARGEST = 1 << 26
"""Bytes of a state that is read at all: thousands of trials stay far below."""


class LadderError(ValueError):
    """The ladder cannot start: its words are wrong, its folder is in use, or its state cannot be read."""


@dataclass(frozen=True)
class Result:
    """A finished trial.

    ``bytes``: weights and KV window as measured; ``drop`` against BF16, dB, if it was scored; ``added``: what its gate
    judged, with ``interval``. ``needs_clips``: how many would decide it, where it is undecided for want of clips.
    ``fidelity`` to BF16, dB; ``calibration`` of its weights, if they were not rounded to nearest.
    """

    step: int
    name: str
    words: list[str]
    quant: list[str]
    kv: list[str]
    gate: str
    stands_on: str
    key: str
    folder: str
    verdict: str
    reason: str
    drop: float | None
    added: float | None
    interval: list[float] | None
    needs_clips: int | None
    speed: str
    bytes: int
    seconds: float
    fidelity: float | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Failure:
    """A trial whose run broke: it is never reused, and tried again when the ladder is resumed."""

    step: int
    name: str
    folder: str
    reason: str


@dataclass
class State:
    """``runs``: every finished trial by its key, ``trials`` and ``failed`` those of the latest climb, in order."""

    state_version: int = STATE_VERSION
    commit: str | None = None
    overrides: list[str] = field(default_factory=list)
    complete: bool = False
    recommendation: str | None = None
    trials: list[Result] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    runs: dict[str, Result] = field(default_factory=dict)


def load(path: Path) -> State:
    """The state at ``path``; an empty one if there is none.

    Raises:
        LadderError: if it is anything else than a ladder's state.
    """
    if not path.exists():
        return State()
    try:
        content = decode(read_text(path, "a ladder's state", LARGEST))
        version = content.get("state_version") if isinstance(content, dict) else None
        if version != STATE_VERSION:
            raise CodecError(f"state_version {version!r:.40}; this version reads {STATE_VERSION}")
        return read(State, content)
    except (OSError, ValueError) as error:
        raise LadderError(
            f"{path}: not a ladder's state ({error}); choose another --out, or delete the file to begin anew"
        ) from error


def save(state: State, path: Path) -> None:
    """Write the state, atomically. Raises ``OSError`` naming the file."""
    write_text(path, encode(state, indent=1) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's alone within the context; the lock goes with the process, however it ends.

    Raises:
        LadderError: if another ladder holds it.
        OSError: if the folder cannot be written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise LadderError(f"--out {folder}: {there} is a file; name a folder")
    state = folder / "ladder.json"
    if not state.is_dir() and (why := why_unwritable(state)) is not None:  # of a folder there, load says what it is
        raise LadderError(f"--out {folder}: cannot be written to ({why}); name another folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ladder.lock").open("a+", encoding="utf-8") as file:
        try:
            unlocked = lock(file.fileno())
        except BlockingIOError as error:
            raise LadderError(
                f"{folder}: another ladder is at work here; wait for it, or choose another --out"
            ) from error
        if unlocked is not None:
            print(f"note: no lock keeps another ladder out of {folder} ({unlocked}); see that none is started in it")
        try:
            yield
        except LadderError:  # refused before anything ran: what was made for the lock alone goes with it
            if made and [path.name for path in folder.iterdir()] == ["ladder.lock"]:
                with suppress(OSError):  # somebody else may have begun to use it
                    (folder / "ladder.lock").unlink()
                    for path in made:
                        path.rmdir()
            raise
