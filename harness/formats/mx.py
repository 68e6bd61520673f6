"""The OCP Microscaling (MX) formats in plain torch: encode to, and decode from, blocks of 32 with one scale.

Source: OCP Microscaling Formats (MX) Specification v1.0 (https://www.opencompute.org, 2023).

A block is 32 consecutive values of the last dimension. It is stored as 32 elements P_i and one scale X,
and stands for the values X * P_i.

| part    | bits | layout              | largest            | special                       |
|---------|------|---------------------|--------------------|-------------------------------|
| E8M0    | 8    | 2^(byte - 127)      | 2^127 (byte 254)   | byte 255 is NaN; no zero      |
| E4M3    | 8    | s eeee mmm, bias 7  | 448                | S.1111.111 NaN; no infinity   |
| E5M2    | 8    | s eeeee mm, bias 15 | 57344              | S.11111.00 infinity, else NaN |
| E2M1    | 4    | s ee m, bias 1      | 6                  | none                          |

Storage is always ``torch.uint8``. Two E2M1 elements share a byte, the one with the lower index in the low
nibble, which is torchao's packing (``pack_uint4``) and that of ``torch.float4_e2m1fn_x2``.

What happens at the edges, by the specification:

* Elements round to nearest, ties to even, and saturate at the largest finite element. Subnormal elements
  are kept.
* Zero block: scale byte 0, elements 0 with their signs.
* NaN or infinity in a block: scale byte 255, so the whole block decodes to NaN: neither has a scale under which its
  neighbours could be told. The elements of such a block mean nothing; E2M1, which has no NaN, stores 0.
* Scales that would be less than 2^-127 (amax below 2^(emax - 127), about 1e-36 for E4M3) are 2^-127, byte 0, and the
  block is divided by just that, so that small values become small elements.
* ``rceil`` is exact here for every float32.

Where torchao 0.18, whose numbers these are otherwise, does something else (``tests/mx/test_mx_formats.py`` holds each):

* Byte 0: it divides by 2^-126 (by 1 in ``rceil``) yet stores byte 0, so such a block decodes to half its value (to 0 in
  ``rceil``).
* Infinity without NaN: it saturates, under scale byte 254 in ``rceil`` and 2^(128 - emax) in the other modes, and
  finite values beside it mostly vanish. Its pull request 4725 (2026) makes both as they are here.
* ``rceil``: its portable path takes ceil(log2(amax / max)) in float32, which is one step low for amax less than about
  1e-5 (relative) above max * 2^k. No BF16 value lies there.

Decoding to BF16 is exact: an element has at most 4 significant bits and the scale is a power of two. Only
the ends of the range differ: products beyond 3.39e38 become infinite (byte 254 with 448), those below 2^-133
are rounded (bytes 0 to 2 with the smallest E4M3). Decoding to float32 is exact but for overflow.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.formats.scales import BLOCK, ScaleMode

SCALE_NAN = 255
"""The E8M0 byte that stands for NaN."""

E8M0_BIAS = 127
"""The byte of an E8M0 scale is its exponent plus this."""

_MANTISSA = 0x7FFFFF  # the 23 fraction bits of a float32


class _Numbers(NamedTuple):
    bits: int
    max: float
    emax: int
    mantissa: int
    bias: int


_NUMBERS = {
    "e4m3": _Numbers(bits=8, max=448.0, emax=8, mantissa=3, bias=7),
    "e5m2": _Numbers(bits=8, max=57344.0, emax=15, mantissa=2, bias=15),
    "e2m1": _Numbers(bits=4, max=6.0, emax=2, mantissa=1, bias=1),
}


@dataclass(frozen=True)
class ElementFormat:
    """One MX element format, known by its name.

    Its numbers are looked up and not held: ``torch.compile`` makes a symbol of an attribute that differs from one
    compilation of the same code to the next, and Inductor computes with symbols in 64 bits, where the bits of a
    float32 no longer fit.
    """

    name: str

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return _NUMBERS[self.name].bits

    @property
    def max(self) -> float:
        """Largest finite value."""
        return _NUMBERS[self.name].max

    @property
    def emax(self) -> int:
        """Exponent of ``max``."""
        return _NUMBERS[self.name].emax

    @property
    def mantissa(self) -> int:
        """Fraction bits."""
        return _NUMBERS[self.name].mantissa

    @property
    def spare(self) -> int:
        """An element's bits read as BF16, from sign and exponent on, are its value times 2^-this."""
        return E8M0_BIAS - _NUMBERS[self.name].bias

    @property
    def float8(self) -> torch.dtype:
        """The torch dtype of the same bits. Raises KeyError for E2M1, which has none in torch."""
        return _FLOAT8[self.name]


