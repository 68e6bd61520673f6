"""Attention of one frame to its window: a ring, packed or plain, beside the frame's own K and V.

Split over the window (split-KV, as in Flash-Decoding, Dao et al. 2023): each program reads a share of the window
for one head and leaves unnormalised sums; a second kernel combines them. A share is a run of tiles in order of age,
oldest first: frame ``slot + 1`` of the ring, around to ``slot - 1``, then the frame itself, which stands in for the
stale slot. Packed tiles are decoded in registers; the window is nowhere unpacked in memory.

E2M1 packs neighbouring columns into a byte. Rather than interleaving them again, which moves data between threads,
K's even and odd columns meet those of the queries in two products, and V's fill two accumulators.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from harness.rollout.kernels.blocks import decode_bytes, decode_nibbles


@triton.jit
def even_odd(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Even and odd columns of ``x [ROWS, DIM]``."""
    return tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))


@triton.jit
def halves_of(x, PAIRED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """``x`` twice, or its even and odd columns if ``PAIRED``."""
    if PAIRED:
        first, second = even_odd(x, ROWS, DIM)
    else:
        first, second = x, x
    return first, second


@triton.jit
def load_tile(
    data,
    scales,
    rows,
    ok,
    FORMAT: tl.constexpr,
    PER: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows of a ring as ``DTYPE``: all columns (twice), or for E2M1 the even and the odd ones.

    ``PER``: what has a scale of its own, a "block" of 32 columns, a "token" or a "frame" of ``TOKENS`` rows.
    """
    if FORMAT == "plain":
        first = tl.load(data + rows[:, None] * DIM + tl.arange(0, DIM)[None, :], mask=ok[:, None], other=0.0)
        second = first
    else:
        SCALES: tl.constexpr = DIM // 32 if PER == "block" else 1
        place = rows // TOKENS if PER == "frame" else rows
        column = tl.arange(0, SCALES)
        scale = tl.load(scales + place[:, None] * SCALES + column[None, :], mask=ok[:, None], other=0)
        if FORMAT == "e2m1":
            bytes = tl.arange(0, DIM // 2)
            packed = tl.load(data + rows[:, None] * (DIM // 2) + bytes[None, :], mask=ok[:, None], other=0)
            first, second = decode_nibbles(packed, scale, ROWS, DIM, SCALES)
        else:
            columns = tl.arange(0, DIM)
            elements = tl.load(data + rows[:, None] * DIM + columns[None, :], mask=ok[:, None], other=0)
            first = decode_bytes(elements, scale, FORMAT, ROWS, DIM, SCALES)
            second = first
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def attend_tile(
    q0, q1, k0, k1, v0, v1, ok, top, total, sum0, sum1, scale, K_PAIRED: tl.constexpr, V_PAIRED: tl.constexpr
):
    """One step of the online softmax (base 2; Milakov & Gimelshein 2018) over a tile of keys."""
    scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if K_PAIRED:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
    scores = tl.where(ok[None, :], scores * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    keep = tl.exp2(top - new_top)
    total = total * keep + tl.sum(p, 1)
    weights = p.to(v0.dtype)
    sum0 = tl.dot(weights, v0, sum0 * keep[:, None], input_precision="ieee")
    if V_PAIRED:
        sum1 = tl.dot(weights, v1, sum1 * keep[:, None], input_precision="ieee")
    return new_top, total, sum0, sum1


@triton.jit
def window_kernel(
    q,
    k,
    v,
    k_ring,
    k_scales,
    v_ring,
    v_scales,
    slot,
    out,
    sums,
    stats,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    scale,
    programs,
    HEADS: tl.constexpr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_PER: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_PER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (splits, B*H, blocks of queries).

    ``q, k, v [B, H, TOKENS, DIM]`` by their strides, last one 1; rings ``[B, H, FRAMES, TOKENS, width]``. ``SHARE``
    tiles a split. With one split writes ``out [B, TOKENS, H, DIM]``, else float32 ``sums [SPLITS, B*H, TOKENS, DIM]``
    and ``stats [2, SPLITS, B*H, TOKENS]`` (running maximum, running total). ``programs`` is B*H; ``scale`` includes
    log2(e).
    """
    K_PAIRED: tl.constexpr = K_FORMAT == "e2m1"
    V_PAIRED: tl.constexpr = V_FORMAT == "e2m1"
    V_WIDTH: tl.constexpr = DIM // 2 if V_PAIRED else DIM
    TILES: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N  # of a frame
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    queries = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, DIM)
    asked = queries < TOKENS
    q += batch * q_batch + head * q_head
    q_tile = tl.load(q + queries[:, None] * q_token + columns[None, :], mask=asked[:, None], other=0.0)
    q0, q1 = halves_of(q_tile, K_PAIRED, BLOCK_M, DIM)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sum0 = tl.zeros((BLOCK_M, V_WIDTH), tl.float32)
    sum1 = tl.zeros((BLOCK_M, V_WIDTH), tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    first, stop = split * SHARE, (split + 1) * SHARE
    oldest = tl.load(slot).to(tl.int32) + 1
    ring = row * (FRAMES * TOKENS)
    for tile in range(first, tl.minimum(stop, (FRAMES - 1) * TILES)):
        frame = oldest + tile // TILES
        frame = tl.where(frame >= FRAMES, frame - FRAMES, frame)
        token = tile % TILES * BLOCK_N + lanes
        ok = token < TOKENS
        rows = ring + frame * TOKENS + token
        k0, k1 = load_tile(k_ring, k_scales, rows, ok, K_FORMAT, K_PER, BLOCK_N, DIM, TOKENS, q.dtype.element_ty)
        v0, v1 = load_tile(v_ring, v_scales, rows, ok, V_FORMAT, V_PER, BLOCK_N, DIM, TOKENS, q.dtype.element_ty)
        top, total, sum0, sum1 = attend_tile(
            q0, q1, k0, k1, v0, v1, ok, top, total, sum0, sum1, scale, K_PAIRED, V_PAIRED
        )
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    for tile in range(tl.maximum(first, (FRAMES - 1) * TILES), tl.minimum(stop, FRAMES * TILES)):
        token = tile % TILES * BLOCK_N + lanes
        ok = token < TOKENS
        own_k = tl.load(k + token[:, None] * k_token + columns[None, :], mask=ok[:, None], other=0.0)
        own_v = tl.load(v + token[:, None] * v_token + columns[None, :], mask=ok[:, None], other=0.0)
        k0, k1 = halves_of(own_k, K_PAIRED, BLOCK_N, DIM)
        v0, v1 = halves_of(own_v, V_PAIRED, BLOCK_N, DIM)
        top, total, sum0, sum1 = attend_tile(
            q0, q1, k0, k1, v0, v1, ok, top, total, sum0, sum1, scale, K_PAIRED, V_PAIRED
        )
    if V_PAIRED:  # noqa: SIM108 (a compile-time branch)
        result = tl.reshape(tl.join(sum0, sum1), (BLOCK_M, DIM))
    else:
        result = sum0
    if SPLITS == 1:
        out += (batch * TOKENS * HEADS + head) * DIM
        values = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + queries[:, None] * (HEADS * DIM) + columns[None, :], values, mask=asked[:, None])
    else:
        place = (split * programs + row) * TOKENS
        tl.store(sums + (place + queries[:, None]) * DIM + columns[None, :], result, mask=asked[:, None])
        tl.store(stats + place + queries, top, mask=asked)
        tl.store(stats + (SPLITS * programs * TOKENS + place) + queries, total, mask=asked)


@triton.jit
def combine_kernel(
    sums,
    stats,
    out,
    rows,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax over the whole window from each split's; grid (blocks of rows), ``rows`` is B*H*TOKENS.

    ``sums [SPLITS, rows, DIM]``, ``stats [2, SPLITS, rows]``, ``out [B, TOKENS, H, DIM]``.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    split = tl.arange(0, SPLITS_PADDED)
    both = (split < SPLITS)[:, None] & ok[None, :]
    tops = tl.load(stats + split[:, None] * rows + row[None, :], mask=both, other=float("-inf"))
    totals = tl.load(stats + (SPLITS + split[:, None]) * rows + row[None, :], mask=both, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(tl.exp2(tops - top[None, :]) * totals, 0)
    columns = tl.arange(0, DIM)
    result = tl.zeros((BLOCK, DIM), tl.float32)
    for index in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(stats + index * rows + row, mask=ok, other=float("-inf")) - top)
        part = tl.load(sums + (index * rows + row[:, None]) * DIM + columns[None, :], mask=ok[:, None], other=0.0)
        result += part * weight[:, None]
    head, token = row // TOKENS % HEADS, row % TOKENS
    place = ((row // (TOKENS * HEADS) * TOKENS + token) * HEADS + head) * DIM
    values = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] + columns[None, :], values, mask=ok[:, None])
