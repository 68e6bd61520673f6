"""BF16 Linears in our kernel's form: packing and its undoing; what it computes is for tests/mx/test_mx_cuda.py."""

import copy
from dataclasses import replace

import pytest
import torch
from rollout_cases import make_core
from torch import nn

from harness.kernels.cuda import linear as cuda_linear
from harness.kernels.cuda.linear import PackedBF16Linear
from harness.mx.conf import MXConf, Scope
from harness.mx.transform import apply_mx
from harness.rollout import AttentionKind, CompileConf
from harness.rollout.linears import is_packed, pack, pack_where_faster, unpack, validate

FUSED = AttentionKind.fused


@pytest.fixture
def core():
    return make_core(n_layers=2, d_model=64, n_heads=2).bfloat16().requires_grad_(False)


def test_unpacking_gives_every_bit_back(core):
    plain = copy.deepcopy(core)
    assert pack(core) == 16
    block = core.blocks[0]
    assert isinstance(block.attn.qkv, PackedBF16Linear)
    assert block.mlp.fc1.silu
    assert isinstance(block.mlp.act, nn.Identity)
    assert isinstance(block.adaln1.fc, PackedBF16Linear)
    unpack(core)
    assert str(core) == str(plain)
    for (name, weight), (other, expected) in zip(core.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, expected)


def test_mx_linears_are_left_alone(core):
    apply_mx(core, MXConf(enabled=True, scope=Scope.mlp))
    expected = core.blocks[1].mlp.fc2.weight_blocks()
    assert pack(core) == 12
    assert not is_packed(core.blocks[1].mlp.fc2)
    unpack(core)
    assert type(core.blocks[1].attn.out) is nn.Linear
    for got, want in zip(core.blocks[1].mlp.fc2.weight_blocks(), expected, strict=True):
        assert torch.equal(got, want)


def test_auto_packs_where_it_is_faster(core, monkeypatch):
    monkeypatch.setattr(cuda_linear, "unavailable", lambda device: None)
    captured = CompileConf(enabled=True, cuda_graph=True)
    assert pack_where_faster(core, CompileConf(), FUSED, 1) == 0
    assert pack_where_faster(core, captured, AttentionKind.sdpa, 1) == 0
    assert pack_where_faster(core, captured, FUSED, 1 + 128 // core.cfg.tokens_per_frame) == 0
    assert pack_where_faster(core, CompileConf(enabled=True, cuda_graph=True, linears="library"), FUSED, 1) == 0
    assert pack_where_faster(core, captured, FUSED, 128 // core.cfg.tokens_per_frame) == 16


@pytest.mark.parametrize(("width", "rows", "packs"), [(2560, 64, True), (2560, 128, False), (1536, 128, True)])
def test_a_wide_model_is_packed_for_few_rows_alone(core, monkeypatch, width, rows, packs):
    monkeypatch.setattr(cuda_linear, "unavailable", lambda device: None)
    core.cfg = replace(core.cfg, d_model=width)
    captured = CompileConf(enabled=True, cuda_graph=True)
    assert bool(pack_where_faster(core, captured, FUSED, rows // core.cfg.tokens_per_frame)) is packs


def test_packed_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match=r"compile\.linears=packed: the CUDA kernel needs .*; use compile"):
        validate(CompileConf(linears="packed"), torch.device("cpu"))
    validate(CompileConf(), torch.device("cpu"))
