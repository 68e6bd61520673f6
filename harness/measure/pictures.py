"""Pictures of a rollout, kept for scoring: in memory while they are few, then in a file; read piece by piece.

A rollout of any length is thus scored within the same memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IN_MEMORY = 2**23
"""Bytes of a rollout's pictures that are held in memory; beyond, all of them go to the file."""
PIECE = 64
"""Pictures that are looked at together."""


class Shown(Protocol):
    """Pictures ``[F, 3, h, w]``, float in [0, 1], some of which are asked for at a time; a tensor is that too."""

    @property
    def shape(self) -> torch.Size:
        """F, 3, h, w."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Tensor: ...


def pieces(*shown: Shown, before: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """All of ``shown`` (equally long), :data:`PIECE` pictures at a time; ``before``: as many of the piece before lead.

    A piece has no more than those that lead where there are no more pictures.
    """
    for first in range(0, len(shown[0]), PIECE):
        yield tuple(one[max(0, first - before) : first + PIECE] for one in shown)


class Pictures:
    """What an arm, or a recording, showed in a batch: one picture per clip and frame, as the decoder gave them.

    Args:
        folder: where the file goes that holds them once they are many; it has no name and ends with the process. By
            default the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: list[Tensor] = []
        self._file: IO[bytes] | None = None
        self._frames = self._bytes = 0
        self._like: Tensor | None = None

    @classmethod
    def of(cls, rgb: Tensor) -> Pictures:
        """``rgb [B, F, ...]``, as if it had been appended frame by frame."""
        pictures = cls()
        for frame in rgb.unbind(1):
            pictures.append(frame)
        return pictures

    def __len__(self) -> int:
        """Frames."""
        return self._frames

    def append(self, frame: Tensor) -> None:
        """One more frame of all clips, ``[B, 3, h, w]`` on the CPU, shape and dtype like the ones before.

        Raises:
            OSError: naming the folder, if its file system is full.
        """
        frame = frame.contiguous()
        self._like = frame
        self._frames += 1
        self._bytes += frame.nbytes
        if self._file is None and self._bytes <= IN_MEMORY:
            self._held.append(frame)
            return
        try:
            if self._file is None:
                # Open as long as this object lives.
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
                for one in self._held:
                    self._write(one)
                self._held = []
            self._write(frame)
        except OSError as error:
            where = str(self.folder or tempfile.gettempdir())
            raise OSError(error.errno, f"cannot keep a rollout's pictures: {error.strerror}", where) from error

    def _write(self, frame: Tensor) -> None:
        assert self._file is not None
        left = _bytes_of(frame)
        while left:
            left = left[self._file.write(left) :]

    def raw(self, clip: int, first: int, last: int) -> Tensor:
        """Pictures ``first`` to ``last - 1`` of a clip as the decoder gave them, ``[n, 3, h, w]``; from any thread."""
        assert self._like is not None
        if self._file is None:
            return torch.stack([frame[clip] for frame in self._held[first:last]])
        clips, size = len(self._like), self._like[0].nbytes
        found = torch.empty((last - first, *self._like.shape[1:]), dtype=self._like.dtype)
        into = _bytes_of(found)
        for index in range(last - first):
            offset = ((first + index) * clips + clip) * size
            if os.preadv(self._file.fileno(), [into[index * size : (index + 1) * size]], offset) != size:
                raise OSError(None, "the file of a rollout's pictures was cut off", str(self.folder))
        return found

    def rgb(self) -> Tensor:
        """All of them, ``[B, F, 3, h, w]``."""
        assert self._like is not None
        return torch.stack([self.raw(clip, 0, self._frames) for clip in range(len(self._like))])

    def clip(self, index: int, convert: Callable[[Tensor], Tensor]) -> ClipPictures:
        """Those of one clip; ``convert``: from the decoder's range to [0, 1]."""
        return ClipPictures(self, index, convert)

    def frame_shape(self) -> torch.Size:
        """3, h, w."""
        assert self._like is not None
        return self._like.shape[1:]


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: NDArray[np.uint8] = values.view(torch.uint8).numpy()
    return array.reshape(-1).data


class ClipPictures:
    """One clip's pictures as :class:`Shown`."""

    def __init__(self, pictures: Pictures, clip: int, convert: Callable[[Tensor], Tensor]) -> None:
        self._pictures, self._clip, self._convert = pictures, clip, convert

    @property
    def shape(self) -> torch.Size:
        """F, 3, h, w."""
        return torch.Size((len(self._pictures), *self._pictures.frame_shape()))

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: slice) -> Tensor:
        first, last, _ = index.indices(len(self))
        return self._convert(self._pictures.raw(self._clip, first, last))
