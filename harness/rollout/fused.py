"""Attention of one frame with our kernels: reads the ring as it is stored, packed or plain, and copies nothing.

Host side of ``harness.rollout.kernels``: two operators that torch.compile takes as they are and a CUDA graph captures.

| operator | does |
|---|---|
| ``window_attention`` | softmax attention of a frame's queries to the ring beside its own, unquantised K and V |
| ``frame_heads`` | QK norm, rotation, and the frame's K and V into the ring, quantised as the ring is |
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.kv.codecs import HeadEMACodec, Int8Codec, MXCodec
from harness.kv.storage import FrameRing, PlainRing, QuantisedRing
from harness.models.gamerft import RMS_EPS
from harness.mx.conf import ScaleMode
from harness.mx.formats import FORMATS, carry_threshold

WAVES = 2
"""Programs per multiprocessor that a window is split for: enough to hide latency, few enough to combine."""

STAGES, WARPS = 3, 4
"""Tiles in flight per program, and its warps: one warpgroup, which is what 64 queries occupy."""

MAX_QUERIES = 64
"""Queries of one program; 64 rows are what one warpgroup multiplies at a time."""


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``; None if they can (Triton's interpreter runs them on a CPU)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"it is made of Triton kernels, which need a CUDA GPU; this run is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"it needs FP8 conversions (sm_89 or newer); this GPU is sm_{major}{minor}"
    return None


class RingView(NamedTuple):
    """A ring as the kernels take it.

    ``data [B, H, R, P, width]``; ``scales`` None if it is plain; ``format`` and ``per`` as in ``kernels.window``;
    ``scale_mode``: how to encode, None if the kernels cannot encode this storage (they read all of them).
    """

    data: Tensor
    scales: Tensor | None
    format: str
    per: str
    scale_mode: ScaleMode | None

    @property
    def stores(self) -> bool:
        """Whether ``frame_heads`` can store into it."""
        return self.scale_mode is not None


def ring_view(ring: FrameRing) -> RingView:
    """How the kernels see ``ring``. Raises ``TypeError`` for a storage that they do not know."""
    if isinstance(ring, PlainRing):
        return RingView(ring.data, None, "plain", "block", ScaleMode.rceil)
    if isinstance(ring, QuantisedRing):
        codec = ring.codec
        if isinstance(codec, HeadEMACodec):
            return RingView(*ring.stored, codec.fmt.name, "frame", None)
        if isinstance(codec, MXCodec):
            return RingView(*ring.stored, codec.fmt.name, "block", codec.scale_mode)
        if isinstance(codec, Int8Codec):
            return RingView(*ring.stored, "int8", "token", None)
    raise TypeError(f"attention=fused does not know the storage {ring.format_name}; use attention=sdpa")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # Triton's interpreter: a few splits, so that combining them is exercised
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_for(tiles: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many splits of how many tiles each a window of ``tiles`` gets, where ``programs`` share it already."""
    wanted = max(1, WAVES * _multiprocessors(device) // programs)
    share = math.ceil(tiles / min(wanted, tiles))
    return math.ceil(tiles / share), share


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@torch.library.custom_op("mx_harness::window_attention", mutates_args=())
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ring: Tensor,
    k_scales: Tensor | None,
    v_ring: Tensor,
    v_scales: Tensor | None,
    slot: Tensor,
    k_format: str,
    k_per: str,
    v_format: str,
    v_per: str,
) -> Tensor:
    """Softmax attention of ``q [B, H, P, Dh]`` to the R - 1 other frames of a ring and to the frame's own ``k, v``.

    Args:
        q: queries, scaled by 1/sqrt(Dh) here. Like k and v any strides but a last one of 1.
        k: the frame's own keys ``[B, H, P, Dh]``, in place of what the ring holds in ``slot``.
        v: its values, likewise.
        k_ring: ``[B, H, R, P, width]``, contiguous; see :class:`RingView` for this and the formats.
        k_scales: its scales, None if it is plain.
        v_ring: likewise.
        v_scales: likewise.
        slot: int64 ``[1]`` on the device.
        k_format: see ``kernels.window``.
        k_per: see ``kernels.window``.
        v_format: see ``kernels.window``.
        v_per: see ``kernels.window``.

    Returns:
        ``[B, H, P, Dh]``, in memory ``[B, P, H, Dh]``, so that heads merge without a copy.
    """
    from harness.rollout.kernels.window import combine_kernel, window_kernel

    batch, heads, tokens, dim = q.shape
    frames, programs = k_ring.shape[2], batch * heads
    block_m, block_n = (min(_padded(tokens), limit) for limit in (MAX_QUERIES, 64))
    query_blocks, tiles = math.ceil(tokens / block_m), frames * math.ceil(tokens / block_n)
    splits, share = splits_for(tiles, programs * query_blocks, q.device)
    out = q.new_empty(batch, tokens, heads, dim)
    sums = out if splits == 1 else q.new_empty(splits, programs, tokens, dim, dtype=torch.float32)
    stats = out if splits == 1 else q.new_empty(2, splits, programs, tokens, dtype=torch.float32)
    # An argument that is not used still needs a tensor of some kind.
    k_scales, v_scales = (slot if scales is None else scales for scales in (k_scales, v_scales))
    window_kernel[splits, programs, query_blocks](
        q, k, v, k_ring, k_scales, v_ring, v_scales, slot, out, sums, stats,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        math.log2(math.e) / math.sqrt(dim), programs,
        heads, frames, tokens, dim, share, splits, k_format, k_per, v_format, v_per, block_m, block_n,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if splits > 1:
        rows, block = programs * tokens, 4
        combine_kernel[(math.ceil(rows / block),)](
            sums, stats, out, rows, heads, tokens, dim, splits, _padded(splits), block, num_warps=2
        )
    return out.transpose(1, 2)


@window_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def encoding(store: bool, fmt: str, mode: str) -> tuple[bool, str, float, int, int]:
    """Compile-time arguments that say how the kernel encodes."""
    if fmt == "plain" or not store:
        return store, "plain", 0.0, 0, 0
    element, never = FORMATS[fmt], 1 << 23
    threshold = never if mode == ScaleMode.floor else carry_threshold(element, ScaleMode(mode))
    return store, fmt, element.max, element.emax, threshold


@torch.library.custom_op("mx_harness::frame_heads", mutates_args=("k_ring", "k_scales", "v_ring", "v_scales"))
def frame_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_ring: Tensor,
    k_scales: Tensor | None,
    v_ring: Tensor,
    v_scales: Tensor | None,
    slot: Tensor,
    store_k: bool,
    store_v: bool,
    k_format: str,
    v_format: str,
    scale_mode: str,
) -> tuple[Tensor, Tensor]:
    """RMS-normalised, rotated queries and keys of one frame; its K and V also into ``slot`` of their rings.

    Args:
        qkv: contiguous ``[B, P, 3*H*Dh]``, what the fused projection gives.
        cos: float32 ``[P, Dh/2]``, contiguous.
        sin: likewise.
        k_ring: ``[B, H, R, P, width]``, contiguous, written in place; see :class:`RingView`.
        k_scales: its scales (one per block), None if it is plain.
        v_ring: likewise.
        v_scales: likewise.
        slot: int64 ``[1]`` on the device.
        store_k: whether K goes into its ring.
        store_v: whether V goes into its ring.
        k_format: "plain", "e4m3", "e5m2" or "e2m1"; ignored if K is not stored.
        v_format: likewise.
        scale_mode: a :class:`ScaleMode`.

    Returns:
        ``(q, k)``, contiguous ``[B, H, P, Dh]``.
    """
    from harness.rollout.kernels.heads import heads_kernel

    (batch, tokens), (heads, frames) = qkv.shape[:2], k_ring.shape[1:3]
    dim, rows = qkv.shape[2] // (3 * heads), 8
    q, k = (qkv.new_empty(batch, heads, tokens, dim) for _ in range(2))
    k_scales, v_scales = (slot if scales is None else scales for scales in (k_scales, v_scales))
    heads_kernel[math.ceil(tokens / rows), batch * heads](
        qkv, cos, sin, q, k, k_ring, k_scales, v_ring, v_scales, slot,
        heads, frames, tokens, dim, RMS_EPS,
        *encoding(store_k, k_format, scale_mode), *encoding(store_v, v_format, scale_mode),
        scale_mode == ScaleMode.rceil, rows, num_warps=1,
    )  # fmt: skip
    return q, k


@frame_heads.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, k_ring: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = qkv.shape[0], k_ring.shape[1], qkv.shape[1]
    shape = (batch, heads, tokens, qkv.shape[2] // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


def check_head_dim(head_dim: int) -> None:
    """Raise ``ValueError`` unless the kernels take heads of this size."""
    if head_dim not in (32, 64, 128):
        raise ValueError(f"attention=fused: head size {head_dim}; the kernels take 32, 64 or 128. Use attention=sdpa")
