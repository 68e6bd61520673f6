"""The MX formats against the OCP MX v1.0 tables, written out here from the specification, and against torchao."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

from harness.formats.mx import E2M1, E4M3, E5M2, FORMATS, ElementFormat, MXBlocks, _decode_by_arithmetic, decode, encode
from harness.formats.scales import ScaleMode

TORCHAO = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}
ALL_FORMATS = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
ALL_MODES = pytest.mark.parametrize("mode", list(ScaleMode))
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


def spec_element(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Value of a code point by the specification's formula, without its special values."""
    mantissa = code & (2**mantissa_bits - 1)
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    if exponent == 0:
        return sign * 2.0 ** (1 - bias) * mantissa / 2**mantissa_bits
    return sign * 2.0 ** (exponent - bias) * (1 + mantissa / 2**mantissa_bits)


def spec_values(fmt: ElementFormat) -> list[float]:
    if fmt is E2M1:
        return [spec_element(code, 2, 1, 1) for code in range(16)]
    if fmt is E4M3:
        return [math.nan if code & 0x7F == 0x7F else spec_element(code, 4, 3, 7) for code in range(256)]
    special = {0x7C: math.inf, 0xFC: -math.inf}
    return [special.get(code, math.nan) if code & 0x7C == 0x7C else spec_element(code, 5, 2, 15) for code in range(256)]


