"""MX blocks in registers: decoding, and encoding exactly as :func:`harness.formats.mx.encode` does.

Formats are compile-time strings: "plain" (unquantised), "e4m3", "e5m2", "e2m1", and "i8", whose scales are BF16
(not "int8": Triton, which keeps constants as text, reads that back as its type of that name).
A tile has one row per token.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def scale_values(byte):
    """E8M0 bytes as float32: 2^(byte - 127), NaN for 255."""
    word = byte.to(tl.int32)
    bits = tl.where(word == 0, 0x00400000, word << 23)  # 2^-127 is subnormal
    return tl.where(word == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_values(code):
    """4-bit codes as float32: the magnitude's bits are a float's lowest exponent bits and its first fraction bit."""
    word = code.to(tl.int32)
    bits = ((word & 7) << 22) | ((word & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126: the difference of the exponents' biases


@triton.jit
def rescale(values, scales, ROWS: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr):
    """Float32 ``values [ROWS, WIDTH]`` times ``scales [ROWS, SCALES]``, each for an equal run of columns."""
    runs = tl.reshape(values, (ROWS, SCALES, WIDTH // SCALES))
    return tl.reshape(runs * scales[:, :, None], (ROWS, WIDTH))


@triton.jit
def decode_bytes(elements, factors, FORMAT: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, SCALES: tl.constexpr):
    """8-bit ``elements [ROWS, DIM]`` times float32 ``factors [ROWS, SCALES]``, float32; exact."""
    if FORMAT == "i8":
        values = elements.to(tl.float32)
    elif FORMAT == "e4m3":
        values = elements.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        values = elements.to(tl.float8e5, bitcast=True).to(tl.float32)
    return rescale(values, factors, ROWS, DIM, SCALES)


@triton.jit
def decode_nibbles(elements, factors, ROWS: tl.constexpr, DIM: tl.constexpr, SCALES: tl.constexpr):
    """E2M1 ``elements [ROWS, DIM / 2]``: the even and the odd columns, float32 ``[ROWS, DIM / 2]`` each."""
    even = rescale(e2m1_values(elements & 0xF), factors, ROWS, DIM // 2, SCALES)
    odd = rescale(e2m1_values(elements >> 4), factors, ROWS, DIM // 2, SCALES)
    return even, odd


@triton.jit
def round_even(x):
    """Round float32 ``x``, ``0 <= x < 2^22``, to the nearest integer, ties to even."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: no fraction bit is left


@triton.jit
def biased_exponent(amax, EMAX: tl.constexpr, THRESHOLD: tl.constexpr):
    """E8M0 byte (int32) from a block's largest magnitude (float32 bits as int32; NaN if the block holds one).

    ``THRESHOLD``: fraction bits above which the scale is one step larger; see ``formats._biased_exponent``.
    """
    exponent = (amax >> 23) - EMAX + tl.where((amax & 0x7FFFFF) > THRESHOLD, 1, 0)
    return tl.where(amax >= 0x7F800000, 255, tl.maximum(exponent, 0))


@triton.jit
def reciprocal(exponent):
    """1 / the scale of a byte that encoding gives: at most 253, or 255 for NaN, whose reciprocal is 0."""
    return tl.where(exponent == 255, 0, (254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_codes(x):
    """4-bit codes (int32) of float32 ``x`` within [-6, 6]; NaN becomes 0."""
    bits = x.to(tl.int32, bitcast=True)
    a = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0.0, tl.abs(x))
    code = tl.minimum(round_even(a * 2), tl.minimum(round_even(a) + 2, round_even(a * 0.5) + 4))
    return code.to(tl.int32) | ((bits >> 28) & 8)


@triton.jit
def fp8_codes(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """8-bit codes (int32) of float32 ``x`` within the format's range, as torch rounds; NaN becomes 0x7F."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Round the fraction to nearest even by a carry into what stays; then move the exponent to its new bias.
    normal = (magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number codes count its fractions.
    small = magnitude < ((128 - BIAS) << 23)
    a = tl.where(small, tl.abs(x), 0.0)
    subnormal = round_even(a * (1 << (BIAS + MANTISSA - 1))).to(tl.int32)
    code = tl.where(small, subnormal, normal)
    return tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)


@triton.jit
def fp8_values(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Float32 of finite 8-bit codes (int32), by arithmetic that every GPU has."""
    FACTOR: tl.constexpr = 1.329227995784916e36 if BIAS == 7 else 5.192296858534828e33  # 2^(127 - BIAS)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << (23 - MANTISSA))
    return bits.to(tl.float32, bitcast=True) * FACTOR


@triton.jit
def encode_blocks(x, FORMAT: tl.constexpr, LARGEST: tl.constexpr, EMAX: tl.constexpr, THRESHOLD: tl.constexpr):
    """Codes (int32, one a value) and E8M0 bytes (int32, ``[..., 1]``) of float32 blocks ``x [..., 32]``."""
    # Magnitudes order like their bits, NaN above infinity: an integer maximum never loses a NaN.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scales = biased_exponent(tl.max(magnitude, len(x.shape) - 1, keep_dims=True), EMAX, THRESHOLD)
    scaled = x * reciprocal(scales)
    scaled = tl.where(scaled != scaled, scaled, tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST))
    if FORMAT == "e2m1":
        codes = e2m1_codes(scaled)
    elif FORMAT == "e4m3":
        codes = fp8_codes(scaled, 3, 7)
    else:
        codes = fp8_codes(scaled, 2, 15)
    return codes, scales


@triton.jit
def code_values(codes, FORMAT: tl.constexpr):
    """Float32 of the finite codes that :func:`encode_blocks` gives."""
    if FORMAT == "e2m1":
        values = e2m1_values(codes)
    elif FORMAT == "e4m3":
        values = fp8_values(codes, 3, 7)
    else:
        values = fp8_values(codes, 2, 15)
    return values


@triton.jit
def encode_tile(
    x,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    EMAX: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Quantise float32 ``x [ROWS, DIM]``: element bytes ``[ROWS, DIM]`` (E2M1: ``[ROWS, DIM / 2]``), scale bytes."""
    codes, exponents = encode_blocks(tl.reshape(x, (ROWS, DIM // 32, 32)), FORMAT, LARGEST, EMAX, THRESHOLD)
    scales = tl.reshape(exponents, (ROWS, DIM // 32))
    if FORMAT == "e2m1":
        low, high = tl.split(tl.reshape(codes, (ROWS, DIM // 2, 2)))
        elements = (low | (high << 4)).to(tl.uint8)
    else:
        elements = tl.reshape(codes, (ROWS, DIM)).to(tl.uint8)
    return elements, scales.to(tl.uint8)
