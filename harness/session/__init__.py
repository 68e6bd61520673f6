"""Playing a world model from a program: this project's public API, under semantic versioning.

``open_session`` with the words of a run, ``reset`` with a clip, ``step`` with an action. See docs/play.md.
"""

from harness.session.action import Action
from harness.session.engine import ARMS, BF16, CANDIDATE, Context, Engine
from harness.session.open import open_engine, open_session
from harness.session.recording import Recorder, Recording, Replay, replay
from harness.session.session import Session, SessionError, UnstableWorldError
from harness.session.state import SessionState, StateError, WorldState

__all__ = [
    "ARMS",
    "BF16",
    "CANDIDATE",
    "Action",
    "Context",
    "Engine",
    "Recorder",
    "Recording",
    "Replay",
    "Session",
    "SessionError",
    "SessionState",
    "StateError",
    "UnstableWorldError",
    "WorldState",
    "open_engine",
    "open_session",
    "replay",
]
