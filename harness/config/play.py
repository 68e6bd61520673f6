"""The config of play: that of a run, and how the game is served."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum

from harness.config.schema import RunConf, register_schema
from harness.mx.conf import KeepDecoded


class Codec(StrEnum):
    """How a frame travels."""

    jpeg = "jpeg"
    webp = "webp"


@dataclass
class PlayConf:
    """Serving a world model to browsers. Fits an OmegaConf structured config.

    Attributes:
        host: address to listen on. Any but a loopback address is open to others: then a token is required.
        port: to listen on; 0 = one that is free.
        token: what the URL must carry as ``?token=``; null = none on loopback, a random one elsewhere.
        max_sessions: browsers that may play at once; each has its own world, caches and thread.
        fps: the most frames a second that are generated, and what the game is meant to run at.
        show_fps: the most frames a second that are compressed and sent; those between them are generated, but dropped.
        codec: of the frames. quality: of it, 1 to 100.
        in_flight: frames that may be on their way to a browser before it has said that it drew one; beyond, frames are
            dropped, newest wins.
        stall_s: seconds without a word from the browser about a frame after which the game pauses itself.
        idle_s: seconds without any input after which it does.
        release_s: seconds of being paused after which the session is given to others.
        record_mb: the most memory that the frames of one recording may take, in MiB.
        folder: where recorded clips go, relative to the current folder.
        sensitivity: of the mouse: what the model is told of a movement of one pixel.
        keep_decoded: whether emulated MX Linears keep decoded weights, see :class:`KeepDecoded`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_sessions: int = 2
    fps: float = 35.0
    show_fps: float = 120.0
    codec: Codec = Codec.jpeg
    quality: int = 90
    in_flight: int = 4
    stall_s: float = 3.0
    idle_s: float = 120.0
    release_s: float = 600.0
    record_mb: int = 512
    folder: str = "played"
    sensitivity: float = 0.15
    keep_decoded: KeepDecoded = KeepDecoded.auto

    @property
    def is_local(self) -> bool:
        """Whether the address can be reached from this machine alone."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass
class PlayRunConf(RunConf):
    """A run's config, and how it is played."""

    play: PlayConf = field(default_factory=PlayConf)


def validate(conf: PlayConf) -> None:
    """Raise ``ValueError`` naming every field of ``conf`` that is out of range."""
    bounds = {
        "port": (0, 65535),
        "max_sessions": (1, 64),
        "fps": (0.1, 1000),
        "show_fps": (1, 1000),
        "quality": (1, 100),
        "in_flight": (1, 64),
        "stall_s": (0.1, 3600),
        "idle_s": (1, 86400),
        "release_s": (1, 86400),
        "record_mb": (1, 1 << 20),
        "sensitivity": (0, 100),
    }
    problems = [
        f"play.{name}={getattr(conf, name)}: must lie between {low} and {high}"
        for name, (low, high) in bounds.items()
        if not low <= getattr(conf, name) <= high
    ]
    if conf.token is not None and (len(conf.token) < 8 or not conf.token.isascii() or not conf.token.isalnum()):
        problems.append("play.token: give at least 8 letters and digits, or null for a random one")
    if not conf.host:
        problems.append("play.host is empty: give an address, such as 127.0.0.1")
    if problems:
        raise ValueError("\n".join(problems))


def register_play() -> None:
    """Put the schema where Hydra finds it. May be called again."""
    register_schema("play", PlayRunConf)
