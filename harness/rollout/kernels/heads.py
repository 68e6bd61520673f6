"""From a layer's fused projection to rotated queries and keys, and the frame's K and V into the ring."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from harness.rollout.kernels.blocks import encode_tile


@triton.jit
def rotated(even, odd, cos, sin, dtype: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr):
    """RMS norm over the head, then rotation of pairs into concatenated halves; rounds where the eager model does."""
    mean = (tl.sum(even * even, 1) + tl.sum(odd * odd, 1)) / DIM
    norm = tl.rsqrt(mean + EPS)[:, None]
    even = (even * norm).to(dtype).to(tl.float32)
    odd = (odd * norm).to(dtype).to(tl.float32)
    pair = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (ROWS, DIM)).to(dtype)


@triton.jit
def store_tile(
    x,
    data,
    scales,
    rows,
    ok,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    EMAX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    RCEIL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Put ``x [ROWS, DIM]`` into rows of a ring, quantised as its format says."""
    if FORMAT == "plain":
        tl.store(data + rows[:, None] * DIM + tl.arange(0, DIM)[None, :], x, mask=ok[:, None])
    else:
        elements, scale = encode_tile(x.to(tl.float32), FORMAT, LARGEST, EMAX, THRESHOLD, RCEIL, ROWS, DIM)
        WIDTH: tl.constexpr = DIM // 2 if FORMAT == "e2m1" else DIM
        tl.store(data + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], elements, mask=ok[:, None])
        blocks = tl.arange(0, DIM // 32)
        tl.store(scales + rows[:, None] * (DIM // 32) + blocks[None, :], scale, mask=ok[:, None])


@triton.jit
def heads_kernel(
    qkv,
    cos,
    sin,
    q_out,
    k_out,
    k_ring,
    k_scales,
    v_ring,
    v_scales,
    slot,
    HEADS: tl.constexpr,
    FRAMES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_STORE: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_EMAX: tl.constexpr,
    K_THRESHOLD: tl.constexpr,
    V_STORE: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_EMAX: tl.constexpr,
    V_THRESHOLD: tl.constexpr,
    RCEIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (blocks of tokens, B*H). Contiguous ``qkv [B, TOKENS, 3*HEADS*DIM]``, ``cos, sin [TOKENS, DIM/2]`` float32.

    Writes ``q_out, k_out [B, H, TOKENS, DIM]`` and, where told to store, slot ``slot`` of the rings
    ``[B, H, FRAMES, TOKENS, width]``.
    """
    head_row = tl.program_id(1).to(tl.int64)
    batch, head = head_row // HEADS, head_row % HEADS
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = token < TOKENS
    column, pair = tl.arange(0, DIM), tl.arange(0, DIM // 2)
    dtype: tl.constexpr = qkv.dtype.element_ty
    source = qkv + ((batch * TOKENS + token) * (3 * HEADS) + head)[:, None] * DIM + column[None, :]
    angle = token[:, None] * (DIM // 2) + pair[None, :]
    cosine = tl.load(cos + angle, mask=ok[:, None], other=0.0)
    sine = tl.load(sin + angle, mask=ok[:, None], other=0.0)
    target = (head_row * TOKENS + token)[:, None] * DIM + column[None, :]

    x = tl.load(source, mask=ok[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
    tl.store(q_out + target, rotated(even, odd, cosine, sine, dtype, ROWS, DIM, EPS), mask=ok[:, None])

    x = tl.load(source + HEADS * DIM, mask=ok[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
    key = rotated(even, odd, cosine, sine, dtype, ROWS, DIM, EPS)
    tl.store(k_out + target, key, mask=ok[:, None])

    rows = (head_row * FRAMES + tl.load(slot)) * TOKENS + token
    if K_STORE:
        store_tile(key, k_ring, k_scales, rows, ok, K_FORMAT, K_LARGEST, K_EMAX, K_THRESHOLD, RCEIL, ROWS, DIM)
    if V_STORE:
        value = tl.load(source + 2 * HEADS * DIM, mask=ok[:, None], other=0.0)
        store_tile(value, v_ring, v_scales, rows, ok, V_FORMAT, V_LARGEST, V_EMAX, V_THRESHOLD, RCEIL, ROWS, DIM)
