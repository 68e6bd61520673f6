"""Device code of ``kernel=triton``: products of activations with packed MX weights, and MX encoding of activations.

Needs the package triton; import it through ``harness.kernels.triton.ops``. Layouts are those of
``harness.kernels.triton.packing``. Sizes: M activation rows, N outputs (NP with padding), K inputs (padded), all blocks
powers of two.

Two products, both exact up to the order of float32 summation:

* ``gemm_bf16`` decodes weights to BF16 in registers, the block scale folded into the one multiplication that decoding
  needs (an element's bits, moved into place, are a BF16 that is off by a power of two, also where it is subnormal).
* ``gemm_fp8`` multiplies E4M3 by E4M3 on the FP8 tensor cores, one MX block of 32 at a time, and scales each partial
  product by the two blocks' powers of two in float32. E2M1 becomes E4M3 by moving bits.

Both can split K over programs. Each then leaves its partial sums in memory, and the last one to arrive at a tile
(counted by ``arrived``, which it sets back to 0) adds them up in a fixed order: the result is the same every time.

NATIVE is False where Triton's interpreter runs the kernels: it knows no inline assembly, multiplies BF16 as if it
were integers, and rounds to BF16 carelessly.
"""

# Triton's language, not Python's: no annotations of tensors, and a ternary would evaluate both sides.
# mypy: ignore-errors
# ruff: noqa: SIM108

import triton
import triton.language as tl

from harness.kernels.triton.blocks import code_values, e2m1_values, encode_blocks, fp8_codes, fp8_values, scale_values


