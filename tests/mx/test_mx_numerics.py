import math

import pytest
import torch
from torch import nn

from harness.formats.mx import E2M1, E4M3, MXBlocks, encode
from harness.formats.scales import ScaleMode
from harness.mx.conf import Activation
from harness.mx.dispatch import resolve_kernel
from harness.mx.linears.base import LinearFormat
from harness.mx.numerics import block_stats, clipped, error, linear_error
from harness.mx.weights import nearest


def test_error_figures():
    figures = error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    assert figures == {"mae": 2.0, "rel": 0.8, "max": 4.0, "sqnr_db": pytest.approx(-20 * math.log10(0.8))}
    assert error(torch.zeros(2), torch.zeros(2))["rel"] == 0.0
    assert error(torch.ones(2), torch.zeros(2))["rel"] == math.inf


def test_block_stats_by_hand():
    x = torch.zeros(4, 32)
    x[0, :3] = torch.tensor([448.0, -448.0, 1.0])
    x[1, 0] = 500.0  # clipped by floor, at scale 1
    x[2, 0] = 2.0
    x[3, 0] = math.nan
    blocks = encode(x, E4M3, ScaleMode.floor)
    stats = block_stats(blocks, E4M3)
    assert stats["saturated"] == 3
    assert stats["saturated_fraction"] == 3 / 128
    assert (stats["scale_min"], stats["scale_max"]) == (2.0**-7, 1.0)
    assert stats["scale_mean"] == pytest.approx((1 + 1 + 2.0**-7) / 3)
    assert stats["nan_blocks"] == 1
    assert clipped(x, blocks, E4M3) == 1


def test_block_stats_of_nan_blocks_only():
    blocks = MXBlocks(torch.zeros(1, 16, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.uint8))
    stats = block_stats(blocks, E2M1)
    assert stats["nan_blocks"] == 1
    assert math.isnan(stats["scale_mean"])


@pytest.mark.parametrize("activation", list(Activation))
def test_more_bits_mean_less_error_and_bf16_least(activation):
    torch.manual_seed(0)
    linear = nn.Linear(256, 64).bfloat16()
    x = torch.randn(32, 256).bfloat16()
    found = {}
    for element in (E4M3, E2M1):
        fmt = LinearFormat(element, ScaleMode.rceil, activation)
        kernel = resolve_kernel("emulated", torch.device("cpu"), fmt)
        found[element.name] = linear_error(linear, kernel.build(nearest(linear, fmt)), x)
    assert found["e2m1"]["rel"] > 2 * found["e4m3"]["rel"] > 4 * found["e4m3"]["bf16"]["rel"] > 0
    assert found["e4m3"]["sqnr_db"] > 25
    assert 12 < found["e2m1"]["sqnr_db"] < 25
    assert found["e4m3"]["weight"]["clipped"] == 0
    assert ("activation" in found["e4m3"]) == (activation != Activation.bf16)


def test_floor_clips_where_rceil_does_not():
    torch.manual_seed(0)
    linear = nn.Linear(256, 64).bfloat16()
    x = torch.randn(8, 256).bfloat16()
    clips = {}
    for mode in (ScaleMode.floor, ScaleMode.rceil):
        fmt = LinearFormat(E2M1, mode, Activation.mx)
        kernel = resolve_kernel("emulated", torch.device("cpu"), fmt)
        clips[mode] = linear_error(linear, kernel.build(nearest(linear, fmt)), x)
    assert clips[ScaleMode.floor]["activation"]["clipped"] > 0
    assert clips[ScaleMode.rceil]["activation"]["clipped"] == clips[ScaleMode.rceil]["weight"]["clipped"] == 0
    assert clips[ScaleMode.rceil]["activation"]["saturated"] > 0
