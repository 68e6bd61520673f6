"""Packing for `kernel=cuda`: nothing is lost, and what the kernel cannot decode is refused."""

import pytest
import torch

from harness.formats.mx import E2M1, E4M3, FORMATS, MXBlocks, decode, encode
from harness.kernels.cuda import packing as cuda_packing


def blocks_of(fmt, n=33, k=96):
    torch.manual_seed(0)
    return encode((torch.randn(n, k) * torch.exp2(torch.randint(-8, 4, (n, 1)).float())).bfloat16(), fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (33, 96), (40, 32)])
def test_unpacking_gives_back_what_was_packed(fmt, n, k):
    blocks = blocks_of(fmt, n, k)
    weight = cuda_packing.pack(blocks, fmt)
    assert weight.tiles.shape == (-(-n // 16), -(-k // 64), cuda_packing.tile_bytes(fmt.bits))
    for got, want in zip(cuda_packing.unpack(weight, fmt, n, k), blocks, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_large_scales_are_held_smaller(fmt):
    blocks = blocks_of(fmt)
    blocks.scales.clamp_(120)
    blocks.scales[0, 0] = 155
    weight = cuda_packing.pack(blocks, fmt)
    assert weight.output_scale > 1
    assert torch.equal(cuda_packing.unpack(weight, fmt, 33, 96).scales, blocks.scales)


def test_zero_blocks_and_their_signs_survive():
    zeros = MXBlocks(torch.full((16, 32), 0x80, dtype=torch.uint8), torch.zeros(16, 1, dtype=torch.uint8))
    blocks = cuda_packing.unpack(cuda_packing.pack(zeros, E4M3), E4M3, 16, 32)
    assert torch.equal(blocks.elements, zeros.elements)
    assert torch.equal(decode(blocks, E4M3), decode(zeros, E4M3))


@pytest.mark.parametrize(
    ("scale", "element", "reason"),
    [
        (255, 0x01, "NaN or infinite"),
        (120, 0x7F, "NaN or infinite"),
        (254, 0x01, "2^127"),
        (2, 0x01, "2^-125"),
    ],
)
def test_what_cannot_be_decoded_exactly_is_refused(scale, element, reason):
    blocks = blocks_of(E4M3)
    blocks.scales[3, 1] = scale
    blocks.elements[3, 32:64] = element
    assert reason in cuda_packing.unfit(blocks, E4M3)
    with pytest.raises(ValueError, match="kernel=cuda cannot hold this weight"):
        cuda_packing.pack(blocks, E4M3)


def test_scales_that_lie_too_far_apart_are_refused():
    blocks = blocks_of(E2M1)
    blocks.scales[0, 0], blocks.scales[1, 0] = 150, 12
    assert "from 2^-115 to 2^23" in cuda_packing.unfit(blocks, E2M1)
    blocks.scales[1, 0] = 100
    assert cuda_packing.unfit(blocks, E2M1) is None
