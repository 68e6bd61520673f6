"""Attention of one frame with our kernels: reads the ring as it is stored, packed or plain, and copies nothing.

Host side of ``harness.rollout.kernels``: one operator that torch.compile takes as it is and a CUDA graph captures.
``window_attention`` is QK norm, rotation, softmax attention of a frame's queries to the ring beside its own,
unquantised K and V, and these into the ring, quantised as it is: one launch a layer.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.formats.mx import FORMATS, carry_threshold
from harness.formats.scales import ScaleMode
from harness.kernels import launch
from harness.kv.codecs import HeadEMACodec, Int8Codec, MXCodec
from harness.kv.storage import FrameRing, PlainRing, QuantisedRing
from harness.models.gamerft import RMS_EPS

OWN_ROWS = 128
"""Rows of the window that take about as long as a frame's own K and V, which are normalised, rotated and stored."""

OWN_ELEMENTS = 4096
"""Elements of a tile of the frame's own K or V: what is quantised in registers."""

WARPS = 4
"""Of a program: one warpgroup, what 64 queries occupy."""

EMPTY = -1
"""What stands in place of a split's sums until they are there: bits of a NaN that no arithmetic gives."""

MAX_COMBINERS = 8
"""Programs of a head that combine its splits' sums, a share of the queries each."""

POLLS = 64
"""Times, at least 1, a program asks for the others' sums, half a microsecond each, before it asks whether all others
have begun: ten times what they differ by where all are at work."""

MAX_QUERIES = 64
"""Queries of one program; 64 rows are what one warpgroup multiplies at a time."""


@dataclass(frozen=True)
class WindowConfig:
    """How the window is shared out; the defaults were fastest on an H100 (``scripts/bench_attention.py --sweep``).

    Attributes:
        waves: programs per multiprocessor that a window is at most split for: enough to hide latency, few enough to
            combine, and all of them at work at the same time, since they wait for each other. Before Hopper, where
            fewer find room, it is 1 whatever this says.
        block_rows: rows of the window in a tile: larger ones wait less often and take more registers.
        stages: tiles in flight per program, one more of heads above 64.
        min_rows: rows of the window, of heads of 64, that are worth a split of their own: fewer cost less to read than
            their sums to combine. Larger heads need as many more.
        held: tiles of heads up to 64 that a program reads into registers while its queries are still computed, where
            kernels begin early, that is on Hopper. Of larger heads registers hold none beside the rest.
    """

    waves: int = 2
    block_rows: int = 64
    stages: int = 2
    min_rows: int = 96
    held: int = 2

    def as_ints(self) -> list[int]:
        """For an operator's signature."""
        return list(astuple(self))


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
        """Whether ``window_attention`` can store into it."""
        return self.scale_mode is not None


def ring_view(ring: FrameRing) -> RingView:
    """How the kernels see ``ring``. Raises ``ValueError`` for a storage that they do not know."""
    if isinstance(ring, PlainRing):
        return RingView(ring.data, None, "plain", "block", ScaleMode.rceil)
    if isinstance(ring, QuantisedRing):
        codec = ring.codec
        if isinstance(codec, HeadEMACodec):
            return RingView(*ring.stored, codec.fmt.name, "frame", None)
        if isinstance(codec, MXCodec):
            return RingView(*ring.stored, codec.fmt.name, "block", codec.scale_mode)
        if isinstance(codec, Int8Codec):
            return RingView(*ring.stored, "i8", "token", None)
    raise ValueError(f"attention=fused does not know the storage {ring.format_name}; use attention=sdpa")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter: a few splits, so that combining them is exercised
    return torch.cuda.get_device_properties(device).multi_processor_count


def _waves(device: torch.device, config: WindowConfig) -> int:
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return config.waves if hopper else 1


class Shape(NamedTuple):
    """Launch shape: ``splits`` programs for a head and each of its ``query_blocks`` blocks of ``block_m`` queries.

    Each reads ``share`` tiles of ``block_n`` rows. The last also reads what is no whole tile, ``rest`` rows with
    padding (0 if nothing is left), and takes the frame's own in tiles of ``own``. ``combiners`` of a block's programs
    combine what its splits have found, a share of the queries each.
    """

    splits: int
    share: int
    query_blocks: int
    block_m: int
    block_n: int
    rest: int
    own: int
    combiners: int


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _query_rows(tokens: int) -> int:
    return min(_padded(tokens), MAX_QUERIES)


