"""BF16 Linears on a CPU without BF16 instructions go by way of float32: the same arithmetic, less time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.models import bf16
from harness.models.bf16 import WideLinear, has_fast_bf16, linear, widen


@pytest.fixture(params=[True, False], ids=["with BF16", "without"])
def cpu(request, monkeypatch):
    monkeypatch.setattr(bf16, "CPU_HAS_BF16", request.param)
    return request.param


def test_products_are_rounded_once(cpu):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((5, 7, 192), (40, 192), (40,)))
    got = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    slack = 2**-8 * exact.abs() + 2**-20 * F.linear(x.double().abs(), weight.double().abs())
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= slack).all()
    assert linear(x, weight).shape == (5, 7, 40)


def test_float32_is_left_alone(cpu):
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_only_plain_bf16_linears_are_widened(cpu):
    class Special(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8), Special(8, 8).bfloat16(), nn.SiLU())
    names = list(module.state_dict())
    assert widen(module) is module
    assert [type(layer) for layer in module] == [nn.Linear if cpu else WideLinear, nn.Linear, Special, nn.SiLU]
    assert list(module.state_dict()) == names


def test_a_gpu_has_bf16(monkeypatch):
    monkeypatch.setattr(bf16, "CPU_HAS_BF16", False)
    assert has_fast_bf16(torch.device("cuda"))
    assert not has_fast_bf16(torch.device("cpu"))
