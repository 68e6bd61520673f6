"""`kernel=triton` against the emulated arithmetic. On a machine without a GPU Triton's interpreter runs the kernels."""

# ruff: noqa: E402  (what follows the skips needs the package triton)
import importlib.util
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy below 2.4", allow_module_level=True)
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from harness.formats.mx import BLOCK, E2M1, E4M3, E5M2, FORMATS, MXBlocks, decode, encode, scale_values
from harness.formats.scales import ScaleMode
from harness.kernels.triton import ops as triton_ops
from harness.kernels.triton.shapes import GemmConfig
from harness.mx.conf import Activation
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.mx.linears.triton import TritonMXLinear
from harness.mx.weights import nearest

DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
W8A16 = LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16)
W5A16 = LinearFormat(E5M2, ScaleMode.rceil, Activation.bf16)
W4A16 = LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16)
W8A8 = LinearFormat(E4M3, ScaleMode.rceil, Activation.mx)
W4A8 = LinearFormat(E2M1, ScaleMode.floor, Activation.mxfp8)
W4A4 = LinearFormat(E2M1, ScaleMode.even, Activation.mx)
WAYS = [
    pytest.param(fmt, path, id=f"{name}-{path}")
    for name, fmt, paths in (
        ("W8A16", W8A16, ["bf16"]),
        ("E5M2", W5A16, ["bf16"]),
        ("W4A16", W4A16, ["bf16"]),
        ("W8A8", W8A8, ["bf16", "fp8"]),
        ("W4A8", W4A8, ["bf16", "fp8"]),
        ("W4A4", W4A4, ["bf16", "fp8"]),
    )
    for path in paths
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(n, k, fmt, path, bias=True, scale=0.05):
    linear = nn.Linear(k, n, bias=bias).bfloat16().requires_grad_(False)
    linear.weight.mul_(scale * 10).mul_(torch.exp2(torch.randint(-6, 3, (n, 1)).float()))
    return TritonMXLinear.from_weight(nearest(linear.to(DEVICE), fmt), path)


def activations(*shape):
    x = torch.randn(*shape) * torch.exp2(torch.randint(-8, 8, (*shape[:-1], 1)).float())
    return x.bfloat16().to(DEVICE)


def operands(mx, x):
    """Both operands as every kernel must see them, float64."""
    element = mx.fmt.activation_element
    x = x if element is None else decode(encode(x, element, mx.fmt.scale_mode), element)
    return x.double(), decode(mx.weight_blocks(), mx.fmt.element).double()


def assert_equals_oracle(mx, x, got):
    xs, ws = operands(mx, x)
    want = F.linear(xs, ws, None if mx.bias is None else mx.bias.double())
    # BF16 output; FP8 tensor cores keep about 14 bits of a block's products
    slack = 2**-8 * want.abs() + 2**-12 * F.linear(xs.abs(), ws.abs()) + 1e-30
    assert got.shape == want.shape
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.isnan(), want.isnan())
    wrong = ((got.double() - want).abs() > slack) & ~want.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values"


@pytest.mark.parametrize(("fmt", "path"), WAYS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 32), (3, 130, 96), (65, 20, 64)])
def test_the_product_is_that_of_the_decoded_operands(fmt, path, m, n, k):
    mx = make(n, k, fmt, path, bias=n != 20)
    x = activations(m, k)
    assert_equals_oracle(mx, x, mx(x))


@pytest.mark.parametrize(("fmt", "path"), WAYS)
@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swapped"])
@pytest.mark.parametrize("split", [1, 3])
def test_every_launch_shape_gives_the_same_product(fmt, path, swap, split):
    mx = make(20, 768, fmt, path)
    x = activations(4, 768)
    mx.config = GemmConfig(16 if not ON_GPU or swap else 64, 64, split, 4, 3, swap)
    first = mx(x)
    assert_equals_oracle(mx, x, first)
    assert torch.equal(first, mx(x))  # partial sums are added in a fixed order
    assert not mx.arrived.any()


