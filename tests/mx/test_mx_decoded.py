"""Weights of emulated MX Linears kept decoded: the same bits, said so, and not beyond what memory allows."""

import copy

import pytest
import torch
from torch import nn

from harness.models.checkpoint import random_gamerft
from harness.models.gamerft import GameRFTConfig
from harness.mx.conf import Activation, MXConf, Scope
from harness.mx.linears import decoded
from harness.mx.linears.base import MXLinear
from harness.mx.linears.decoded import DecodedMXLinear, KeepDecoded, keep_decoded
from harness.mx.transform import apply_mx

CFG = GameRFTConfig(n_layers=2, n_heads=1, d_model=32, channels=8, sample_size=4, tokens_per_frame=16, n_buttons=11)


@pytest.fixture
def model():
    return random_gamerft(CFG, 1).to(torch.bfloat16)


def transformed(model, **fields):
    apply_mx(model, MXConf(enabled=True, scope=Scope.all, **fields))
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", [Activation.bf16, Activation.mxfp8])
def test_decoded_weights_give_the_same_bits(model, bits, activation):
    plain = transformed(model, bits=bits, activation=activation)
    kept = copy.deepcopy(plain)
    done = keep_decoded(kept, KeepDecoded.always)
    x = torch.randn(3, 2, 32).to(torch.bfloat16)
    pairs = [(one, two) for one, two in zip(plain.modules(), kept.modules(), strict=True) if isinstance(one, MXLinear)]
    assert done.linears == len(pairs) > 0
    for one, two in pairs:
        assert type(two) is DecodedMXLinear
        rows = x if one.in_features == 32 else torch.randn(4, one.in_features).to(torch.bfloat16)
        assert torch.equal(one(rows), two(rows))
        assert two.weight_bytes() == one.weight_bytes() + 2 * one.in_features * one.out_features
    assert done.nbytes == sum(2 * one.in_features * one.out_features for one, _ in pairs)
    assert "kept decoded" in done.note


def test_memory_decides_where_asked_to(model, monkeypatch):
    model = transformed(model, bits=4)
    monkeypatch.setattr(decoded, "free_memory", lambda: 1 << 10)
    assert keep_decoded(model, KeepDecoded.auto).linears == 0
    assert keep_decoded(model, KeepDecoded.never).note == "emulated weights decoded at every call"
    monkeypatch.setattr(decoded, "free_memory", lambda: 1 << 34)
    assert keep_decoded(model, KeepDecoded.auto).linears > 0


def test_a_model_without_emulated_weights_is_left_alone(model):
    assert keep_decoded(model, KeepDecoded.always).linears == 0
    assert any(type(module) is nn.Linear for module in model.modules())
    assert decoded.free_memory() > 1 << 20
