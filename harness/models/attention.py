"""The interface between the model and whatever holds K and V, and the masked attention of a full pass."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention of one layer, given its fresh projections.

    All tensors are ``[B, H, T, Dh]``; ``q`` and ``k`` are already RMS-normalised and rotated. Implementations
    decide which keys and values the queries see: the same sequence under a mask, or a cached window.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax attention of ``q`` over this layer's keys and values, ``[B, H, T, Dh]``."""
        ...


class ProjectedAttend(Protocol):
    """Attention of one layer that takes its projection as it comes and normalises and rotates in its own way."""

    def projected(self, layer: int, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attention ``[B, T, D]`` from the fused projection ``qkv [B, T, 3*D]`` and ``(cos, sin) [T, Dh/2]``."""
        ...


LayerAttend = Attend | ProjectedAttend
"""What a layer of the model may be given."""


def frame_mask(frames: int, tokens: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Boolean mask ``[T, T]`` (True = attend) over ``T = frames * tokens`` tokens.

    A query in frame ``fq`` sees keys of frame ``fkv`` when ``|fq - fkv| < window`` (``None``: no limit) and, if
    ``causal``, ``fkv <= fq``. Attention inside a frame is full.
    """
    frame = torch.arange(frames * tokens, device=device) // tokens
    distance = frame[:, None] - frame[None, :]
    mask = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
    return mask & (distance >= 0) if causal else mask


class BlockCausalAttention:
    """Attention of a whole sequence of frames under each layer's causal, windowed block mask.

    Args:
        windows: window of each layer in frames, current frame included; ``None`` = unlimited.
        tokens: tokens per frame.
        causal: whether frames see only themselves and earlier frames.
    """

    def __init__(self, windows: list[int | None], tokens: int, causal: bool = True) -> None:
        self.windows = windows
        self.tokens = tokens
        self.causal = causal
        self._masks: dict[tuple[int, int | None, torch.device], Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within the sequence; see :class:`Attend`."""
        frames = q.shape[2] // self.tokens
        key = (frames, self.windows[layer], q.device)
        if key not in self._masks:
            self._masks[key] = frame_mask(frames, self.tokens, self.windows[layer], self.causal, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._masks[key])