E4M3, E5M2, E2M1 = (ElementFormat(name) for name in _NUMBERS)

FORMATS: dict[str, ElementFormat] = {f.name: f for f in (E4M3, E5M2, E2M1)}

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class MXBlocks(NamedTuple):
    """A tensor in MX form. For a tensor of shape [..., K] (K a multiple of 32):

    ``elements`` uint8 [..., K] (8-bit formats) or [..., K/2] (E2M1, two per byte, low nibble first);
    ``scales`` uint8 [..., K/32], E8M0 bytes.
    """

    elements: Tensor
    scales: Tensor


def encode(x: Tensor, fmt: ElementFormat, scale_mode: ScaleMode = ScaleMode.rceil) -> MXBlocks:
    """Quantise ``x`` [..., K], BF16 or float32, to MX blocks along the last dimension.

    Rounds to nearest even and saturates; NaN, infinity, zero and tiny blocks as described at the top of the
    module. Fixed shapes and no data-dependent control flow, so it traces into ``torch.compile``, where it gives the
    same bits (see ``stored_values``).

    Raises ValueError when K is not a multiple of 32 or ``x`` is not BF16 or float32.
    """
    check_block_dim(x.shape)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"MX encoding takes bfloat16 or float32, got {x.dtype}; convert the tensor first")
    blocks = stored_values(x).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scales = _biased_exponent(amax, fmt, scale_mode)
    elements = _elements(blocks, _reciprocal(scales), fmt).flatten(-2)
    return MXBlocks(elements, scales.to(torch.uint8).squeeze(-1))


def stored_values(x: Tensor) -> Tensor:
    """``x`` (BF16 or float32) in float32; of BF16 the values that memory would hold, in compiled code too.

    Inductor computes BF16 in float32 and leaves out the rounding between fused operations, so that it would quantise
    other values than eager code does. Between modules a value is BF16, and that is what is to be quantised. Rounding
    the bits is an operation like any other to Inductor: some integer instructions, no memory traffic.
    """
    values = x.to(torch.float32)
    if x.dtype != torch.bfloat16 or not torch.compiler.is_compiling():
        return values
    bits = values.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # to nearest, ties to even
    return torch.where(values.isnan(), values, rounded.view(torch.float32))


def scale_bytes(amax: Tensor, fmt: ElementFormat, scale_mode: ScaleMode = ScaleMode.rceil) -> Tensor:
    """E8M0 bytes, uint8 of ``amax``'s shape (float32), of blocks whose largest magnitudes are ``amax``."""
    return _biased_exponent(amax, fmt, scale_mode).to(torch.uint8)


def encode_with_scales(x: Tensor, scales: Tensor, fmt: ElementFormat) -> Tensor:
    """Elements of ``x`` [..., K] under given scales, for scales that cover more than a block or come from earlier
    values.

    ``scales`` are E8M0 bytes (uint8) that broadcast to [..., K/32]. Elements as ``encode`` gives them: values
    too large for their scale saturate, and NaN is for the caller to mark in the scales.
    """
    blocks = stored_values(x).unflatten(-1, (-1, BLOCK))
    return _elements(blocks, _reciprocal(scales.to(torch.int32)).unsqueeze(-1), fmt).flatten(-2)


def _elements(blocks: Tensor, reciprocal: Tensor, fmt: ElementFormat) -> Tensor:
    """Element bytes of float32 blocks [..., 32]: [..., 32], or [..., 16] for E2M1."""
    scaled = (blocks * reciprocal).clamp(-fmt.max, fmt.max)
    return _pack_e2m1(scaled) if fmt.bits == 4 else scaled.to(fmt.float8).view(torch.uint8)