@pytest.mark.parametrize(("fmt", "path"), WAYS)
def test_leading_dimensions_and_strides_do_not_matter(fmt, path):
    mx = make(32, 64, fmt, path)
    x = activations(2, 64, 3).transpose(1, 2)
    assert torch.equal(mx(x), mx(x.contiguous().flatten(0, 1)).view(2, 3, 32))


@pytest.mark.parametrize(("fmt", "path"), WAYS)
def test_wide_scales_need_no_luck(fmt, path):
    """Scales from 2^-67 to 2^73 beside each other, NaN blocks and zero blocks; activations to match."""
    n, k = 20, 96
    scales = torch.randint(60, 200, (n, k // BLOCK), dtype=torch.uint8)
    elements = torch.randint(0, 256, (n, k * fmt.element.bits // 8), dtype=torch.uint8)
    if fmt.element.bits == 8:
        elements &= 0xBB if fmt.element is E5M2 else 0xFE
    scales[3, 2] = 255
    scales[4], elements[5] = 0, 0
    mx = TritonMXLinear.from_weight(MXWeight(MXBlocks(elements.to(DEVICE), scales.to(DEVICE)), None, fmt), path)
    assert mx.wide
    x = activations(6, k) * torch.exp2(torch.randint(-30, 20, (6, k // BLOCK, 1)).float()).expand(
        -1, -1, BLOCK
    ).reshape(6, k).to(DEVICE)
    assert_equals_oracle(mx, x.bfloat16(), mx(x.bfloat16()))


@pytest.mark.parametrize(("fmt", "path"), WAYS)
def test_nan_and_zero_in_the_activations(fmt, path):
    mx = make(33, 128, fmt, path)
    x = activations(4, 128)
    x[0, 5] = float("nan")
    x[1] = 0
    x[2, :BLOCK] = -0.0
    assert_equals_oracle(mx, x, mx(x))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("wide", [False, True], ids=["short", "wide"])
def test_every_code_under_every_scale_decodes_exactly(fmt, wide):
    """One row of activations with a single one at a time picks out each weight's value."""
    spare = {"e4m3": 120, "e5m2": 112, "e2m1": 126}[fmt.name]
    scales = torch.arange(0 if wide else 1, 256 if wide else 255 - spare, dtype=torch.int32).to(torch.uint8)[:, None]
    codes = torch.arange(BLOCK * fmt.bits // 8, dtype=torch.uint8) * (255 // (BLOCK * fmt.bits // 8 - 1))
    if fmt.bits == 8 and not wide:
        codes &= 0xBB if fmt is E5M2 else 0xFE
    blocks = MXBlocks(codes.repeat(len(scales), 1).to(DEVICE), scales.to(DEVICE))
    mx = TritonMXLinear.from_weight(MXWeight(blocks, None, LinearFormat(fmt, ScaleMode.rceil, Activation.bf16)))
    mx.wide = wide
    got = mx(torch.eye(BLOCK, dtype=torch.bfloat16, device=DEVICE)).t()
    want = decode(blocks, fmt)
    finite = want.isfinite().all(dim=1)  # 0 times infinity or NaN is NaN
    subnormal = (want != 0) & (want.abs() < 2.0**-126)  # may be flushed
    assert torch.equal(got[finite].masked_fill(subnormal[finite], 0), want[finite].masked_fill(subnormal[finite], 0))
    assert got[~finite].isnan().any(dim=1).all()


@pytest.mark.parametrize("mode", list(ScaleMode))
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_activations_are_encoded_as_in_formats(fmt, mode):
    x = activations(9, 96)
    x[0, 3], x[1, 40], x[2, :BLOCK], x[3, :BLOCK], x[4, 0] = float("nan"), float("inf"), 0, -0.0, 3e38
    x[5] *= 1e-30
    x[6] *= 2.0**-126 / 16  # under the smallest scale
    blocks = encode(x, fmt, mode)
    want = decode(blocks, fmt)
    torch.testing.assert_close(triton_ops.round_to_mx(x, fmt.name, str(mode)), want, rtol=0, atol=0, equal_nan=True)
    if fmt is E5M2:
        return
    elements, scales = triton_ops.quantise(x, fmt.name, str(mode))
    torch.testing.assert_close(scales.t(), scale_values(blocks.scales, torch.float32), rtol=0, atol=0, equal_nan=True)
    values = elements.transpose(0, 1).contiguous().view(torch.float8_e4m3fn).float() * scales.t()[:, :, None]
    torch.testing.assert_close(values.flatten(1), decode(blocks, fmt, torch.float32), rtol=0, atol=0, equal_nan=True)


def test_the_packed_module_keeps_blocks_and_size():
    linear = nn.Linear(256, 128).bfloat16().requires_grad_(False)
    mx = TritonMXLinear.from_weight(nearest(linear.to(DEVICE), W4A16))
    for got, want in zip(mx.weight_blocks(), encode(linear.weight, E2M1), strict=True):
        assert torch.equal(got.cpu(), want.cpu())
    assert mx.weight_bytes() < linear.weight.nbytes / 3.5 + mx.arrived.nbytes + 256
    assert "W4A16" in repr(mx)


@pytest.mark.parametrize(("fmt", "path"), [(W4A16, "bf16"), (W8A8, "fp8")], ids=["W4A16", "W8A8"])
def test_stacked_linears_share_one_weight_and_give_the_same(fmt, path):
    members = [make(n, 64, fmt, path) for n in (128, 256)]
    x = activations(2, 64)
    before, blocks = [m(x) for m in members], [m.weight_blocks() for m in members]
    for _ in range(2):
        stack = members[0].stacked(members[1:])
        assert torch.equal(stack(x), torch.cat(before, dim=1))
        for m, kept, out in zip(members, blocks, before, strict=True):
            assert m.elements.untyped_storage().data_ptr() == stack.elements.untyped_storage().data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(m.weight_blocks(), kept, strict=True))
            assert torch.equal(m(x), out)
    assert stack.weight_bytes() < sum(m.weight_bytes() for m in members) + 4 * stack.arrived.numel()


def test_linears_that_do_not_fit_together_are_not_stacked():
    first = make(128, 64, W4A16, "bf16")
    assert first.stacked([make(128, 96, W4A16, "bf16")]) is None
    assert first.stacked([make(40, 64, W4A16, "bf16")]) is None
    assert first.stacked([make(128, 64, W8A16, "bf16")]) is None
    assert first.stacked([nn.Linear(64, 128)]) is None


def test_fp8_tensor_cores_are_refused_for_bf16_activations():
    with pytest.raises(ValueError, match="path=fp8 cannot compute W8A16"):
        make(32, 32, W8A16, "fp8")


def test_too_few_counters_are_an_error():
    mx = make(32, 1024, W8A16, "bf16")
    mx.config = GemmConfig(16, 16, 2, 4, 3, True)
    with pytest.raises(ValueError, match="use split_k=1"):
        mx(activations(5000, 1024))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("fmt", "path"), WAYS)
def test_compiles_without_graph_breaks_and_replays_from_a_cuda_graph(fmt, path):
    """What makes the activations is a product of BF16 values: it has one right rounding, fused or not."""
    mx = make(1536, 1536, fmt, path)
    mx.config = GemmConfig(64, 64, 4, 4, 3, path == "fp8")
    x, gate = activations(64, 1536), torch.randn(1536).bfloat16().to(DEVICE)
    compiled = torch.compile(lambda x: mx(x * gate), fullgraph=True)
    plain = mx(x * gate)
    assert_equals_oracle(mx, x * gate, compiled(x))
    assert torch.equal(compiled(x), plain)
    graph, out = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        out = mx(x * gate)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, plain)
    assert not mx.arrived.any()
