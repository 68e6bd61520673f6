"""Tensors kept from run to run under a digest of all that went into them, checked whenever they are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.files.digest import Digest
from harness.files.locks import lock
from harness.files.tensors import check_header, read_safetensors, write_tensors
from harness.files.text import FileError, check_file

log = logging.getLogger(__name__)

SLACK_BYTES = 1 << 20
"""The header of a kept file is no larger."""

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class StaleError(ValueError):
    """A kept file that is damaged, or not what its name says."""


def keep(path: Path, tensors: Mapping[str, Tensor], facts: str) -> None:
    """Write ``tensors`` and what is to be said of them to ``path``, whose stem is their key, all or nothing.

    Raises:
        OSError: if it cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, held, {"facts": facts, "content": _content(held, facts), "key": path.stem})


def read(path: Path, shapes: Shapes) -> tuple[dict[str, Tensor], str]:
    """The tensors at ``path``, which must be of these ``shapes``, and what was said of them.

    Raises:
        StaleError: if the file is damaged, or holds anything but what was kept under its name.
    """
    size = sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in shapes.values())
    try:
        check_file(path, "a kept result", size + SLACK_BYTES)
        check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = read_safetensors(path)
        facts = metadata["facts"]
    except (FileError, OSError, SafetensorError, KeyError) as error:
        raise StaleError(f"{path}: {error}") from error
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != dict(shapes):
        raise StaleError(f"{path}: its tensors are not those that belong under its name")
    if metadata.get("key") != path.stem or metadata.get("content") != _content(tensors, facts):
        raise StaleError(f"{path}: its content is not what was stored")
    return tensors, facts


def _content(tensors: Mapping[str, Tensor], facts: str) -> str:
    return Digest().tensors({name: tensors[name] for name in sorted(tensors)}).settings(facts=facts).hex()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is at ``path``: of several that want one result, one makes it.

    Raises:
        OSError: if its folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        if (unlocked := lock(file.fileno(), wait=True)) is not None:
            log.warning("%s: no lock here (%s); runs side by side may make the same result", path, unlocked)
        yield


class Store:
    """Kept files of one kind in a folder that stays below a size: what was not used for longest goes first.

    Args:
        folder: is made when something is kept.
        limit: bytes of all files together; what is larger by itself is not kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def find(self, key: str, shapes: Shapes) -> tuple[dict[str, Tensor], str] | None:
        """What is kept under ``key``; None if nothing is.

        Raises:
            StaleError: see :func:`read`.
        """
        path = self._path(key)
        if not path.exists():
            return None
        found = read(path, shapes)
        with suppress(OSError):  # another process has made room, or the folder is read-only
            os.utime(path)
        return found

    def keep(self, key: str, tensors: Mapping[str, Tensor], facts: str) -> None:
        """Keep ``tensors`` under ``key``. Raises ``OSError`` if they cannot be written."""
        if sum(tensor.nbytes for tensor in tensors.values()) > self.limit:
            return
        keep(self._path(key), tensors, facts)
        self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):  # another process has removed it
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size