def decode(
    blocks: MXBlocks, fmt: ElementFormat, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """Values of ``blocks``, [..., K] in ``dtype`` (bfloat16 or float32); exact but for the ends of the range.

    ``out``, of that shape and dtype, is filled and returned instead of a new tensor. Raises ValueError when
    elements and scales do not belong together, or when ``dtype`` or ``out`` is of another kind.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"MX decoding gives bfloat16 or float32, not {dtype}")
    _check_blocks(blocks, fmt)
    if out is not None:
        _check_out(out, blocks, dtype)
    if blocks.elements.device.type == "cpu" and not torch.compiler.is_compiling():
        return _decode_by_table(blocks, fmt, dtype, out)
    values = _decode_by_arithmetic(blocks, fmt, dtype)
    return values if out is None else out.copy_(values)


def one_per_byte(elements: Tensor, fmt: ElementFormat) -> Tensor:
    """Codes [..., K] of elements, a byte each."""
    if fmt.bits == 8:
        return elements
    return torch.stack((elements & 0xF, elements >> 4), dim=-1).flatten(-2)


def filled(blocks: MXBlocks, fmt: ElementFormat) -> Tensor:
    """Which blocks hold anything but zeros: bool [..., K/32]. The scales of the others mean nothing."""
    magnitude = blocks.elements & (0x77 if fmt.bits == 4 else 0x7F)
    return (magnitude != 0).unflatten(-1, (-1, BLOCK * fmt.bits // 8)).any(-1)


def has_special_values(blocks: MXBlocks, fmt: ElementFormat) -> bool:
    """Whether a scale is NaN, or an element NaN or infinite; waits for the device."""
    if bool((blocks.scales == SCALE_NAN).any()):
        return True
    special = {E4M3.name: 0x7F, E5M2.name: 0x7C}.get(fmt.name)
    return special is not None and bool(((blocks.elements & 0x7F) >= special).any())


def check_block_dim(shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless the last dimension of ``shape`` is a positive multiple of 32."""
    if not shape or shape[-1] == 0 or shape[-1] % BLOCK:
        raise ValueError(
            f"MX blocks hold {BLOCK} values of the last dimension, which must be a multiple of {BLOCK}; "
            f"got shape {tuple(shape)}"
        )


def _check_blocks(blocks: MXBlocks, fmt: ElementFormat) -> None:
    elements, scales = blocks
    per_block = BLOCK * fmt.bits // 8
    expected = (*scales.shape[:-1], scales.shape[-1] * per_block)
    if tuple(elements.shape) != expected or elements.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(
            f"{fmt.name} blocks with scales {tuple(scales.shape)} need uint8 elements of shape {expected} "
            f"and uint8 scales, got elements {tuple(elements.shape)} {elements.dtype} and scales {scales.dtype}"
        )


def _check_out(out: Tensor, blocks: MXBlocks, dtype: torch.dtype) -> None:
    expected = (*blocks.scales.shape[:-1], blocks.scales.shape[-1] * BLOCK)
    if tuple(out.shape) != expected or out.dtype != dtype:
        raise ValueError(f"out must be {expected} {dtype}, got {tuple(out.shape)} {out.dtype}")


def _biased_exponent(amax: Tensor, fmt: ElementFormat, mode: ScaleMode) -> Tensor:
    """E8M0 byte (int32) of each block from its amax (float32).

    Every mode is floor(log2 amax) - emax, plus one when the mantissa of amax lies above a threshold. So
    integer arithmetic on its bits is exact on every device, where a division or a log2 need not be.
    """
    bits = amax.view(torch.int32)
    exponent = (bits >> 23) - fmt.emax + ((bits & _MANTISSA) > carry_threshold(fmt, mode)).to(torch.int32)
    return torch.where(amax.isfinite(), exponent.clamp(min=0), SCALE_NAN)


def carry_threshold(fmt: ElementFormat, mode: ScaleMode) -> int:
    """Mantissa bits of amax above which the scale is one step larger than with ``floor``: for that itself, none are."""
    if mode == ScaleMode.floor:
        return 2**23
    if mode == ScaleMode.ceil:
        return 0
    if mode == ScaleMode.rceil:
        return int((fmt.max / 2.0**fmt.emax - 1) * 2**23)
    return 2**23 - 2 ** (22 - fmt.mantissa) - 1


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / 2^(byte - 127), float32 of int32 bytes; 0 for NaN.

    Multiplying by a power of two rounds as dividing does, and no scale has a subnormal reciprocal but the largest.
    """
    bits = torch.where(scales == 254, 1 << 22, (254 - scales) << 23)
    return torch.where(scales == SCALE_NAN, 0, bits).to(torch.int32).view(torch.float32)


def _pack_e2m1(scaled: Tensor) -> Tensor:
    """E2M1 bytes [..., 16] of values [..., 32] already within [-6, 6].

    The codes 0..7 step by 1/2 up to 2, by 1 up to 4, by 2 up to 6. On each piece rounding to even is
    ``round``, and the piece that applies is the one with the lowest code.
    """
    a = scaled.abs().nan_to_num(nan=0.0)
    code = torch.minimum((a * 2).round(), torch.minimum(a.round() + 2, (a * 0.5).round() + 4)).to(torch.uint8)
    code = code | (scaled.signbit().to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def _unpack_e2m1(elements: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [..., K] of E2M1 bytes [..., K/2], by arithmetic that needs no table on the device."""
    codes = torch.stack((elements & 0xF, elements >> 4), dim=-1).flatten(-2).to(torch.int32)
    magnitude, exponent = codes & 7, (codes >> 1) & 3
    twice = torch.where(magnitude < 2, magnitude, (2 + (codes & 1)) << (exponent - 1).clamp(min=0))
    values = twice.to(dtype) * 0.5
    return torch.where(codes > 7, -values, values)


def _element_values(elements: Tensor, fmt: ElementFormat, dtype: torch.dtype) -> Tensor:
    if fmt.bits == 4:
        return _unpack_e2m1(elements, dtype)
    return elements.view(fmt.float8).to(dtype)


def scale_values(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(byte - 127), built from its bits: the byte is the exponent field, but for 2^-127, which is subnormal, and NaN.

    torch's float8_e8m0fnu converts the same, but compilers for GPUs do not know it.
    """
    word, fraction_bits = {torch.bfloat16: (torch.int16, 7), torch.float32: (torch.int32, 23)}[dtype]
    bits = scales.to(word) << fraction_bits
    bits = torch.where(scales == 0, 1 << (fraction_bits - 1), bits)
    bits = torch.where(scales == SCALE_NAN, bits | 1 << (fraction_bits - 1), bits)
    return bits.view(dtype)


def _decode_by_arithmetic(blocks: MXBlocks, fmt: ElementFormat, dtype: torch.dtype) -> Tensor:
    values = _element_values(blocks.elements, fmt, dtype).unflatten(-1, (-1, BLOCK))
    return (values * scale_values(blocks.scales, dtype).unsqueeze(-1)).flatten(-2)


# Eager torch converts float8 on the CPU one value at a time (about 4 ns each). Looking values up two at a
# time is several times faster, and the tables hold what the arithmetic gives. Compiled code fuses the latter.


def _decode_by_table(blocks: MXBlocks, fmt: ElementFormat, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    elements, scales = blocks
    table = _pair_table(fmt, dtype)
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if fmt.bits == 4:
        # index = scale byte, element byte; the entry is the pair of final values
        index = elements.unflatten(-1, (-1, BLOCK // 2)) + (scales.to(torch.int32) << 8).unsqueeze(-1)
        pairs = table.index_select(0, index.reshape(-1))
        values = pairs.view(dtype).view(shape)
        return values if out is None else out.copy_(values)
    index = elements.contiguous().view(torch.uint16).to(torch.int32)
    values = table.index_select(0, index.view(-1)).view(dtype).view(*scales.shape, BLOCK)
    factor = scales.view(torch.float8_e8m0fnu).to(dtype).unsqueeze(-1)
    if out is None:
        return values.mul_(factor).view(shape)
    torch.mul(values, factor, out=out.unflatten(-1, (-1, BLOCK)))
    return out


@functools.cache
def _pair_table(fmt: ElementFormat, dtype: torch.dtype) -> Tensor:
    """65536 pairs of values, each viewed as one integer so that a lookup moves both.

    8-bit formats: indexed by two element bytes (the first one lowest), without scale. E2M1: indexed by scale
    byte and element byte, scale applied. 256 KiB for BF16, 512 KiB for float32.
    """
    with torch.inference_mode(False):  # the table outlives the caller's mode
        byte = torch.arange(256, dtype=torch.uint8, device="cpu")
        if fmt.bits == 4:
            pair = _unpack_e2m1(byte.view(256, 1), dtype)  # [256, 2]
            pairs = scale_values(byte, dtype).view(256, 1, 1) * pair
        else:
            value = _element_values(byte, fmt, dtype)
            pairs = torch.stack((value.expand(256, 256), value.unsqueeze(1).expand(256, 256)), dim=-1)
        word = {torch.bfloat16: torch.int32, torch.float32: torch.int64}[dtype]
        return pairs.contiguous().view(-1).view(word)
