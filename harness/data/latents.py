"""Reader of upstream latent caches: ``data_cache/*.pt`` files of already encoded clips.

A file is a dict of tensors: ``vid [n, C, S, S]`` latents, ``mouse [n, 2]``, ``button [n, K]`` of 0 and 1. The model's
input is ``vid / vae_scale``; the decoder's is ``vid`` itself. There are no frames in it, so the reference of such a
clip is its own decoded latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.clips import TAGS, ClipError, check_actions, derive_tag
from harness.files.tensors import read_pickle
from harness.files.text import FileError, read_json

KEYS = ("vid", "mouse", "button")


@dataclass(frozen=True)
class LatentClip:
    """Encoded frames: ``latents`` float32 ``[n,C,S,S]`` as stored, with one action each.

    ``buttons`` uint8 ``[n,K]`` of 0 and 1, ``mouse`` float32 ``[n,2]``.
    """

    id: str
    latents: Tensor
    buttons: Tensor
    mouse: Tensor
    tag: str


def find_latents(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The ``.pt`` files in folders, or named; sorted by name.

    Raises:
        ClipError: a path that does not exist, a folder without ``.pt`` files, or two files of one name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
        if not files:
            raise ClipError(f"{path}: no .pt files here; a latent cache is a folder of them")
        for file in files:
            if not file.is_file():
                raise ClipError(f"{file}: no such file; give a folder of .pt files, or one of them")
            if file.resolve() != found.setdefault(file.stem, file).resolve():
                raise ClipError(f"{file} and {found[file.stem]}: two clips of one id; rename one")
    return [found[key] for key in sorted(found)]


def probe_latents(path: str | Path) -> tuple[str, int]:
    """The clip's tag and its number of frames.

    The tag is what ``<id>.json`` beside the file says under ``"tag"``, else it follows from the actions by
    :func:`harness.data.clips.derive_tag`.

    Raises:
        ClipError: as :func:`read_latents`, or a JSON without a valid tag.
    """
    content = _load(Path(path))
    return _tag(Path(path), content), len(content["vid"])


def _tag(path: Path, content: dict[str, Tensor]) -> str:
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return derive_tag(content["button"], content["mouse"])
    try:
        described = read_json(sidecar, 'a JSON object with a "tag"')
    except FileError as error:
        raise ClipError(str(error)) from error
    if not isinstance(described, dict) or "tag" not in described:
        raise ClipError(f'{sidecar}: give a JSON object with a "tag"')
    tag = described["tag"]
    if tag not in TAGS:
        raise ClipError(f"{sidecar}: tag is {tag!r}; give one of {', '.join(TAGS)}")
    return str(tag)


def read_latents(path: str | Path, first: int = 0, count: int | None = None) -> LatentClip:
    """Read frames ``first`` to ``first + count`` (None: to the end); the rest of a large file stays on disk.

    Raises:
        ClipError: naming the file and the key, if it is missing, corrupt, would run code, lacks a key, is misshapen,
            shorter than asked for, or holds NaN or infinities among these frames.
    """
    path = Path(path)
    content = _load(path)
    frames = len(content["vid"])
    stop = frames if count is None else first + count
    if not 0 <= first < stop <= frames:
        raise ClipError(f"{path}: vid has {frames} frames; frames {first} to {stop - 1} were asked for")
    latents = content["vid"][first:stop].float()
    bad = ~torch.isfinite(latents).flatten(1).all(1)
    if bad.any():
        raise ClipError(f"{path}: vid of frame {first + int(bad.nonzero()[0])} holds NaN or infinite values")
    return LatentClip(
        id=path.stem,
        latents=latents,
        buttons=content["button"][first:stop].to(torch.uint8),
        mouse=content["mouse"][first:stop].float(),
        tag=_tag(path, content),
    )


def _load(path: Path) -> dict[str, Tensor]:
    """The file's tensors, checked but for the values of ``vid``."""
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise ClipError(f"{path}: holds a {type(content).__name__}; it must be a dict of {', '.join(KEYS)}")
    missing = [key for key in KEYS if not isinstance(content.get(key), Tensor)]
    if missing:
        raise ClipError(f"{path}: no tensor under {', '.join(missing)}; found {', '.join(map(str, content)) or 'none'}")
    vid = content["vid"]
    if vid.ndim != 4 or vid.shape[2] != vid.shape[3] or not vid.is_floating_point():
        raise ClipError(f"{path}: vid is {vid.dtype} {list(vid.shape)}; it must be floating-point [n, C, S, S]")
    try:
        check_actions(path, len(vid), content["button"], content["mouse"])
    except ClipError as error:
        raise ClipError(str(error).replace("buttons", "button")) from None
    return {key: content[key] for key in KEYS}


def _unpickle(path: Path) -> Any:
    try:
        return read_pickle(path)
    except FileError as error:
        raise ClipError(str(error)) from error
