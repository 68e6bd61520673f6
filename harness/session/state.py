"""A moment of a session as tensors: saved, written to a file, come back to bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.files.digest import Digest
from harness.files.tensors import check_header, read_safetensors
from harness.files.text import FileError, check_file, parse_json

FORMAT = "mx-world-harness session state"
VERSION = 1
LARGEST_FILE = 16 << 30


class StateError(ValueError):
    """A saved state or recording that cannot be used; the message says why."""


@dataclass(frozen=True)
class WorldState:
    """One arm's world.

    ``cache``: what :meth:`harness.rollout.Rollout.saved` gave. ``latents`` float32 ``[W, B, C, S, S]``, ``mouse``
    ``[W, B, 2]`` and ``btn`` ``[W, B, K]`` of the newest W frames, oldest first.
    """

    cache: tuple[Tensor, ...]
    latents: Tensor
    mouse: Tensor
    btn: Tensor


@dataclass(frozen=True)
class SessionState:
    """All that a session's next frames depend on beside the model.

    Attributes:
        arm: the one that is played. worlds: those that are live, by arm.
        frame: absolute index of the newest frame; a context's first frame is 0.
        seed: of the noise. names: what names the noise of each of the B contexts.
    """

    arm: str
    worlds: dict[str, WorldState]
    frame: int
    seed: int
    names: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a name of its own."""
        named: dict[str, Tensor] = {}
        for arm, world in self.worlds.items():
            named |= {f"{arm}.cache.{index:04d}": tensor for index, tensor in enumerate(world.cache)}
            named |= {f"{arm}.{name}": getattr(world, name) for name in ("latents", "mouse", "btn")}
        return named

    def counters(self) -> dict[str, Any]:
        """The rest, as JSON holds it."""
        return {"arm": self.arm, "frame": self.frame, "seed": self.seed, "names": list(self.names)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], counters: Any) -> SessionState:
        """Put together again what :meth:`tensors` and :meth:`counters` gave.

        Raises:
            StateError: if something is missing or of the wrong type.
        """
        if not isinstance(counters, Mapping):
            raise StateError(f"not a whole state: {counters!r:.60} instead of its counters")
        try:
            arms = sorted({name.partition(".")[0] for name in tensors})
            worlds = {arm: _world(tensors, arm) for arm in arms}
            arm, frame, seed, names = (counters[name] for name in ("arm", "frame", "seed", "names"))
        except KeyError as error:
            raise StateError(f"not a whole state: it lacks {error}") from error
        whole = all(type(one) is int and 0 <= one < 2**63 for one in (frame, seed))
        if not (whole and isinstance(arm, str) and _texts(names)):
            told = f"arm {arm!r:.40}, frame {frame!r:.40}, seed {seed!r:.40}, names {names!r:.80}"
            raise StateError(f"not a whole state: {told}")
        state = cls(arm, worlds, frame, seed, tuple(names))
        if state.arm not in worlds:
            raise StateError(f"a state of arm {state.arm} that holds no world of it")
        return state

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file, complete or not at all. Raises ``OSError`` if it cannot be written."""
        write_tensors(path, self.tensors(), FORMAT, VERSION, self.counters())

    @classmethod
    def load(cls, path: str | Path) -> SessionState:
        """Read what :meth:`save` wrote; nothing in the file can run code.

        Raises:
            StateError: if it is no such file.
        """
        tensors, counters = read_tensors(path, FORMAT, VERSION)
        try:
            return cls.of(tensors, counters)
        except StateError as error:
            raise StateError(f"{path}: {error}") from error


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _world(tensors: Mapping[str, Tensor], arm: str) -> WorldState:
    cache = tuple(tensors[name] for name in sorted(tensors) if name.startswith(f"{arm}.cache."))
    return WorldState(cache, *(tensors[f"{arm}.{name}"] for name in ("latents", "mouse", "btn")))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], kind: str, version: int, header: Mapping[str, Any]
) -> None:
    """Write named tensors with a header of JSON, complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    held, said = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, json.dumps(header)
    metadata = {"format": kind, "version": str(version), "header": said, "content": _content(held, said)}
    try:
        save_file(held, part, metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote.

    Raises:
        StateError: for a file that is none, of another kind or version, or larger than ``LARGEST_FILE``.
    """
    path = Path(path)
    try:
        check_file(path, f"a {kind}", LARGEST_FILE)
        check_header(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != kind or metadata.get("version") != str(version):
            raise StateError(f'{path}: is no "{kind}" of version {version}')
        header = parse_json(metadata["header"])
        tensors = read_safetensors(path)
    except FileError as error:
        raise StateError(str(error) if str(path) in str(error) else f"{path}: header: {error}") from error
    except (OSError, SafetensorError, KeyError) as error:
        raise StateError(f"{path}: not readable: {error}") from error
    if not isinstance(header, dict):
        raise StateError(f"{path}: its header is no JSON object")
    if metadata.get("content", (now := _content(tensors, metadata["header"]))) != now:
        raise StateError(f"{path}: its content is not what was saved: it is damaged, or was changed")
    return tensors, header


def _content(tensors: Mapping[str, Tensor], header: str) -> str:
    """SHA-256 of all that is in a file: a world that goes on from another state looks like any other."""
    return Digest().tensors({name: tensors[name] for name in sorted(tensors)}).settings(header=header).hex()


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, so that what is saved does not change with what is played."""
    with torch.no_grad():
        return {name: tensor.clone() for name, tensor in tensors.items()}
