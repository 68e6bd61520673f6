"""Attention of a whole history, from its projection on: into the rings, and to itself under a causal, windowed mask.

As in :mod:`harness.kernels.triton.window`, scores of normalised queries and keys need no running maximum.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from harness.kernels.triton.heads import load_angles, load_rows, rotated, store_tile, turned


@triton.jit(do_not_specialize=["first"])
def heads_kernel(
    qkv,
    cos,
    sin,
    queries,
    keys,
    k_ring,
    k_scales,
    v_ring,
    v_scales,
    first,
    HEADS: tl.constexpr,
    FRAMES: tl.constexpr,
    KEPT: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_STORE: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_EMAX: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_STORE: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_EMAX: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    K_TURN: tl.constexpr,
    V_TURN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (frames and their blocks of ``ROWS`` tokens, B*H). Contiguous ``qkv [B, FRAMES*TOKENS, 3*HEADS*DIM]``.

    Queries and keys, normalised and rotated, to ``queries, keys [B, H, FRAMES*TOKENS, DIM]``; keys and values of the
    newest ``KEPT`` frames into rings ``[B, H, KEPT, TOKENS, width]`` where told to store them, a frame into its
    absolute index modulo ``KEPT``. ``first``: absolute index of the oldest frame. ``K_TURN, V_TURN``: the ring is in
    the Hadamard basis.
    """
    BLOCKS: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    LENGTH: tl.constexpr = FRAMES * TOKENS
    frame, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    token = block * ROWS + tl.arange(0, ROWS)
    ok = token < TOKENS
    place = frame * TOKENS + token
    part = qkv + batch * (LENGTH * STRIDE) + head * DIM
    cosine, sine = load_angles(cos, sin, place, ok, DIM)
    target = (row * LENGTH + place)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    q = rotated(load_rows(part, place, ok, STRIDE, DIM), cosine, sine, ROWS, DIM, EPS)
    tl.store(queries + target, q, mask=ok[:, None])
    k = rotated(load_rows(part + HEADS * DIM, place, ok, STRIDE, DIM), cosine, sine, ROWS, DIM, EPS)
    tl.store(keys + target, k, mask=ok[:, None])
    if frame >= FRAMES - KEPT:
        slot = ((first + frame) % KEPT) * TOKENS + token
        if K_STORE:
            WIDTH_K: tl.constexpr = DIM // 2 if K_FORMAT == "e2m1" else DIM
            data = k_ring + row * (KEPT * TOKENS * WIDTH_K)
            scales = k_scales + row * (KEPT * TOKENS * (DIM // 32))
            if K_TURN:
                k = turned(k, DIM).to(k.dtype)
            store_tile(k, data, scales, slot, ok, K_FORMAT, K_LARGEST, K_EMAX, K_THRESHOLD, ROWS, DIM)
        if V_STORE:
            WIDTH_V: tl.constexpr = DIM // 2 if V_FORMAT == "e2m1" else DIM
            data = v_ring + row * (KEPT * TOKENS * WIDTH_V)
            scales = v_scales + row * (KEPT * TOKENS * (DIM // 32))
            v = load_rows(part + 2 * HEADS * DIM, place, ok, STRIDE, DIM)
            if V_TURN:
                v = turned(v, DIM).to(v.dtype)
            store_tile(v, data, scales, slot, ok, V_FORMAT, V_LARGEST, V_EMAX, V_THRESHOLD, ROWS, DIM)


@triton.jit
def attend_to(
    q,
    query_frame,
    keys,
    values,
    begin,
    end,
    total,
    sums,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    LENGTH: tl.constexpr,
    TOKENS: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add tiles ``begin`` to ``end`` of keys and values to the queries' totals and sums."""
    columns = tl.arange(0, DIM)
    for tile in range(begin, end):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if MASKED:
            inside = (place < LENGTH)[:, None]
            k = tl.load(keys + place[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
            v = tl.load(values + place[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(keys + place[:, None] * DIM + columns[None, :])
            v = tl.load(values + place[:, None] * STRIDE + columns[None, :])
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale)
        if MASKED:
            distance = query_frame[:, None] - (place // TOKENS)[None, :]
            seen = (place < LENGTH)[None, :] & (distance < WINDOW) & (distance > -WINDOW)
            if CAUSAL:
                seen = seen & (distance >= 0)
            p = tl.where(seen, p, 0.0)
        total += tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums, input_precision="ieee")
    return total, sums


@triton.jit
def prefill_kernel(
    queries,
    keys,
    qkv,
    out,
    scale,
    HEADS: tl.constexpr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (blocks of queries, B*H): ``queries, keys`` of :func:`heads_kernel`, values from ``qkv``, to
    ``out [B, FRAMES*TOKENS, H*DIM]``.

    A query sees keys whose frame is less than ``WINDOW`` away from its own and, if ``CAUSAL``, not later. ``scale``
    includes log2(e).
    """
    LENGTH: tl.constexpr = FRAMES * TOKENS
    STRIDE: tl.constexpr = 3 * HEADS * DIM
    # Blocks with most keys first, so that no long one is left alone at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = place < LENGTH
    columns = tl.arange(0, DIM)
    q = tl.load(queries + (row * LENGTH + place)[:, None] * DIM + columns[None, :], mask=asked[:, None], other=0.0)
    frame = place // TOKENS
    oldest, newest = block * BLOCK_M // TOKENS, tl.minimum(block * BLOCK_M + BLOCK_M, LENGTH) - 1
    newest = newest // TOKENS
    keys += row * (LENGTH * DIM)
    values = qkv + batch * (LENGTH * STRIDE) + (2 * HEADS + head) * DIM
    # Keys that some query sees, and those that every query sees; tiles of these need no mask.
    low = tl.maximum(oldest - WINDOW + 1, 0) * TOKENS
    high = tl.minimum(newest + 1 if CAUSAL else newest + WINDOW, FRAMES) * TOKENS
    all_low = tl.maximum(newest - WINDOW + 1, 0) * TOKENS
    all_high = tl.minimum(oldest + 1 if CAUSAL else oldest + WINDOW, FRAMES) * TOKENS
    begin, end = low // BLOCK_N, (high + BLOCK_N - 1) // BLOCK_N
    inner = tl.minimum((all_low + BLOCK_N - 1) // BLOCK_N, end)
    outer = tl.maximum(all_high // BLOCK_N, inner)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, DIM), tl.float32)
    for piece in tl.static_range(3):
        if piece == 0:
            first, last = begin, inner
        elif piece == 1:
            first, last = inner, outer
        else:
            first, last = outer, end
        total, sums = attend_to(
            q, frame, keys, values, first, last, total, sums, scale,
            piece != 1, CAUSAL, WINDOW, LENGTH, TOKENS, STRIDE, DIM, BLOCK_N,
        )  # fmt: skip
    target = out + (batch * LENGTH + place)[:, None] * (HEADS * DIM) + head * DIM + columns[None, :]
    tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=asked[:, None])