@triton.jit
def to_bf16(value, NATIVE: tl.constexpr):
    """BF16 of float32, ties to even."""
    if NATIVE:
        return value.to(tl.bfloat16)
    else:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def block_bytes(scales, columns):
    """Scale byte [rows, columns] for int32 words [rows] that hold the scales of four consecutive blocks."""
    return (scales[:, None] >> ((columns // 32) * 8)[None, :]) & 0xFF


@triton.jit
def narrow_factor(scale, SPARE: tl.constexpr):
    """BF16 2^(scale - 127 + SPARE) from scale bytes, for scale + SPARE in 1 … 254."""
    return ((scale + SPARE) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode8(byte, scale, ELEMENT: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr):
    """BF16 values of E4M3 or E5M2 bytes under E8M0 scale bytes of the same shape.

    WIDE takes every byte and scale there is. The narrow way spares 2^120 (E4M3) or 2^112 (E5M2) of the range and
    must not meet NaN or infinity.
    """
    if WIDE:
        wide = byte.to(tl.int32)
        if ELEMENT == "e4m3":
            value = fp8_values(wide, 3, 7)
            value = tl.where((wide & 0x7F) == 0x7F, float("nan"), value)
        else:
            value = fp8_values(wide, 2, 15)
            value = tl.where((wide & 0x7F) == 0x7C, value * float("inf"), value)
            value = tl.where((wide & 0x7F) > 0x7C, float("nan"), value)
        return to_bf16(value * scale_values(scale), NATIVE)
    elif NATIVE:
        # Per 32-bit register, four bytes become two pairs of BF16: bytes to upper halves, magnitude shifted down.
        if ELEMENT == "e4m3":
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c, d, z;
                mov.b32 z, 0x80008000;
                prmt.b32 a, $2, 0, 0x1404;
                prmt.b32 b, $2, 0, 0x3424;
                shr.u32 c, a, 4;
                shr.u32 d, b, 4;
                and.b32 c, c, 0x07f007f0;
                and.b32 d, d, 0x07f007f0;
                lop3.b32 c, a, z, c, 0xEA;
                lop3.b32 d, b, z, d, 0xEA;
                fma.rn.bf16x2 $0, c, $3, z;
                fma.rn.bf16x2 $1, d, $4, z;
                }
                """,
                "=r,=r,r,r,r",
                [byte, narrow_factor(scale, 120)],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c, d, z;
                mov.b32 z, 0x80008000;
                prmt.b32 a, $2, 0, 0x1404;
                prmt.b32 b, $2, 0, 0x3424;
                shr.u32 c, a, 3;
                shr.u32 d, b, 3;
                and.b32 c, c, 0x0fe00fe0;
                and.b32 d, d, 0x0fe00fe0;
                lop3.b32 c, a, z, c, 0xEA;
                lop3.b32 d, b, z, d, 0xEA;
                fma.rn.bf16x2 $0, c, $3, z;
                fma.rn.bf16x2 $1, d, $4, z;
                }
                """,
                "=r,=r,r,r,r",
                [byte, narrow_factor(scale, 112)],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=4,
            )
    else:
        half = byte.to(tl.uint16)
        if ELEMENT == "e4m3":
            bits = ((half & 0x80) << 8) | ((half & 0x7F) << 4)
            factor = narrow_factor(scale, 120)
        else:
            bits = ((half & 0x80) << 8) | ((half & 0x7F) << 5)
            factor = narrow_factor(scale, 112)
        value = bits.to(tl.bfloat16, bitcast=True)
        return to_bf16(value.to(tl.float32) * factor.to(tl.float32), NATIVE)


@triton.jit
def nibble_to_bf16(nibble, scale, WIDE: tl.constexpr, NATIVE: tl.constexpr):
    """BF16 values of E2M1 codes 0 … 15 (int32) under E8M0 scale bytes of the same shape."""
    value = e2m1_values(nibble)
    if WIDE:
        factor = scale_values(scale)
    else:
        factor = (scale << 23).to(tl.float32, bitcast=True)
    return to_bf16(value * factor, NATIVE)


@triton.jit
def decode4(byte, low, high, WIDE: tl.constexpr, NATIVE: tl.constexpr):
    """BF16 values of the low and of the high nibbles, with their scale bytes ``low`` and ``high``.

    The narrow way spares 2^126 of the range: scale bytes up to 128.
    """
    if WIDE or not NATIVE:
        wide = byte.to(tl.int32)
        return nibble_to_bf16(wide & 15, low, WIDE, NATIVE), nibble_to_bf16(wide >> 4, high, WIDE, NATIVE)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, e, z;
            mov.b32 z, 0x80008000;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 c, a, 6;
            shl.b32 d, a, 12;
            and.b32 c, c, 0x01c001c0;
            lop3.b32 c, d, z, c, 0xEA;
            fma.rn.bf16x2 $0, c, $5, z;
            shl.b32 c, b, 6;
            shl.b32 d, b, 12;
            and.b32 c, c, 0x01c001c0;
            lop3.b32 c, d, z, c, 0xEA;
            fma.rn.bf16x2 $1, c, $6, z;
            shl.b32 c, a, 2;
            shl.b32 d, a, 8;
            and.b32 c, c, 0x01c001c0;
            lop3.b32 c, d, z, c, 0xEA;
            fma.rn.bf16x2 $2, c, $7, z;
            shl.b32 c, b, 2;
            shl.b32 d, b, 8;
            and.b32 c, c, 0x01c001c0;
            lop3.b32 c, d, z, c, 0xEA;
            fma.rn.bf16x2 $3, c, $8, z;
            }
            """,
            "=r,=r,=r,=r,r,r,r,r,r",
            [byte, narrow_factor(low, 126), narrow_factor(high, 126)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def nibbles_to_e4m3(byte, NATIVE: tl.constexpr):
    """E4M3 of the low and of the high nibbles' E2M1 values, times 2^-6 (exact, subnormal ones included)."""
    if NATIVE:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 c, d;
            shl.b32 c, $2, 2;
            shl.b32 d, $2, 4;
            and.b32 c, c, 0x1c1c1c1c;
            lop3.b32 $0, d, 0x80808080, c, 0xEA;
            shr.u32 c, $2, 2;
            and.b32 c, c, 0x1c1c1c1c;
            lop3.b32 $1, $2, 0x80808080, c, 0xEA;
            }
            """,
            "=&r,=r,r",
            [byte],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((byte & 8) << 4) | ((byte & 7) << 2)
        high = (byte & 0x80) | ((byte & 0x70) >> 2)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def multiply(acc, x, w, SWAP: tl.constexpr, NATIVE: tl.constexpr):
    """``acc + x @ w.T``, or its transpose if SWAP (weights are then the tensor cores' 64-row operand)."""
    if not NATIVE:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, tl.trans(x), acc)
    else:
        return tl.dot(x, tl.trans(w), acc)


