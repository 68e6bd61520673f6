"""A frame's own queries, keys and values: QK norm and rotation in registers, and into the ring as it stores them."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from harness.kernels.triton.blocks import encode_tile


@triton.jit
def rotated(x, cos, sin, ROWS: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr):
    """``x [ROWS, DIM]``, RMS-normalised over the head, then its pairs rotated into concatenated halves.

    ``cos, sin [ROWS, DIM/2]`` float32. Rounds where the eager model does.
    """
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, DIM // 2, 2)))
    mean = (tl.sum(even * even, 1) + tl.sum(odd * odd, 1)) / DIM
    norm = tl.rsqrt(mean + EPS)[:, None]
    even = (even * norm).to(x.dtype).to(tl.float32)
    odd = (odd * norm).to(x.dtype).to(tl.float32)
    pair = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (ROWS, DIM)).to(x.dtype)


@triton.jit
def turned(x, DIM: tl.constexpr):
    """``x [ROWS, DIM]`` in the orthonormal Hadamard basis, or back from it, float32; DIM is a power of two up to 128.

    The signs are exact in any dtype; the product is scaled after it is summed.
    """
    SCALE: tl.constexpr = DIM**-0.5
    place = tl.arange(0, DIM)
    parity = place[:, None] & place[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = (1 - 2 * (parity & 1)).to(x.dtype)
    return tl.dot(x, signs, input_precision="ieee") * SCALE


@triton.jit
def load_rows(part, token, ok, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """Rows ``token`` of a head's queries, keys or values, ``STRIDE`` elements apart; 0 where not ``ok``."""
    return tl.load(part + token[:, None] * STRIDE + tl.arange(0, DIM)[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def load_angles(cos, sin, token, ok, DIM: tl.constexpr):
    """Rows ``token`` of ``cos, sin [TOKENS, DIM/2]`` float32."""
    place = token[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :]
    return tl.load(cos + place, mask=ok[:, None], other=0.0), tl.load(sin + place, mask=ok[:, None], other=0.0)


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
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Put ``x [ROWS, DIM]`` into rows of a ring, quantised as its format says."""
    if FORMAT == "plain":
        tl.store(data + rows[:, None] * DIM + tl.arange(0, DIM)[None, :], x, mask=ok[:, None])
    else:
        elements, scale = encode_tile(x.to(tl.float32), FORMAT, LARGEST, EMAX, THRESHOLD, ROWS, DIM)
        WIDTH: tl.constexpr = DIM // 2 if FORMAT == "e2m1" else DIM
        tl.store(data + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], elements, mask=ok[:, None])
        blocks = tl.arange(0, DIM // 32)
        tl.store(scales + rows[:, None] * (DIM // 32) + blocks[None, :], scale, mask=ok[:, None])
