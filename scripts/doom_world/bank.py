"""Recorded play held on the training device, cut into sequences that never cross an episode's end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass
class Controls:
    """Actions of every recorded frame: ``mouse [T, 2]``, ``btn [T, 11]`` float32, ``segment [T]`` int64."""

    mouse: Tensor
    btn: Tensor
    segment: Tensor


def load_shards(folder: Path, device: torch.device) -> tuple[Tensor, Controls]:
    """Read the shards ``record_doom.record_many`` wrote: frames uint8 ``[T, 3, h, w]`` and their controls.

    Segment ids are made unique across shards. Raises ``FileNotFoundError`` if the folder holds no shard.
    """
    shards = sorted(folder.glob("*.frames.npy"))
    if not shards:
        raise FileNotFoundError(f"{folder}: no recorded shards; record some with scripts/record_doom.py first")
    frames, mouse, btn, segment, offset = [], [], [], [], 0
    for path in shards:
        stem = str(path).removesuffix("frames.npy")
        parts = {
            kind: torch.from_numpy(np.load(f"{stem}{kind}.npy", allow_pickle=False))
            for kind in ("frames", "buttons", "mouse", "segment")
        }
        frames.append(parts["frames"].to(device).permute(0, 3, 1, 2))
        mouse.append(parts["mouse"].float())
        btn.append(parts["buttons"].float())
        ids = parts["segment"].long()
        segment.append(ids - ids.min() + offset)
        offset = int(segment[-1].max()) + 1
    controls = Controls(*(torch.cat(part).to(device) for part in (mouse, btn, segment)))
    return torch.cat(frames), controls


class SequenceBank:
    """Random sequences of ``length`` latents with their controls.

    Args:
        latents: ``[T, C, S, S]``, in the model's scale.
        controls: of the same frames.
        length: frames per sequence.
    """

    def __init__(self, latents: Tensor, controls: Controls, length: int) -> None:
        self.latents, self.controls, self.length = latents, controls, length
        same = controls.segment[: -(length - 1)] == controls.segment[length - 1 :]
        self.starts = same.nonzero().squeeze(1)
        if not len(self.starts):
            raise ValueError(f"no recorded segment is {length} frames long: record longer episodes")

    def sample(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``latents [B, N, C, S, S]`` float32, ``mouse [B, N, 2]`` and ``btn [B, N, 11]``."""
        device = self.starts.device
        start = self.starts[torch.randint(len(self.starts), (batch,), device=device)]
        index = start[:, None] + torch.arange(self.length, device=device)
        return self.latents[index].float(), self.controls.mouse[index], self.controls.btn[index]


class _Ticks(Dataset[int]):
    """An endless-looking dataset of step numbers: batches are drawn on the device, not by a loader."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:
        return index

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


def ticks() -> DataLoader[int]:
    """A loader that only counts steps, for Lightning's fit loop."""
    return DataLoader(_Ticks(), batch_size=None, shuffle=False)