@triton.jit
def epilogue(
    acc,
    out,
    bias,
    partial,
    arrived,
    M,
    N,
    rows_m,
    rows_n,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Store a tile [BM, BN], or, with split K, its partial sums; the last program of a tile adds those up."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    keep = (rows_m[:, None] < M) & (rows_n[None, :] < N)
    last = True
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        slices = partial + tile * (SPLIT * BM * BN) + inside
        tl.store(slices + tl.program_id(2) * (BM * BN), acc)
        tl.debug_barrier()  # every thread's part is written before one thread announces it
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.load(slices, cache_modifier=".cg")
            for k in tl.static_range(1, SPLIT):
                acc += tl.load(slices + k * (BM * BN), cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + rows_m[:, None] * N + rows_n[None, :], to_bf16(acc, NATIVE), mask=keep)


@triton.jit
def gemm_bf16(
    x,
    weight,
    scales,
    bias,
    out,
    partial,
    arrived,
    M,
    N,
    NP,
    K,
    tiles,
    ELEMENT: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``out[M, N] = x[M, K] @ weight.T + bias``, weights decoded to BF16.

    ``x`` and ``out`` BF16; ``weight`` uint8 [tiles, NP, WIDTH] and ``scales`` int32 [blocks/4, NP] packed in tiles of
    64 or 128 bytes; ``partial`` float32, SPLIT tiles for every output tile; ``arrived`` int32, 0 for every output tile.
    Grid: (tiles of N, tiles of M, SPLIT).
    """
    rows_n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows_m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    columns = tl.arange(0, WIDTH)
    per_word = 128 // WIDTH  # tiles that a word of scales covers
    real = rows_m[:, None] < M
    x_tile = x + rows_m[:, None] * K + columns[None, :]
    w_tile = weight + rows_n[:, None] * WIDTH + columns[None, :]
    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    other = acc  # of the second half of K: two dots in a row on one accumulator get layouts that do not agree
    for t in range(tiles * part // SPLIT, tiles * (part + 1) // SPLIT):
        w = tl.load(w_tile + t * NP * WIDTH, eviction_policy="evict_first")
        inside = columns + (t % per_word) * WIDTH
        low = block_bytes(tl.load(scales + (t // per_word) * NP + rows_n), inside)
        x_low = tl.load(x_tile + t * WIDTH, mask=real, other=0.0)
        if ELEMENT == "e2m1":
            # A byte's low nibble belongs to the first half of K, its high nibble to the second.
            high = block_bytes(tl.load(scales + ((tiles + t) // per_word) * NP + rows_n), inside)
            x_high = tl.load(x_tile + (tiles + t) * WIDTH, mask=real, other=0.0)
            w_low, w_high = decode4(w, low, high, WIDE, NATIVE)
            acc = multiply(acc, x_low, w_low, SWAP, NATIVE)
            other = multiply(other, x_high, w_high, SWAP, NATIVE)
        else:
            acc = multiply(acc, x_low, decode8(w, low, ELEMENT, WIDE, NATIVE), SWAP, NATIVE)
    if ELEMENT == "e2m1":
        acc += other
    if SWAP:
        acc = tl.trans(acc)
    epilogue(acc, out, bias, partial, arrived, M, N, rows_m, rows_n, HAS_BIAS, SPLIT, NATIVE)


@triton.jit
def block_product(acc, x, x_scale, w, w_scale, SWAP: tl.constexpr, NATIVE: tl.constexpr):
    """Add the product of one MX block of K, scaled, to ``acc``."""
    zero = tl.zeros(acc.shape, tl.float32)
    if SWAP:
        return acc + multiply(zero, x, w, SWAP, NATIVE) * (w_scale[:, None] * x_scale[None, :])
    else:
        return acc + multiply(zero, x, w, SWAP, NATIVE) * (x_scale[:, None] * w_scale[None, :])


@triton.jit
def weight_scale(words, i: tl.constexpr, SPARE: tl.constexpr, WIDE: tl.constexpr):
    """float32 scale of block ``i`` of the four in int32 ``words``, times 2^SPARE."""
    byte = (words >> (8 * i)) & 0xFF
    if WIDE:
        return scale_values(byte) * (1 << SPARE)
    else:
        return ((byte + SPARE) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gemm_fp8(
    x,
    x_scales,
    weight,
    scales,
    bias,
    out,
    partial,
    arrived,
    M,
    N,
    NP,
    tiles,
    ELEMENT: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``out[M, N] = x[M, K] @ weight.T + bias``, MX by MX on FP8 tensor cores.

    ``x`` E4M3 bytes [K/32, M, 32] with ``x_scales`` float32 [K/32, M]; ``weight`` uint8 [4 * tiles, NP, 32] and
    ``scales`` int32 [blocks/4, NP] packed in tiles of 32 bytes, of which a step of the loop takes four; the rest, and
    the grid, as in ``gemm_bf16``.
    """
    rows_n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows_m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    columns = tl.arange(0, 32)
    real = rows_m < M
    x_tile = x + rows_m[:, None] * 32 + columns[None, :]
    w_tile = weight + rows_n[:, None] * 32 + columns[None, :]
    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for t in range(tiles * part // SPLIT, tiles * (part + 1) // SPLIT):
        low = tl.load(scales + t * NP + rows_n)
        if ELEMENT == "e2m1":
            high = tl.load(scales + (tiles + t) * NP + rows_n)
        for i in tl.static_range(4):
            block = t * 4 + i
            w = tl.load(w_tile + block * NP * 32, eviction_policy="evict_first")
            x_low = tl.load(x_tile + block * M * 32, mask=real[:, None], other=0).to(tl.float8e4nv, bitcast=True)
            s_low = tl.load(x_scales + block * M + rows_m, mask=real, other=0.0)
            if ELEMENT == "e2m1":
                upper = block + tiles * 4
                x_high = tl.load(x_tile + upper * M * 32, mask=real[:, None], other=0).to(tl.float8e4nv, bitcast=True)
                s_high = tl.load(x_scales + upper * M + rows_m, mask=real, other=0.0)
                w_low, w_high = nibbles_to_e4m3(w, NATIVE)
                acc = block_product(acc, x_low, s_low, w_low, weight_scale(low, i, 6, WIDE), SWAP, NATIVE)
                acc = block_product(acc, x_high, s_high, w_high, weight_scale(high, i, 6, WIDE), SWAP, NATIVE)
            else:
                w_fp8 = w.to(tl.float8e4nv, bitcast=True)
                acc = block_product(acc, x_low, s_low, w_fp8, weight_scale(low, i, 0, WIDE), SWAP, NATIVE)
    if SWAP:
        acc = tl.trans(acc)
    epilogue(acc, out, bias, partial, arrived, M, N, rows_m, rows_n, HAS_BIAS, SPLIT, NATIVE)


@triton.jit
def quantise_rows(
    x,
    elements,
    scales,
    decoded,
    M,
    K,
    blocks,
    ELEMENT: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DECODE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Encode BF16 ``x`` [M, K] to MX blocks along K as ``harness.formats.mx.encode`` does, ROWS blocks a program.

    With DECODE, ``decoded`` BF16 [M, K] takes the values; else ``elements`` uint8 [K/32, M, 32] takes them as E4M3
    (E2M1 values are E4M3 values too) and ``scales`` float32 [K/32, M] the scales. ``blocks`` = M * K / 32.
    """
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, 32)
    real = (block < blocks)[:, None]
    source = block[:, None] * 32 + columns[None, :]
    # A BF16 is a float32's upper half (and Triton's interpreter would convert subnormal ones wrongly).
    halves = tl.load(x + source, mask=real, other=0.0).to(tl.uint16, bitcast=True).to(tl.int32)
    values = (halves << 16).to(tl.float32, bitcast=True)
    codes, exponent = encode_blocks(values, ELEMENT, MAX, EMAX, THRESHOLD)
    scale = scale_values(exponent)
    scaled = code_values(codes, ELEMENT)
    if DECODE:
        tl.store(decoded + source, to_bf16(scaled * scale, NATIVE), mask=real)
    else:
        m = block // (K // 32)
        k = block % (K // 32)
        target = (k * M + m)[:, None] * 32 + columns[None, :]
        if ELEMENT == "e4m3":
            stored = codes
        else:
            stored = fp8_codes(scaled, 3, 7)
        tl.store(elements + target, stored.to(tl.uint8), mask=real)
        tl.store(scales + (k * M + m)[:, None], scale, mask=real)
