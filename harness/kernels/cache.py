"""What compilers made, kept on disk between processes: a sweep compiles a kernel once, not once a run.

One folder of our own, ``$MX_HARNESS_CACHE`` or ``mx_harness`` in the user's cache folder (``$XDG_CACHE_HOME`` or
``~/.cache``). CUDA kernels are in ``cubin``, by what they were compiled from and with; Inductor's and Triton's own
caches are beside it in a folder for each pair of their versions, unless their own variables place them elsewhere. Each
is kept below a size; what was used longest ago goes first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

CUBIN_BYTES = 256 << 20
"""Most that all CUDA kernels take; one takes 20 to 100 KB."""

LARGEST_CUBIN = 8 << 20
"""No file larger than this is read as a kernel."""

COMPILER_BYTES = 4 << 30
"""Most that Inductor's and Triton's caches take, all versions together."""

_DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    """Where caches are; it may not exist yet."""
    own = os.environ.get("MX_HARNESS_CACHE")
    if own:
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "mx_harness"


def key_of(parts: Iterable[str]) -> str:
    """A name for what is compiled from ``parts``: another if any of them differs."""
    digest = hashlib.sha256()
    for part in parts:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def read_cubin(key: str) -> bytes | None:
    """The kernel kept under ``key``; None if there is none, or the file is not what was written."""
    path = folder() / "cubin" / key
    try:
        if path.stat().st_size > LARGEST_CUBIN:
            return None
        data = path.read_bytes()
        digest, cubin = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(cubin).digest() != digest:
            return None
        os.utime(path)
    except OSError:
        return None
    return cubin


def write_cubin(key: str, cubin: bytes) -> None:
    """Keep a kernel; where the folder cannot be written, the next process compiles it again."""
    place = folder() / "cubin"
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place, prefix=".new")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(name, place / key)
        prune(place, CUBIN_BYTES)
    except OSError:
        return


def prune(place: Path, limit: int) -> None:
    """Delete entries of a folder, files or folders, those used longest ago first, until ``limit`` bytes are left."""
    sized = []
    for entry in place.iterdir():
        files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
        stats = [path.stat() for path in files]
        used = max((stat.st_mtime for stat in stats), default=0.0)
        sized.append((used, sum(stat.st_size for stat in stats), entry))
    left = sum(size for _, size, _ in sized)
    for _, size, entry in sorted(sized, key=lambda one: one[0]):
        if left <= limit:
            return
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        left -= size


def version(package: str) -> str:
    """Its version; "none" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def place_compilers() -> None:
    """Have Inductor and Triton keep what they compile in our folder, unless their own variables say where.

    For the start of a program, before anything is compiled.
    """
    place = folder() / "compilers"
    try:
        place.mkdir(parents=True, exist_ok=True)
        prune(place, COMPILER_BYTES)
    except OSError:
        return  # their own default folders then
    versions = place / f"torch-{version('torch')}-triton-{version('triton')}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(versions / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(versions / "triton"))
