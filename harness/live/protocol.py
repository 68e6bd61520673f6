"""What server and browser say to each other: docs/play.md has it in words.

Text messages are JSON objects with a ``type``; frames come as binary messages. Everything that arrives is checked here,
type and bounds, before anything acts on it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.files.text import FileError, parse_json

PROTOCOL = 1
LARGEST_MESSAGE = 2048
"""Bytes of a message to the server."""
MOST_MESSAGES = 1000
"""Messages to the server in one second."""
FRAME = 1
"""Kind of a binary message: a frame."""
PREFIX = struct.Struct("<BBH")
"""Protocol version, kind, bytes of the header."""
MOST_MOUSE = 1e4


class Close:
    """Codes with which the server closes a WebSocket, beside the standard ones."""

    POLICY = 1008
    TOO_LARGE = 1009
    PROTOCOL = 4002
    BUSY = 4013
    RELEASED = 4008


class ProtocolError(ValueError):
    """A message that cannot be; the text says why."""


@dataclass(frozen=True)
class Message:
    """A checked message: its ``type``, and its other fields by name."""

    type: str
    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _number(low: float, high: float) -> Check:
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and low <= x <= high


def _text(most: int) -> Check:
    return lambda x: isinstance(x, str) and 0 < len(x) <= most


def _one_of(*values: str) -> Check:
    return lambda x: isinstance(x, str) and x in values


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


def _mouse(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(_number(-MOST_MOUSE, MOST_MOUSE), x))


def _or_null(check: Check) -> Check:
    return lambda x: x is None or check(x)


VIEWS = ("one", "split", "difference")
_SERIAL = _whole(0, 1 << 53)
MESSAGES: dict[str, dict[str, Check]] = {
    "hello": {"protocol": _whole(0, 1 << 16)},
    "input": {"seq": _SERIAL, "t": _number(0, 1e15), "buttons": _whole(0, (1 << 32) - 1), "mouse": _mouse},
    "drawn": {"serial": _SERIAL},
    "play": {},
    "pause": {},
    "step": {},
    "reset": {
        "clip": _or_null(_text(200)),
        "start": _whole(0, 1 << 31),
        "seed": _or_null(_whole(0, (1 << 53) - 1)),
    },
    "arm": {"arm": _one_of("bf16", "candidate")},
    "view": {"view": _one_of(*VIEWS)},
    "limit": {"fps": _number(0.1, 1000)},
    "codec": {"codec": _one_of("jpeg", "webp"), "quality": _whole(1, 100)},
    "record": {"on": _flag},
    "replay": {"id": _text(200)},
}
"""Messages to the server, and the check of each field; every field is required, no other is allowed."""


def parse(text: str) -> Message:
    """A message to the server.

    Raises:
        ProtocolError: if it is too large, no JSON object, of an unknown type, or has a field that is missing, unknown
            or out of bounds.
    """
    if len(text.encode("utf-8", "replace")) > LARGEST_MESSAGE:
        raise ProtocolError(f"a message of more than {LARGEST_MESSAGE} bytes")
    try:
        content = parse_json(text)
    except FileError as error:
        raise ProtocolError(f"a message that is no JSON: {error}"[:200]) from error
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise ProtocolError("a message that is no JSON object with a type")
    kind = content.pop("type")
    if kind not in MESSAGES:
        raise ProtocolError(f"type {kind[:40]!r}: known are {', '.join(MESSAGES)}")
    checks = MESSAGES[kind]
    problems = [f"{name[:40]!r} is unknown" for name in content if name not in checks]
    problems += [f"{name} is missing" for name in checks if name not in content]
    problems += [
        f"{name} is {content[name]!r:.60}" for name in checks if name in content and not checks[name](content[name])
    ]
    if problems:
        raise ProtocolError(f"{kind}: {'; '.join(problems)}")
    return Message(kind, content)


def pack_frame(header: Mapping[str, Any], pictures: Sequence[bytes]) -> bytes:
    """A binary message: prefix, header as JSON, then the pictures one after the other (``header`` has their sizes)."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((PREFIX.pack(PROTOCOL, FRAME, len(text)), text, *pictures))


def unpack_frame(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What :func:`pack_frame` packed, for clients in Python.

    Raises:
        ProtocolError: if it is something else.
    """
    if len(data) < PREFIX.size:
        raise ProtocolError("a binary message that is too short")
    version, kind, size = PREFIX.unpack_from(data)
    if (version, kind) != (PROTOCOL, FRAME):
        raise ProtocolError(f"a binary message of version {version} and kind {kind}")
    header = json.loads(data[PREFIX.size : PREFIX.size + size])
    pictures, at = [], PREFIX.size + size
    for pane in header["panes"]:
        pictures.append(data[at : at + pane["bytes"]])
        at += pane["bytes"]
    return header, pictures
