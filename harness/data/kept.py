"""Latents of recorded frames, kept from run to run: encoding a clip's context takes half as long as a rollout of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness.files.digest import Digest
from harness.files.kept import StaleError, Store
from harness.models.dcae import DCAEEncoder

ROOMS = ("files", "models")
"""Rooms of this package whose code decides what an encoder gives."""
LIMIT = 1 << 28
"""Bytes of latents that are kept."""


class KeptEncoder(nn.Module):
    """An encoder that has encoded the same frames before gives what it gave then.

    Args:
        encoder: in inference.
        folder: of what is kept.
        machine: whatever else the last bit depends on.

    Found again by a SHA-256 of its weights, its shape, the frames, ``machine`` and the code.
    """

    def __init__(self, encoder: DCAEEncoder, folder: Path, machine: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.store = encoder, Store(folder, LIMIT)
        self._digest = (
            Digest().tensors(encoder.state_dict()).settings(cfg=asdict(encoder.cfg), machine=machine).code(ROOMS)
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Map ``[n, 3, h, w]`` in [-1, 1] to latents.

        Raises:
            OSError: if they cannot be kept.
        """
        cfg, key = self.encoder.cfg, self._digest.copy().tensors({"frames": frames}).hex()
        shape = len(frames), cfg.latent_channels, cfg.latent_size, cfg.latent_size
        try:
            if (found := self.store.find(key, {"latents": (shape, frames.dtype)})) is not None:
                return found[0]["latents"].to(frames.device)
        except StaleError as error:
            print(f"encoding again: {error}")
        latents: Tensor = self.encoder(frames)
        self.store.keep(key, {"latents": latents}, "")
        return latents
