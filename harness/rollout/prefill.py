"""Prefill with our kernels: a history's frames go through the layers as a frame does, and leave K and V in the rings.

Torch's masked attention reads a mask of all pairs of tokens and takes four times as long; norms, rotation and encoding
in torch's operators take as long again. Host side of ``harness.kernels.triton.prefill``.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from harness.formats.scales import ScaleMode
from harness.kv import KVCache
from harness.kv.conf import TENSORS
from harness.models.gamerft import RMS_EPS, BlockModulation, GameRFTCore, Modulation, gated
from harness.models.world import WorldModel
from harness.rollout.fused import encoding, ring_view
from harness.rollout.steps import Rotary, rounds_inputs, through_layer_fused

BLOCK_M, BLOCK_N, WARPS, STAGES = 128, 64, 8, 3
"""Queries and keys of a tile, and how a program runs: what suits a head of 64 on Hopper."""

ELEMENTS = 4096
"""Elements of a tile that is normalised, rotated and encoded in registers."""


def fits(core: WorldModel) -> TypeGuard[GameRFTCore]:
    """Whether ``core``'s layers can run so: none of them quantises what a norm gives it."""
    return isinstance(core, GameRFTCore) and not any(
        rounds_inputs(block.attn.qkv) or rounds_inputs(block.mlp.fc1) for block in core.blocks
    )


class HistoryAttention:
    """Attention of a history to itself from the projection on, and its newest K and V into one layer's rings.

    Args:
        cache: the rings of all layers.
        windows: frames each layer attends to, the current one included; None: no limit.
        causal: whether frames see only themselves and earlier ones.
        first: absolute index of the oldest frame.
    """

    def __init__(self, cache: KVCache, windows: list[int | None], causal: bool, first: int) -> None:
        self.cache, self.windows, self.causal, self.first = cache, windows, causal, first

    def projected(self, layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        """``[B*N, P, H*Dh]`` from ``qkv [B*N, P, 3*H*Dh]``, frames of B clips; see ``ProjectedAttend``."""
        batch, tokens = self.cache.batch, self.cache.tokens
        frames = qkv.shape[0] // batch
        q, k = self._heads(layer, qkv, frames, rotary)
        heads, dim = q.shape[1], q.shape[3]
        out = qkv.new_empty(batch * frames, tokens, heads * dim)
        window = self.windows[layer] or frames
        history_attention(q, k, qkv, out, frames, window, self.causal)
        return out

    def _heads(self, layer: int, qkv: Tensor, frames: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, H, N*P, Dh]``, normalised and rotated; K and V of the newest frames are stored."""
        from harness.kernels.triton.prefill import heads_kernel

        cache, rings = self.cache, self.cache.rings[layer]
        views = {name: ring_view(ring) for name, ring in rings.items()}
        key, value = views["k"], views["v"]
        (heads, kept), tokens = key.data.shape[1:3], cache.tokens
        dim = qkv.shape[2] // (3 * heads)
        q, k = (qkv.new_empty(cache.batch, heads, frames * tokens, dim) for _ in range(2))
        mode = key.scale_mode or value.scale_mode or ScaleMode.rceil
        rows = min(max(16, 1 << (tokens - 1).bit_length()), ELEMENTS // dim)
        scales = [self.cache.frame if view.scales is None else view.scales for view in (key, value)]
        heads_kernel[frames * math.ceil(tokens / rows), cache.batch * heads](
            qkv, *rotary, q, k, key.data, scales[0], value.data, scales[1], self.first,
            heads, frames, kept, tokens, dim, RMS_EPS,
            key.format, *encoding(key.stores, key.format, mode.value),
            value.format, *encoding(value.stores, value.format, mode.value),
            *(cache.turns(name, layer) for name in TENSORS), rows, num_warps=4,
        )  # fmt: skip
        oldest = frames - kept
        if not key.stores:
            newest = k.unflatten(2, (frames, tokens))[:, :, oldest:]
            rings["k"].load(cache.turned("k", layer, newest), (self.first + oldest) % kept)
        if not value.stores:
            v = qkv.view(cache.batch, frames, tokens, 3, heads, dim)[:, oldest:, :, 2]
            v = cache.turned("v", layer, v.permute(0, 3, 1, 2, 4))
            rings["v"].load(v, (self.first + oldest) % kept)
        return q, k


def history_attention(q: Tensor, k: Tensor, qkv: Tensor, out: Tensor, frames: int, window: int, causal: bool) -> None:
    """Fill ``out [B, N*P, H*Dh]`` with masked attention of ``q`` to ``k``, ``[B, H, N*P, Dh]``, values from ``qkv``."""
    from harness.kernels.triton.prefill import prefill_kernel

    batch, heads, length, dim = q.shape
    block_m = min(BLOCK_M, max(16, 1 << (length - 1).bit_length()))
    prefill_kernel[math.ceil(length / block_m), batch * heads](
        q, k, qkv, out, math.log2(math.e) / math.sqrt(dim),
        heads, frames, length // frames, dim, window, causal, block_m, min(BLOCK_N, block_m),
        num_warps=WARPS if block_m == BLOCK_M else 4, num_stages=STAGES,
    )  # fmt: skip


def prefill_fused(
    core: GameRFTCore, cache: KVCache, x: Tensor, modulation: Modulation, rotary: Rotary, first: int
) -> Tensor:
    """:meth:`GameRFTCore.denoise` of a history ``x [B, N, C, S, S]``, which leaves its K and V in ``cache``.

    Args:
        core: a model that :func:`fits`.
        cache: for B clips.
        x: noised latents.
        modulation: of the N frames.
        rotary: of frames ``first`` … ``first + N - 1``.
        first: absolute index of the oldest frame.

    Returns:
        The velocity, ``[B, N, C, S, S]`` in the model's dtype.

    Raises:
        ValueError: if a layer's ring would hold frames that never were.
    """
    batch, frames = x.shape[:2]
    cache.check_history(frames)
    windows = [core.layer_window(layer) for layer in range(core.cfg.n_layers)]
    attend = HistoryAttention(cache, windows, core.cfg.causal, first)
    tokens = core.embed(x).unflatten(1, (frames, -1)).flatten(0, 1)  # a frame of a clip is a clip here
    branch = torch.zeros_like(tokens)
    mods = [BlockModulation(*(v.flatten(0, 1)[:, None] for v in block)) for block in modulation.blocks]
    gate = mods[0].mlp_gate  # of a branch of zeros
    for block, mod in zip(core.blocks, mods, strict=True):
        tokens, branch = through_layer_fused(block, attend, tokens, branch, gate, mod, rotary)
        gate = mod.mlp_gate
    tokens = (tokens + gated(branch, gate)).unflatten(0, (batch, frames)).flatten(1, 2)
    cache.loaded(first + frames - 1)
    return core.velocity(tokens, modulation.out_scale, modulation.out_shift)
