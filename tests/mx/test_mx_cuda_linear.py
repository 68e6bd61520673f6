"""What `kernel=cuda` does around its kernel, which needs no GPU: weights stacked, launch shapes chosen, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.formats.mx import E2M1, E4M3, decode
from harness.formats.scales import ScaleMode
from harness.kernels.cuda import ops as cuda_ops
from harness.kernels.cuda.linear import PackedBF16Linear
from harness.kernels.cuda.shapes import (
    MANY_ROWS,
    PLACES,
    SHARED_BYTES,
    CudaConfig,
    CudaShape,
    candidates,
    candidates_in_a_layer,
    choose,
    held_groups,
    launch_grid,
    layout,
    shared_bytes,
    tuned,
)
from harness.mx.conf import Activation
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears.base import LinearFormat
from harness.mx.linears.triton import TritonMXLinear
from harness.mx.weights import nearest

W8A16 = LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16)
W4A16 = LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16)
SHAPES = [
    CudaShape(m, n, k, bits)
    for bits in (8, 4)
    for m in (1, 64, 300)
    for n, k in ((4608, 1536), (1536, 6144), (2560, 10240), (147456, 1536), (40, 32))
]


def make(n, k, fmt=W8A16, scale=1.0):
    linear = nn.Linear(k, n).bfloat16().requires_grad_(False)
    linear.weight.mul_(scale)
    return cuda_linear.build(nearest(linear, fmt))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_tried_covers_the_product_and_fits_the_gpu(shape):
    for config in [choose(shape), *candidates(shape, 48), *candidates_in_a_layer(shape, 48)]:
        assert shared_bytes(config, shape) <= SHARED_BYTES // config.blocks
        assert 32 * config.warps <= 1024
        across, down = launch_grid(config, shape.m, shape.n)
        assert across // config.cluster * config.tiles * 16 >= shape.n
        assert down * config.m_tiles * 8 >= shape.m
        assert held_groups(config, shape.k) * config.cluster * 64 >= shape.k


def test_warps_leave_row_tiles_out_where_all_clusters_then_find_a_place():
    shape = CudaShape(64, 6144, 1536, 16)
    found = [config for config in candidates(shape, 10**6) if config.idle]
    assert (2, 6) in {(config.cluster, config.tiles) for config in found}  # 64 clusters of 2, where 66 find a place
    for config in found:
        clusters = launch_grid(config, shape.m, shape.n)[0] // (config.cluster * config.share)
        size = config.cluster * config.share
        assert clusters <= config.blocks * PLACES[size] // size
        assert config.tiles > config.row_tiles * (config.warps_n - 4)  # no warpgroup has nothing


@pytest.mark.parametrize("key", tuned(), ids=str)
def test_what_was_tuned_is_what_runs(key):
    bits, rows, n, k = key
    assert choose(CudaShape(rows, n, k, bits)) == tuned()[key]


def test_a_block_of_its_own_takes_what_keeps_others_away():
    shape = CudaShape(64, 1536, 1536, 4)
    alone, shared = (CudaConfig(8, 1, 4, 1, 4, 2, 2, blocks=blocks) for blocks in (1, 2))
    assert layout(alone, shape.k, shape.bits)[0] < SHARED_BYTES // 2
    assert 2 * (shared_bytes(alone, shape) + 1024) > SHARED_BYTES + 1024
    assert shared_bytes(alone, shape) + shared_bytes(shared, shape) + 1024 <= SHARED_BYTES
    many = CudaShape(8, 147456, 1536, 4)  # more blocks than multiprocessors: as many at once as fit
    assert shared_bytes(alone, many) == layout(alone, many.k, many.bits)[0]


def test_a_config_survives_an_operators_signature():
    config = CudaConfig(8, 3, 2, 2, 4, 2, 2, blocks=2)
    assert CudaConfig(*config.as_ints()) == config


def test_weights_are_held_once_and_as_they_were_encoded():
    torch.manual_seed(0)
    mx = make(48, 96)
    assert mx.weight_bytes() == 3 * 2 * 1056 + 48 * 2
    assert decode(mx.weight_blocks(), E4M3).shape == (48, 96)
    assert mx.shape(64) == CudaShape(64, 48, 96, 8)


def test_stacking_shares_memory():
    members = [make(16 * i, 64) for i in (1, 2, 3)]
    blocks = [decode(m.weight_blocks(), E4M3) for m in members]
    stacked = members[0].stacked(members[1:])
    assert torch.equal(decode(stacked.weight_blocks(), E4M3), torch.cat(blocks))
    assert torch.equal(decode(members[2].weight_blocks(), E4M3), blocks[2])
    assert members[2].tiles.untyped_storage().data_ptr() == stacked.tiles.untyped_storage().data_ptr()
    assert members[0].stacked(members[1:]).tiles.data_ptr() == stacked.tiles.data_ptr()


def test_bf16_weights_are_stacked_likewise():
    torch.manual_seed(0)
    plain = [nn.Linear(64, 16 * i).bfloat16().requires_grad_(False) for i in (1, 2, 3)]
    members = [PackedBF16Linear.from_linear(linear) for linear in plain]
    stacked = members[0].stacked(members[1:])
    assert torch.equal(stacked.dense_weight(), torch.cat([linear.weight for linear in plain]))
    assert torch.equal(stacked.bias, torch.cat([linear.bias for linear in plain]))
    assert torch.equal(members[2].plain().weight, plain[2].weight)
    assert members[2].tiles.untyped_storage().data_ptr() == stacked.tiles.untyped_storage().data_ptr()
    assert members[0].stacked([make(32, 64)]) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("output_scale", [1.0, 8.0])
def test_a_library_product_of_an_unpacked_weight(bias, output_scale):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 40, bias=bias).bfloat16().requires_grad_(False), torch.randn(300, 96).bfloat16()
    packed = PackedBF16Linear.from_linear(linear)
    weight = cuda_ops.unpack(packed.tiles, (40, 96), "bf16")
    assert torch.equal(weight, linear.weight)
    got = cuda_ops.library_product(x, weight / output_scale, packed.bias, output_scale)
    want = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-16).all()


def test_which_products_are_of_many_rows():
    assert not CudaShape(MANY_ROWS, 64, 64, 4).many
    assert CudaShape(MANY_ROWS + 1, 64, 64, 4).many


def test_what_does_not_fit_together_is_not_stacked():
    first = make(32, 64)
    assert first.stacked([make(40, 64)]) is None
    assert first.stacked([make(32, 96)]) is None
    assert first.stacked([make(32, 64, W4A16)]) is None
    assert first.stacked([make(32, 64, scale=1e7)]) is None  # another power of two to multiply by
    assert first.stacked([nn.Linear(64, 32)]) is None
    assert first.stacked([PackedBF16Linear.from_linear(nn.Linear(64, 32).bfloat16())]) is None


def test_a_weight_out_of_range_goes_to_triton_and_says_so():
    linear = nn.Linear(64, 64).bfloat16().requires_grad_(False)
    linear.weight[0, 0], linear.weight[1] = 1e38, 1e-20
    mx = cuda_linear.build(nearest(linear, W8A16))
    assert isinstance(mx, TritonMXLinear)
    assert "kernel=triton, since its block scales reach from 2^" in mx.note


def test_it_says_why_it_cannot_run(monkeypatch):
    assert "the model is on cpu" in cuda_linear.unavailable(torch.device("cpu"), W8A16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "this GPU is sm_100" in cuda_linear.unavailable(torch.device("cuda", 0), W8A16)
