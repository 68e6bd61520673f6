"""Attention for training: a plain block-causal sequence, and the two-stream layout of the few-step phase.

In the two-stream layout the sequence holds N context frames, then the same N frames again as targets. A context frame
sees context frames up to itself; target frame i sees context frames before i and itself. One pass so trains every
frame exactly as the two-step sampler meets it: the context stream is step 2 (and the cache), the target stream step 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


class StreamAttention:
    """An ``Attend`` over 1 or 2 streams of frames: FlexAttention on CUDA, masked SDPA elsewhere.

    Args:
        windows: per layer, in frames, the current one included.
        frames: frames per stream.
        tokens: tokens per frame.
        streams: 1 = block-causal sequence, 2 = context and target streams.
        device: where to build the masks.
    """

    def __init__(self, windows: list[int], frames: int, tokens: int, streams: int, device: torch.device) -> None:
        self.windows = windows
        self.flex = device.type == "cuda"
        length = streams * frames * tokens
        build = self._block_mask if self.flex else self._dense_mask
        self.masks = {window: build(window, frames, tokens, length, device) for window in set(windows)}

    @staticmethod
    def _visible(q: Tensor, kv: Tensor, window: int, frames: int, tokens: int) -> Tensor:
        q_frame, kv_frame = q // tokens, kv // tokens
        q_target, kv_target = q_frame >= frames, kv_frame >= frames
        age = q_frame % frames - kv_frame % frames
        in_context = ~kv_target & (age < window) & torch.where(q_target, age > 0, age >= 0)
        return in_context | (q_target & kv_target & (age == 0))

    @classmethod
    def _block_mask(cls, window: int, frames: int, tokens: int, length: int, device: torch.device) -> object:
        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return cls._visible(q, kv, window, frames, tokens)

        return create_block_mask(mask_mod, None, None, length, length, device=device)

    @classmethod
    def _dense_mask(cls, window: int, frames: int, tokens: int, length: int, device: torch.device) -> Tensor:
        index = torch.arange(length, device=device)
        return cls._visible(index[:, None], index[None, :], window, frames, tokens)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend under this layer's mask; see :class:`harness.models.attention.Attend`."""
        mask = self.masks[self.windows[layer]]
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.flex:
            return flex_attention(q, k, v, block_mask=mask)  # type: ignore[return-value, call-overload]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # type: ignore[arg-type]