def launch_shape(
    frames: int,
    tokens: int,
    dim: int,
    programs: int,
    device: torch.device,
    config: WindowConfig = WindowConfig(),
) -> Shape:
    """How a window of ``frames`` frames, the current one included, is shared out where ``programs`` = B*H read one."""
    block_m, past = _query_rows(tokens), (frames - 1) * tokens
    query_blocks, own = math.ceil(tokens / block_m), min(_padded(tokens), OWN_ELEMENTS // dim)
    block_n = min(config.block_rows, _padded(past)) if past else config.block_rows
    tiles, rest = divmod(past, block_n)
    extra = math.ceil(OWN_ROWS / block_n) + (rest > 0)  # what the last split has to do beside its share, in tiles
    places = _waves(device, config) * _multiprocessors(device)
    wanted = min(places // (programs * query_blocks), 1 + past // max(1, config.min_rows * dim // 64))
    share = math.ceil((tiles + extra) / max(1, wanted))
    splits = max(1, math.ceil(tiles / share))
    last = tiles - (splits - 1) * share
    if tiles and last + extra > share and splits < wanted:
        splits += 1  # the frame's own by themselves
    combiners = min(1 << (splits.bit_length() - 1), MAX_COMBINERS, block_m // 8)
    return Shape(splits, share, query_blocks, block_m, block_n, _padded(rest) if rest else 0, own, combiners)


def stages(dim: int, config: WindowConfig = WindowConfig()) -> int:
    """Tiles in flight per program of heads of ``dim``."""
    return config.stages + (dim > 64)


def held_tiles(frames: int, tokens: int, dim: int, shape: Shape, device: torch.device, config: WindowConfig) -> int:
    """Tiles that every program has in registers before its queries are there."""
    early = device.type != "cuda" or launch.dependent(device)
    tiles = (frames - 1) * tokens // shape.block_n
    return min(config.held, shape.share) if early and tiles and dim <= 64 else 0


class Meeting(NamedTuple):
    """Where programs of one head leave what they have found, and count how many have begun, or arrived.

    Launches that may run at the same time, on different streams, need one each.

    Attributes:
        parts: int32 ``[n]``, see ``kernels.window``: float32 bits, or :data:`EMPTY`.
        arrived: int32 ``[2, blocks of queries, B*H]``: counts, zeros between launches, and epochs.
    """

    parts: Tensor
    arrived: Tensor


def meeting(
    windows: Iterable[int],
    tokens: int,
    dim: int,
    programs: int,
    device: torch.device,
    config: WindowConfig | None = None,
) -> Meeting:
    """One for windows of so many frames, the current one included, where ``programs`` = B*H read one."""
    how = WindowConfig() if config is None else config
    splits = max(launch_shape(frames, tokens, dim, programs, device, how).splits for frames in windows)
    size = splits * programs * tokens * (dim + 1) if splits > 1 else 0
    blocks = math.ceil(tokens / _query_rows(tokens))
    with torch.inference_mode(False):  # they outlive the mode they are made in
        parts = torch.full((size,), EMPTY, dtype=torch.int32, device=device)
        return Meeting(parts, torch.zeros(2, blocks, programs, dtype=torch.int32, device=device))


def encoding(store: bool, fmt: str, mode: str) -> tuple[bool, float, int, int]:
    """Compile-time arguments that say how the kernel encodes."""
    if fmt == "plain" or not store:
        return store, 0.0, 0, 0
    element = FORMATS[fmt]
    return store, element.max, element.emax, carry_threshold(element, ScaleMode(mode))


@torch.library.custom_op(
    "harness_mx::window_attention", mutates_args=("k_ring", "k_scales", "v_ring", "v_scales", "parts", "arrived")
)
def window_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_ring: Tensor,
    k_scales: Tensor | None,
    v_ring: Tensor,
    v_scales: Tensor | None,
    slot: Tensor,
    parts: Tensor,
    arrived: Tensor,
    k_format: str,
    k_per: str,
    k_store: bool,
    v_format: str,
    v_per: str,
    v_store: bool,
    scale_mode: str,
    config: list[int],
    keep_k: bool,
    turn_k: bool,
    turn_v: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of one frame to the R - 1 other frames of a ring and to its own K and V, from its projection on.

    Queries and keys are RMS-normalised and rotated; the frame's own K and V stand unquantised in place of what the ring
    holds in ``slot``, and are stored there where told to.

    Args:
        qkv: contiguous ``[B, P, 3*H*Dh]``, what the fused projection gives.
        cos: float32 ``[P, Dh/2]``, contiguous.
        sin: likewise.
        k_ring: ``[B, H, R, P, width]``, contiguous, written in place; see :class:`RingView` for this and the formats.
        k_scales: its scales, None if it is plain.
        v_ring: likewise.
        v_scales: likewise.
        slot: int64 ``[1]`` on the device.
        parts: see :class:`Meeting`, of this window or of longer ones.
        arrived: likewise.
        k_format: "plain", "e4m3", "e5m2", "e2m1" or "i8".
        k_per: what has a scale of its own: see ``kernels.window.load_factors``.
        k_store: whether K goes into its ring, which must be plain or have a scale per block.
        v_format: likewise.
        v_per: likewise.
        v_store: likewise.
        scale_mode: a :class:`ScaleMode`.
        config: :meth:`WindowConfig.as_ints`, or empty for the defaults.
        keep_k: also return K, for a ring that the kernel cannot store into.
        turn_k: K's ring is in the Hadamard basis, see :meth:`harness.kv.KVCache.turned`; Dh is a power of two.
        turn_v: V's ring is.

    Returns:
        ``(out [B, P, H*Dh], k)``, k ``[B, H, P, Dh]``, normalised, rotated and in its ring's basis, if asked for, else
        empty.

    Raises:
        ValueError: when ``parts`` is too small.
    """
    from harness.kernels.triton.window import window_kernel

    (batch, tokens), (heads, frames) = qkv.shape[:2], k_ring.shape[1:3]
    dim, programs = qkv.shape[2] // (3 * heads), batch * heads
    how = WindowConfig(*config)
    shape = launch_shape(frames, tokens, dim, programs, qkv.device, how)
    out, own_k = _results(qkv, heads, keep_k)
    needed = shape.splits * programs * tokens * (dim + 1)
    if shape.splits > 1 and parts.numel() < needed:
        raise ValueError(f"attention=fused: parts holds {parts.numel()} numbers, a window of {frames} frames {needed}")
    dependent = launch.dependent(qkv.device)
    # An argument that is not used still needs a tensor of some kind.
    k_scales, v_scales = (slot if scales is None else scales for scales in (k_scales, v_scales))
    window_kernel[shape.splits, programs, shape.query_blocks](
        qkv, cos, sin, k_ring, k_scales, v_ring, v_scales, slot, out, own_k, parts, arrived,
        math.log2(math.e) / math.sqrt(dim), programs,
        heads, frames, tokens, dim, RMS_EPS, shape.share, shape.splits,
        k_format, k_per, *encoding(k_store, k_format, scale_mode),
        v_format, v_per, *encoding(v_store, v_format, scale_mode),
        keep_k, turn_k, turn_v, shape.block_m, shape.block_n, shape.rest, shape.own,
        shape.combiners, EMPTY, POLLS if qkv.is_cuda else 1, dependent,
        held_tiles(frames, tokens, dim, shape, qkv.device, how),
        num_warps=WARPS, num_stages=stages(dim, how), **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
    return out, own_k


def _results(qkv: Tensor, heads: int, keep_k: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    dim = width // (3 * heads)
    return qkv.new_empty(batch, tokens, heads * dim), qkv.new_empty(batch if keep_k else 0, heads, tokens, dim)


@window_attention.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, k_ring: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _results(qkv, k_ring.shape[1], keep_k=others[-3])


def check_head_dim(head_dim: int) -> None:
    """Raise ``ValueError`` unless the kernels take heads of this size."""
    if head_dim not in (32, 64, 128):
        raise ValueError(f"attention=fused: head size {head_dim}; the kernels take 32, 64 or 128. Use attention=sdpa")
