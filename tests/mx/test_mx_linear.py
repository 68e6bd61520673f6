import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
from torchao.quantization import quantize_

from harness.formats.mx import E2M1, E4M3, E5M2, decode
from harness.formats.scales import ScaleMode
from harness.mx.conf import Activation
from harness.mx.linears.base import LinearFormat, MXLinear
from harness.mx.linears.torchao import TorchaoMXLinear, torchao_config
from harness.mx.weights import nearest

TORCHAO = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}
ELEMENTS = pytest.mark.parametrize("element", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
MODES = pytest.mark.parametrize("mode", list(ScaleMode))


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 80).to(torch.bfloat16).requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@ELEMENTS
@MODES
def test_weight_only_is_linear_with_the_decoded_weight_bit_for_bit(linear, x, element, mode):
    mx = MXLinear(nearest(linear, LinearFormat(element, mode, Activation.bf16)))
    assert torch.equal(mx(x), F.linear(x, decode(mx.weight_blocks(), element), linear.bias))
    assert mx(x).dtype == torch.bfloat16
    assert mx(x).shape == (2, 5, 80)


@ELEMENTS
@MODES
def test_the_weight_is_torchaos_bit_for_bit(linear, element, mode):
    mx = MXLinear(nearest(linear, LinearFormat(element, mode, Activation.bf16)))
    theirs = MXTensor.to_mx(linear.weight, TORCHAO[element.name], 32, ScaleCalculationMode(mode.value))
    assert torch.equal(decode(mx.weight_blocks(), element), theirs.dequantize())
    assert torch.equal(mx.elements, theirs.qdata.view(torch.uint8))
    assert torch.equal(mx.scales, theirs.scale.view(torch.uint8))


@ELEMENTS
@MODES
def test_dynamic_activation_is_torchaos_quantize_bit_for_bit(linear, x, element, mode):
    fmt = LinearFormat(element, mode, Activation.mx)
    mx = TorchaoMXLinear.from_weight(nearest(linear, fmt), native=False)
    assert isinstance(mx.weight.data, MXTensor)
    weight_only = MXLinear(nearest(linear, fmt))
    assert all(map(torch.equal, mx.weight_blocks(), weight_only.weight_blocks()))
    got = mx(x)
    quantize_(linear, torchao_config(fmt, native=False))
    assert torch.equal(got, linear(x))


@ELEMENTS
def test_dynamic_activation_is_the_product_of_both_decoded_operands(linear, x, element):
    fmt = LinearFormat(element, ScaleMode.rceil, Activation.mx)
    mx = TorchaoMXLinear.from_weight(nearest(linear, fmt), native=False)
    x_mx = MXTensor.to_mx(x, TORCHAO[element.name], 32, ScaleCalculationMode.RCEIL).dequantize()
    want = F.linear(x_mx, decode(mx.weight_blocks(), element), linear.bias)
    torch.testing.assert_close(mx(x), want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("build", [MXLinear, lambda weight: TorchaoMXLinear.from_weight(weight, native=False)])
def test_without_bias_and_on_strided_input(build, x):
    linear = nn.Linear(96, 64, bias=False).to(torch.bfloat16).requires_grad_(False)
    mx = build(nearest(linear, LinearFormat(E4M3, ScaleMode.rceil, Activation.mx)))
    strided = x.transpose(0, 1)
    assert torch.equal(mx(strided), mx(strided.contiguous()))


@pytest.mark.parametrize(("element", "per_weight"), [(E4M3, 8 + 8 / 32), (E2M1, 4 + 8 / 32)], ids=["e4m3", "e2m1"])
def test_memory_is_that_of_the_packed_weight(linear, x, element, per_weight):
    mx = MXLinear(nearest(linear, LinearFormat(element, ScaleMode.rceil, Activation.bf16)))
    mx(x)
    held = sum(t.nbytes for t in [*mx.buffers(), *mx.parameters()])
    assert held == mx.weight_bytes() == 96 * 80 * per_weight / 8 + 2 * 80
    assert not any(isinstance(v, torch.Tensor) for v in vars(mx).values())


def test_state_dict_round_trip(linear, x):
    fmt = LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16)
    mx = MXLinear(nearest(linear, fmt))
    other = MXLinear(nearest(nn.Linear(96, 80).to(torch.bfloat16), fmt))
    other.load_state_dict(mx.state_dict())
    assert torch.equal(mx(x), other(x))


def test_printing_names_the_numeric_path(linear):
    mx = MXLinear(nearest(linear, LinearFormat(E2M1, ScaleMode.floor, Activation.bf16)))
    assert "in_features=96, out_features=80, bias=True, W4A16 E2M1 weights, floor scales" in repr(mx)


@pytest.mark.parametrize("mode", [ScaleMode.rceil, ScaleMode.even])
@ELEMENTS
def test_one_graph_and_the_same_numbers_when_traced(linear, x, element, mode):
    """One full graph through dynamo and AOT autograd, without a code generator."""
    first = MXLinear(nearest(linear, LinearFormat(element, mode, Activation.bf16)))
    second = TorchaoMXLinear.from_weight(nearest(linear, LinearFormat(element, mode, Activation.mx)), native=False)
    model = nn.ModuleList([first, second])

    def both(x):
        return [m(x) for m in model]

    torch._dynamo.reset()
    traced = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert all(map(torch.equal, traced, both(x)))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_numbers_of_eager(linear, x):
    """MXFP4 emulated and compiled once had a low SQNR in torchao; here nothing may change at all."""
    weight_only = [
        LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16),
        LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16),
    ]
    model = nn.ModuleList(MXLinear(nearest(linear, fmt)) for fmt in weight_only)
    dynamic = LinearFormat(E2M1, ScaleMode.rceil, Activation.mx)
    model.append(TorchaoMXLinear.from_weight(nearest(linear, dynamic), native=False))

    def every(x):
        return [m(x) for m in model]

    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True)(x)
    assert all(map(torch.equal, compiled, every(x)))