def every_code_point_with_every_scale(fmt: ElementFormat) -> tuple[MXBlocks, torch.Tensor]:
    """One row per scale byte that holds every code point, and the values by the specification in float64."""
    values = torch.tensor(spec_values(fmt), dtype=torch.float64)
    codes = torch.arange(256, dtype=torch.uint8)
    if fmt is E2M1:  # every byte, that is every pair of nibbles, the low nibble first
        values = torch.stack((values[codes.long() & 15], values[codes.long() >> 4]), dim=-1).flatten()
    factor = torch.tensor([2.0 ** (s - 127) for s in range(255)] + [math.nan], dtype=torch.float64)
    blocks = MXBlocks(codes.repeat(256, 1), torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, len(values) // 32))
    return blocks, factor[:, None] * values


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit, signs of zeros included, but that any NaN equals any other."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    number = ~want.isnan()
    assert torch.equal(got.signbit()[number], want.signbit()[number])


def torchao_encode(x: torch.Tensor, fmt: ElementFormat, mode: ScaleMode) -> MXTensor:
    return MXTensor.to_mx(x, TORCHAO[fmt.name], 32, ScaleCalculationMode(mode.value))


def assert_encodes_like_torchao(x: torch.Tensor, fmt: ElementFormat, mode: ScaleMode) -> None:
    got, want = encode(x, fmt, mode), torchao_encode(x, fmt, mode)
    assert torch.equal(got.scales, want.scale.view(torch.uint8))
    number = (got.scales != 255).repeat_interleave(16 if fmt is E2M1 else 32, dim=-1)
    assert torch.equal(got.elements[number], want.qdata.view(torch.uint8)[number])
    for dtype in (torch.bfloat16, torch.float32):
        assert_same(decode(got, fmt, dtype), want.dequantize(dtype))


@ALL_FORMATS
def test_format_constants_follow_from_the_code_points(fmt):
    finite = [v for v in spec_values(fmt) if math.isfinite(v)]
    assert fmt.max == max(finite)
    assert 2.0**fmt.emax <= fmt.max < 2.0 ** (fmt.emax + 1)
    assert 2.0**fmt.emax * (1 + 2.0**-fmt.mantissa) in finite


@ALL_FORMATS
@BOTH_DTYPES
def test_every_code_point_decodes_as_specified_under_every_scale(fmt, dtype):
    blocks, values = every_code_point_with_every_scale(fmt)
    assert_same(decode(blocks, fmt, dtype), values.to(dtype))


@ALL_FORMATS
@BOTH_DTYPES
def test_table_and_arithmetic_decode_alike(fmt, dtype):
    blocks, _ = every_code_point_with_every_scale(fmt)
    assert_same(decode(blocks, fmt, dtype), _decode_by_arithmetic(blocks, fmt, dtype))


@ALL_FORMATS
def test_decoding_to_bf16_is_exact_between_the_ends_of_the_range(fmt):
    blocks, values = every_code_point_with_every_scale(fmt)
    rows = slice(127 - 100, 127 + 100)
    assert_same(decode(blocks, fmt, torch.bfloat16)[rows].double(), values[rows])


@ALL_FORMATS
@ALL_MODES
def test_every_bf16_mantissa_of_amax_encodes_like_torchao(fmt, mode):
    exponents = torch.tensor([24, 36, 120, 127, 253, 254])  # from the smallest with a scale above 2^-127
    amax = ((exponents[:, None] << 7) + torch.arange(128)).flatten().to(torch.int16).view(torch.bfloat16)
    fractions = torch.rand(len(amax), 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = (fractions * amax.float()[:, None]).bfloat16()
    x[:, 5], x[:, 6] = amax, -amax
    assert_encodes_like_torchao(x, fmt, mode)


@ALL_FORMATS
@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_random_tensors_encode_like_torchao(fmt, mode, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 64, generator=generator) * torch.logspace(-6, 6, 64)
    assert_encodes_like_torchao(x.to(dtype), fmt, mode)


@ALL_FORMATS
@ALL_MODES
def test_special_blocks_encode_like_torchao(fmt, mode):
    inf, nan = math.inf, math.nan
    largest = torch.finfo(torch.float32).max
    starts = [
        [0.0],
        [0.0, -0.0],
        [largest, -largest, 1.0],
        [fmt.max, -fmt.max],
        [fmt.max * 1.001, -1.0],
        [nan, 1.0],
        [-1.0, nan, inf],
    ]
    x = torch.zeros(len(starts), 32)
    for row, values in enumerate(starts):
        x[row, : len(values)] = torch.tensor(values)
    assert_encodes_like_torchao(x, fmt, mode)


@ALL_FORMATS
def test_elements_round_to_nearest_with_ties_to_even(fmt):
    """Every code point, every midpoint between two, and their neighbours, in blocks whose scale is 1."""
    magnitudes = [v for v in spec_values(fmt) if math.isfinite(v) and math.copysign(1, v) > 0]
    assert magnitudes == sorted(magnitudes)  # so the index is the code, and its parity that of the mantissa
    inputs, expected = list(magnitudes), list(range(len(magnitudes)))
    for code, (low, high) in enumerate(itertools.pairwise(magnitudes)):
        middle = (low + high) / 2
        inputs += [middle * (1 - 2.0**-20), middle, middle * (1 + 2.0**-20)]
        expected += [code, code + code % 2, code + 1]
    anchor = torch.full((len(inputs), 1), fmt.max)  # makes amax = max, so the scale is 2^0
    x = torch.cat((anchor, torch.tensor(inputs)[:, None], -torch.tensor(inputs)[:, None]), dim=1)
    blocks = encode(torch.nn.functional.pad(x, (0, 29)), fmt)
    assert (blocks.scales == 127).all()
    codes = blocks.elements
    if fmt is E2M1:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    sign = 1 << (fmt.bits - 1)
    assert codes[:, 1].tolist() == expected
    assert codes[:, 2].tolist() == [code + sign for code in expected]


@ALL_FORMATS
def test_zero_block_keeps_the_smallest_scale_and_the_signs(fmt):
    x = torch.zeros(1, 32)
    x[0, 1::2] = -0.0
    blocks = encode(x, fmt)
    assert blocks.scales.item() == 0
    assert_same(decode(blocks, fmt, torch.float32), x)


@ALL_FORMATS
@ALL_MODES
def test_nan_makes_its_block_nan_and_no_other(fmt, mode):
    x = torch.ones(3, 64)
    x[1, 40] = math.nan
    blocks = encode(x, fmt, mode)
    assert blocks.scales[1].tolist()[1] == 255
    assert decode(blocks, fmt).isnan().sum() == 32
    assert decode(blocks, fmt)[1, 32:].isnan().all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("mode", [ScaleMode.rceil, ScaleMode.ceil])
def test_modes_that_never_saturate(fmt, mode):
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(2))
    blocks = encode(x, fmt, mode)
    limit = fmt.max * 2.0 ** (blocks.scales.double() - 127)
    assert (x.abs().amax(-1, keepdim=True) <= limit).all()


def test_floor_saturates_where_the_specification_says():
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([500.0, -300.0])  # amax in [2^8, 2^9): scale 1, and 500 is beyond 448
    assert decode(encode(x, E4M3, ScaleMode.floor), E4M3)[0, :2].tolist() == [448.0, -288.0]
    assert decode(encode(x, E4M3, ScaleMode.rceil), E4M3)[0, :2].tolist() == [512.0, -288.0]


def test_rceil_is_exact_just_above_a_power_of_two():
    """Where a float32 logarithm rounds the ratio back onto the power of two, the scale still has to grow."""
    x = torch.zeros(2, 32)
    x[0, 0] = 448.0 * 2.0**40
    x[1, 0] = torch.nextafter(x[0, 0], torch.tensor(math.inf))
    assert encode(x, E4M3, ScaleMode.rceil).scales.flatten().tolist() == [127 + 40, 127 + 41]


def blocks_of(*starts):
    """A block for each row of values, padded with zeros."""
    x = torch.zeros(len(starts), 32)
    for row, values in enumerate(starts):
        x[row, : len(values)] = torch.tensor(values)
    return x


@ALL_FORMATS
@ALL_MODES
def test_the_smallest_scale_divides_as_the_specification_says(fmt, mode):
    """Byte 0 is 2^-127 and the block is divided by that. torchao 0.18 divides by 2^-126, in rceil by 1."""
    unit = 2.0**-127
    x = blocks_of([unit, -unit], [1.5 * unit, 0.0], [0.5 * unit, unit * fmt.max / 2])
    blocks = encode(x, fmt, mode)
    assert (blocks.scales == 0).all()
    assert_same(decode(blocks, fmt, torch.float32), x)
    theirs = torchao_encode(x, fmt, mode)
    assert torch.equal(theirs.scale.view(torch.uint8), blocks.scales)
    part = 0.0 if mode == ScaleMode.rceil else 0.5
    assert theirs.dequantize(torch.float32)[2, 1] == part * x[2, 1]


@ALL_FORMATS
@ALL_MODES
@pytest.mark.parametrize("values", [[math.inf, 1.0, -2.0], [-math.inf, math.inf, 3e38], [1.0, -math.inf]])
def test_infinity_makes_its_block_nan(fmt, mode, values):
    """As torchao does since its pull request 4725; the pinned 0.18 saturates, and what is finite mostly vanishes."""
    x = torch.cat((blocks_of(values), torch.ones(1, 32)))
    blocks = encode(x, fmt, mode)
    assert blocks.scales.flatten().tolist()[0] == 255
    decoded = decode(blocks, fmt, torch.float32)
    assert decoded[0].isnan().all()
    assert_same(decoded[1], x[1])
    theirs = torchao_encode(x, fmt, mode)
    assert theirs.scale.view(torch.uint8).flatten()[0] == (254 if mode == ScaleMode.rceil else 255 - fmt.emax)
    assert not theirs.dequantize(torch.float32)[0].isnan().any()


@ALL_FORMATS
@ALL_MODES
@pytest.mark.parametrize("exponent", [*range(-133, -118), 100, 127])
def test_every_scale_decodes_within_half_a_step_of_what_was_encoded(fmt, mode, exponent):
    """Scale by scale against the specification's own arithmetic in float64, where no scale is clamped but the least."""
    x = (torch.rand(64, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 2.0**exponent
    blocks = encode(x, fmt, mode)
    codes = torch.tensor([v for v in spec_values(fmt) if math.isfinite(v)], dtype=torch.float64)
    scale = torch.exp2(blocks.scales.double() - 127)
    nearest = (x.double()[..., None] / scale[..., None] - codes).abs().amin(-1) * scale
    assert torch.equal((decode(blocks, fmt, torch.float32).double() - x.double()).abs(), nearest)


def test_e2m1_packs_the_first_of_two_elements_into_the_low_nibble():
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([6.0, -0.5])
    assert encode(x, E2M1).elements[0, 0].item() == 0x97


@ALL_FORMATS
def test_storage_is_really_packed(fmt):
    blocks = encode(torch.randn(4, 2, 96), fmt)
    assert blocks.elements.dtype == blocks.scales.dtype == torch.uint8
    assert blocks.elements.shape == (4, 2, 96 * fmt.bits // 8)
    assert blocks.scales.shape == (4, 2, 3)


@ALL_FORMATS
@BOTH_DTYPES
def test_strided_inputs_and_outputs(fmt, dtype):
    x = torch.randn(4, 64, 6).transpose(1, 2)
    blocks = encode(x, fmt)
    assert torch.equal(blocks.elements, encode(x.contiguous(), fmt).elements)
    strided = MXBlocks(blocks.elements.transpose(0, 1), blocks.scales.transpose(0, 1))
    want = decode(blocks, fmt, dtype).transpose(0, 1)
    assert torch.equal(decode(strided, fmt, dtype), want)
    out = torch.empty(6, 4, 128, dtype=dtype)[..., :64]
    assert decode(strided, fmt, dtype, out=out) is out
    assert torch.equal(out, want)


@ALL_FORMATS
def test_no_blocks_decode_to_nothing(fmt):
    assert decode(encode(torch.ones(2, 0, 64), fmt), fmt).shape == (2, 0, 64)


@pytest.mark.parametrize("shape", [(4, 33), (4, 0), (), (16,)])
def test_last_dimension_must_hold_whole_blocks(shape):
    with pytest.raises(ValueError, match=r"multiple of 32; got shape") as caught:
        encode(torch.ones(shape), E4M3)
    assert str(tuple(shape)) in str(caught.value)


def test_wrong_dtypes_and_shapes_are_named():
    blocks = encode(torch.ones(2, 64), E4M3)
    with pytest.raises(ValueError, match=r"takes bfloat16 or float32, got torch\.float16"):
        encode(torch.ones(2, 64).half(), E4M3)
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        decode(blocks, E4M3, torch.float16)
    with pytest.raises(ValueError, match=r"e2m1 blocks .* need uint8 elements of shape \(2, 32\)"):
        decode(blocks, E2M1)
    with pytest.raises(ValueError, match=r"out must be \(2, 64\) torch\.bfloat16, got \(2, 32\)"):
        decode(blocks, E4M3, out=torch.empty(2, 32, dtype=torch.bfloat16))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
blocks_of_floats = st.lists(floats, min_size=32, max_size=32).map(lambda values: torch.tensor([values]))
formats, modes = st.sampled_from(list(FORMATS.values())), st.sampled_from(list(ScaleMode))


@settings(max_examples=40, deadline=None)
@given(blocks_of_floats, formats, modes)
def test_any_bf16_block_encodes_like_torchao(x, fmt, mode):
    assert_encodes_like_torchao(x.bfloat16(), fmt, mode)


@settings(max_examples=40, deadline=None)
@given(blocks_of_floats, formats, modes, st.integers(-20, 20))
def test_a_power_of_two_moves_the_scale_alone(x, fmt, mode, shift):
    x = x.clamp(-(2.0**60), 2.0**60)
    x = torch.where(x.abs() < 2.0**-60, 0.0, x)
    x[0, 0] = 2.0**-30  # not a zero block
    one, other = encode(x, fmt, mode), encode(x * 2.0**shift, fmt, mode)
    assert torch.equal(one.elements, other.elements)
    assert other.scales.item() - one.scales.item() == shift


@settings(max_examples=40, deadline=None)
@given(blocks_of_floats, formats, modes)
def test_encoding_what_was_decoded_changes_nothing(x, fmt, mode):
    x[0, 0] = 1.0  # keeps the scale inside the E8M0 range
    once = decode(encode(x, fmt, mode), fmt, torch.float32)
    assert_same(decode(encode(once, fmt, mode), fmt, torch.float32), once)


@settings(max_examples=40, deadline=None)
@given(blocks_of_floats, formats)
def test_rounding_error_stays_within_half_a_step(x, fmt):
    x[0, 0] = 1.0
    blocks = encode(x, fmt, ScaleMode.rceil)
    scale = 2.0 ** (blocks.scales.double() - 127)
    error = (decode(blocks, fmt, torch.float32).double() - x.double()).abs()
    smallest_normal = 2.0 ** {"e4m3": -6, "e5m2": -14, "e2m1": 0}[fmt.name]
    half_step = torch.maximum(x.double().abs(), scale * smallest_normal) * 2.0 ** -(fmt.mantissa + 1)
    assert (error <= half_step).all()
