"""`kernel=cuda` on a Hopper GPU against the decoded operands. What needs no GPU is in test_mx_cuda_source.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.formats.mx import E2M1, E4M3, E5M2, MXBlocks, decode, encode
from harness.formats.scales import ScaleMode
from harness.kernels import launch
from harness.kernels.cuda import ops as cuda_ops
from harness.kernels.cuda.linear import PackedBF16Linear
from harness.kernels.cuda.shapes import MANY_ROWS, CudaConfig
from harness.models.embeddings import MLP
from harness.mx.conf import Activation
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.mx.linears.cuda import CudaMXLinear
from harness.mx.linears.triton import TritonMXLinear
from harness.mx.weights import nearest

DEVICE = torch.device("cuda", 0)
W8A16 = LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16)
FORMATS = {
    "W8A16": W8A16,
    "E5M2": LinearFormat(E5M2, ScaleMode.rceil, Activation.bf16),
    "W4A16": LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16),
    "W8A8": LinearFormat(E4M3, ScaleMode.rceil, Activation.mx),
    "W4A8": LinearFormat(E2M1, ScaleMode.floor, Activation.mxfp8),
    "W4A4": LinearFormat(E2M1, ScaleMode.even, Activation.mx),
}


def reason_not_to_run():
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return cuda_linear.unavailable(DEVICE, W8A16)


REASON = reason_not_to_run()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(n, k, fmt, bias=True):
    linear = nn.Linear(k, n, bias=bias).bfloat16().requires_grad_(False)
    linear.weight.mul_(0.5).mul_(torch.exp2(torch.randint(-6, 3, (n, 1)).float()))
    mx = cuda_linear.build(nearest(linear.to(DEVICE), fmt))
    assert isinstance(mx, CudaMXLinear)
    return mx


def activations(*shape):
    x = torch.randn(*shape) * torch.exp2(torch.randint(-8, 8, (*shape[:-1], 1)).float())
    return x.bfloat16().to(DEVICE)


def assert_equals_oracle(mx, x, got):
    element = mx.fmt.activation_element
    x = x if element is None else decode(encode(x, element, mx.fmt.scale_mode), element)
    weight = decode(mx.weight_blocks(), mx.fmt.element).double()
    want = F.linear(x.double(), weight, None if mx.bias is None else mx.bias.double())
    slack = 2**-8 * want.abs() + 2**-18 * F.linear(x.double().abs(), weight.abs())
    assert got.shape == want.shape
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.isnan(), want.isnan())
    wrong = ((got.double() - want).abs() > slack) & ~want.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 40, 32), (3, 131, 96), (17, 256, 320), (64, 1536, 512), (65, 200, 64), (200, 144, 1088)]
)
def test_the_product_is_that_of_the_decoded_operands(name, m, n, k):
    mx = make(n, k, FORMATS[name], bias=n != 200)
    x = activations(m, k)
    assert_equals_oracle(mx, x, mx(x))


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        CudaConfig(8, 2, 4, 2, 2, 1, 2),
        CudaConfig(8, 3, 4, 2, 4, 2, 2),
        CudaConfig(8, 1, 12, 1, 8, 1, 3),
        CudaConfig(4, 4, 4, 2, 2, 2, 1),
        CudaConfig(2, 1, 4, 4, 1, 1, 2),
        CudaConfig(1, 4, 4, 1, 1, 1, 4),
        CudaConfig(8, 1, 4, 4, 4, 1, 1, blocks=2),
        CudaConfig(16, 2, 4, 1, 4, 1, 2),
        CudaConfig(8, 1, 4, 2, 1, 2, 2, share=4),
        CudaConfig(8, 1, 8, 1, 3, 2, 2, share=2),
        CudaConfig(1, 2, 4, 2, 1, 1, 2, share=2),
        CudaConfig(32, 1, 8, 1, 8, 1, 2),
    ],
    ids=str,
)
def test_every_launch_shape_computes_the_same(config, dependent, monkeypatch):
    monkeypatch.setattr(launch, "ENABLED", dependent)
    for fmt in (W8A16, FORMATS["W4A16"]):
        mx = make(720, 1536, fmt)
        mx.config = config
        x = activations(70, 1536)
        assert_equals_oracle(mx, x, mx(x))
        assert torch.equal(mx(x), mx(x))


def test_rows_do_not_touch_each_other():
    mx = make(320, 512, W8A16)
    x = activations(64, 512)
    x[5, 7], x[9, 100] = torch.nan, torch.inf
    got, clean = mx(x), mx(x.nan_to_num(0, 0, 0))
    keep = [row for row in range(64) if row not in (5, 9)]
    assert got[5].isnan().all()
    assert not got[9].isfinite().any()
    assert torch.equal(got[keep], clean[keep])


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
def test_every_code_point_under_every_scale(fmt):
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 32)
    if fmt.bits == 8:
        codes = torch.where((codes & 0x7F) >= {"e4m3": 0x7F, "e5m2": 0x7C}[fmt.name], 0, codes)
    else:
        codes = codes.view(-1, 16)
    for low in (20, 60, 100, 140):
        scales = torch.arange(low, low + 16, dtype=torch.uint8).repeat_interleave(len(codes))
        blocks = MXBlocks(codes.repeat(16, 1).to(DEVICE), scales[:, None].to(DEVICE))
        mx = CudaMXLinear.from_weight(MXWeight(blocks, None, LinearFormat(fmt, ScaleMode.rceil, Activation.bf16)))
        got = mx(torch.eye(32, device=DEVICE).bfloat16())
        assert torch.equal(got, decode(blocks, fmt).t())


def test_a_weight_it_cannot_hold_goes_to_triton_and_says_so():
    linear = nn.Linear(64, 64).bfloat16().to(DEVICE).requires_grad_(False)
    linear.weight[0, 0], linear.weight[1] = 1e38, 1e-20
    mx = cuda_linear.build(nearest(linear, W8A16))
    assert isinstance(mx, TritonMXLinear)
    assert "kernel=triton, since its block scales reach" in mx.note


def test_it_compiles_to_one_graph_and_replays():
    mx, x = make(768, 512, W8A16), activations(64, 512)
    compiled = torch.compile(lambda x: mx(x * 2) + 1, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        got = compiled(x).clone()
    torch.testing.assert_close(got, mx(x * 2) + 1, rtol=2**-7, atol=2**-6)


def test_a_captured_graph_reads_what_its_input_then_holds():
    mx, x = make(768, 512, FORMATS["W4A16"]), activations(64, 512)
    mx(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mx(x)
    x.copy_(activations(64, 512))
    graph.replay()
    torch.cuda.synchronize()
    assert_equals_oracle(mx, x, out)


def mlps(name):
    """The same MLP with SiLU as a call of its own, and in `fc1`."""
    plain = MLP(512, 2048, 512)
    plain.fc1, plain.fc2 = make(2048, 512, FORMATS[name]), make(512, 2048, FORMATS[name])
    fused = copy.deepcopy(plain)
    assert fused.fc1.absorb(fused.act)
    fused.act = nn.Identity()
    return plain, fused


def test_silu_of_every_bf16_value_is_that_of_torch():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    blocks = MXBlocks(torch.zeros(2**16, 32, dtype=torch.uint8), torch.full((2**16, 1), 127, dtype=torch.uint8))
    mx = CudaMXLinear.from_weight(MXWeight(MXBlocks(*(part.to(DEVICE) for part in blocks)), every, W8A16))
    assert mx.absorb(nn.SiLU())
    got, want = mx(torch.zeros(1, 32, device=DEVICE).bfloat16())[0], F.silu(every)
    assert torch.equal(got.isnan(), want.isnan())
    differing = (got != want) & ~want.isnan()
    assert set(every[differing].tolist()) <= {-(2**-8), 2**-7, 5.9375}  # see `silu` in mx_linear.cu
    torch.testing.assert_close(got[differing], want[differing], rtol=2**-7, atol=0)


@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("name", FORMATS)
def test_silu_in_the_kernel_is_silu_behind_it(name, rows):
    plain, fused = mlps(name)
    x = torch.randn(rows, 512, device=DEVICE).bfloat16()
    want = F.silu(plain.fc1(x))
    torch.testing.assert_close(fused.fc1(x), want, rtol=2**-7, atol=0)
    assert (fused.fc1(x) != want).sum() <= want.numel() // 1000
    assert torch.equal(fused.fc1.linear(x), plain.fc1(x))
    torch.testing.assert_close(fused(x), plain(x), rtol=2**-6, atol=2**-6 * plain(x).abs().max().item())


@pytest.mark.parametrize("name", ["W8A16", "W4A4"])
def test_an_mlp_with_silu_in_the_kernel_compiles_to_one_graph_and_replays(name):
    _, fused = mlps(name)
    x = torch.randn(64, 512, device=DEVICE).bfloat16()
    compiled = torch.compile(lambda x: fused(x * 2) + 1, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        got = compiled(x).clone()
    want = fused(x * 2) + 1
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6 * want.abs().max().item())


def test_stacked_linears_give_their_outputs_side_by_side():
    members = [make(64 * i, 256, W8A16) for i in (1, 2, 3)]
    x = activations(2, 256)
    want = torch.cat([m(x) for m in members], dim=1)
    stacked = members[0].stacked(members[1:])
    assert torch.equal(stacked(x), want)
    assert torch.equal(torch.cat([m(x) for m in members], dim=1), want)
    assert members[1].tiles.untyped_storage().data_ptr() == stacked.tiles.untyped_storage().data_ptr()
    assert members[0].stacked(members[1:]).tiles.data_ptr() == stacked.tiles.data_ptr()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("large", [False, True], ids=["", "scales held smaller"])
def test_of_many_rows_the_weight_is_unpacked(name, large, monkeypatch):
    asked = []
    monkeypatch.setattr(cuda_ops, "unpack", lambda *args, real=cuda_ops.unpack: asked.append(args) or real(*args))
    for bias in (True, False):
        linear = nn.Linear(352, 712, bias=bias).bfloat16().requires_grad_(False)
        linear.weight[7] *= 2.0 ** (large * (40 if name == "E5M2" else 26))
        mx = cuda_linear.build(nearest(linear.to(DEVICE), FORMATS[name]))
        assert (mx.output_scale > 1) is large
        few, many = activations(MANY_ROWS, 352), activations(MANY_ROWS + 1, 352)
        assert_equals_oracle(mx, few, mx(few))
        assert not asked
        assert_equals_oracle(mx, many, mx(many))
        assert len(asked) == 1
        want = F.silu(mx(many))
        assert mx.absorb(nn.SiLU())
        assert torch.equal(mx(many), want)
        asked.clear()


def test_of_many_rows_a_packed_bf16_weight_is_a_librarys_too():
    linear = nn.Linear(352, 712).bfloat16().to(DEVICE).requires_grad_(False)
    packed, x = PackedBF16Linear.from_linear(linear), activations(MANY_ROWS + 1, 352)
    assert torch.equal(packed(x), linear(x))
    assert packed.absorb(nn.SiLU())
    assert torch.equal(packed(x), F.silu(linear(x)))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
def test_an_unpacked_weight_is_the_decoded_one(fmt):
    weight = torch.randn(200, 1088, device=DEVICE) * torch.exp2(torch.randint(-8, 8, (200, 1), device=DEVICE).float())
    blocks = encode(weight.bfloat16(), fmt)
    mx = CudaMXLinear.from_weight(MXWeight(blocks, None, LinearFormat(fmt, ScaleMode.rceil, Activation.bf16)))
    assert torch.equal(cuda_ops.unpack(mx.tiles, (200, 1088), fmt.name) * mx.output_scale, decode(blocks, fmt))


def test_stacked_bf16_linears_give_their_outputs_side_by_side():
    members = [PackedBF16Linear.from_linear(nn.Linear(256, 64 * i).bfloat16().to(DEVICE)) for i in (1, 2, 3)]
    x = activations(2, 256)
    assert torch.equal(members[0].stacked(members[1:])(x), torch.cat([m(x) for m in members], dim=1))


def test_inputs_that_are_not_laid_out_plainly():
    mx = make(96, 64, W8A16)
    wide = activations(10, 129)
    for x in (wide[:, 1:65], wide[:, :64], activations(64, 10).t(), activations(2, 5, 64)):
        assert_equals_oracle(mx, x.reshape(-1, 64), mx(x).reshape(-1, 96))
    assert mx(wide[:0, :64]).shape == (0, 96)
