"""SiLU moved into an MLP's `fc1`: what `apply_mx` does around the CUDA kernel, a CPU product in its place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.formats.mx import E4M3, FORMATS, decode
from harness.formats.scales import ScaleMode
from harness.kernels.cuda import ops as cuda_ops
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda.packing import CudaWeight
from harness.mx import transform
from harness.mx.conf import Activation, CategoryBits, MXConf
from harness.mx.dispatch import KERNELS
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears.base import LinearFormat, MXLinear
from harness.mx.linears.cuda import CudaMXLinear
from harness.mx.linears.triton import TritonMXLinear
from harness.mx.numerics import linear_error
from harness.mx.transform import apply_mx
from harness.mx.weights import nearest

W8A16 = LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16)


@pytest.fixture(autouse=True)
def cpu_product(monkeypatch):
    """`kernel=cuda` on a CPU."""

    def mx_linear(x, tiles, bias, out_features, element, output_scale, config, silu=False):
        fmt = FORMATS[element]
        weight = cuda_packing.unpack(CudaWeight(tiles, output_scale), fmt, out_features, x.shape[1])
        out = F.linear(x, decode(weight, fmt), bias)
        return F.silu(out) if silu else out

    monkeypatch.setattr(cuda_ops, "mx_linear", mx_linear)
    real = transform.resolve_kernel
    kernels = {kernel.name: kernel for kernel in KERNELS}
    monkeypatch.setattr(
        transform, "resolve_kernel", lambda name, *args: kernels["cuda"] if name == "cuda" else real(name, *args)
    )


def conf(kernel, scope="mlp", **others):
    return MXConf(enabled=True, scope=scope, kernel=kernel, **others)


def mlps(core):
    return [block.mlp for block in core.blocks]


@pytest.mark.parametrize("activation", list(Activation))
def test_a_fused_mlp_is_the_mlp(core, activation):
    plain = copy.deepcopy(core)
    summary = apply_mx(core, conf("cuda", activation=activation))
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        for layer, (fused, source) in enumerate(zip(mlps(core), mlps(plain), strict=True)):
            assert isinstance(fused.act, nn.Identity)
            assert (fused.fc1.silu, fused.fc2.silu) == (True, False)
            assert summary.fused_activations[f"transformer.blocks.{layer}.mlp.fc1"] == "SiLU"
            unfused = [cuda_linear.build(nearest(linear, fused.fc1.fmt)) for linear in (source.fc1, source.fc2)]
            assert torch.equal(fused(x), unfused[1](F.silu(unfused[0](x))))
            assert torch.equal(fused.fc1.linear(x), unfused[0](x))
    assert len(summary.fused_activations) == 3


def test_the_record_and_the_listing_say_so(core):
    summary = apply_mx(core, conf("cuda", scope="all"))
    names = [f"transformer.blocks.{layer}.mlp.fc1" for layer in range(3)]
    assert summary.to_dict()["fused_activations"] == dict.fromkeys(names, "SiLU")
    assert "\n  SiLU in the kernel of transformer.blocks.{0-2}.mlp.fc1\n" in summary.listing()


def test_only_what_became_such_a_linear_is_fused(core):
    with torch.no_grad():
        mlps(core)[1].fc1.weight[0, 0], mlps(core)[1].fc1.weight[1] = 1e38, 1e-20
    summary = apply_mx(core, conf("cuda", exclude=["*.2.mlp.fc1"]))
    assert list(summary.fused_activations) == ["transformer.blocks.0.mlp.fc1"]
    kinds = [type(mlp.fc1) for mlp in mlps(core)]
    assert kinds == [CudaMXLinear, TritonMXLinear, nn.Linear]
    assert [type(mlp.act) for mlp in mlps(core)] == [nn.Identity, nn.SiLU, nn.SiLU]
    assert isinstance(core.t_embed.mlp.act, nn.SiLU)


@pytest.mark.parametrize("scope", ["attn", "modulation"])
def test_another_scope_leaves_the_mlps(core, scope):
    assert apply_mx(core, conf("cuda", scope)).fused_activations == {}
    assert all(isinstance(mlp.act, nn.SiLU) for mlp in mlps(core))


def test_another_kernel_leaves_the_activation_where_it_is(core):
    summary = apply_mx(core, conf("emulated", bits_by_category=CategoryBits(mlp=4), include=["*"]))
    assert summary.fused_activations == {}
    assert "SiLU" not in summary.listing()
    assert all(isinstance(mlp.act, nn.SiLU) for mlp in mlps(core))


def test_the_whole_model_gives_what_it_gives_unfused(core):
    emulated = copy.deepcopy(core)
    apply_mx(core, conf("cuda"))
    apply_mx(emulated, conf("emulated"))
    x, t = torch.randn(1, 2, 4, 2, 2).bfloat16(), torch.tensor([[0.25, 1.0]]).bfloat16()
    controls = torch.randn(1, 2, 2).bfloat16(), torch.zeros(1, 2, 11).bfloat16()
    with torch.no_grad():
        assert torch.equal(core(x, t, *controls), emulated(x, t, *controls))


def test_numerics_are_those_of_the_linear_alone():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48).bfloat16().requires_grad_(False), torch.randn(20, 64).bfloat16()
    mx = cuda_linear.build(nearest(linear, W8A16))
    before = linear_error(linear, mx, x)
    assert mx.absorb(nn.SiLU())
    assert linear_error(linear, mx, x) == before
    assert not torch.equal(mx(x), mx.linear(x))
    assert before["rel"] < 0.05


def test_a_linear_takes_over_one_silu_and_nothing_else():
    mx = cuda_linear.build(nearest(nn.Linear(64, 32).bfloat16().requires_grad_(False), W8A16))
    assert not mx.absorb(nn.GELU())
    assert not mx.silu
    assert mx.absorb(nn.SiLU())
    assert not mx.absorb(nn.SiLU())
    assert "then SiLU" in repr(mx)
    emulated = MXLinear(nearest(nn.Linear(64, 32).bfloat16(), W8A16))
    assert not emulated.absorb(nn.SiLU())


def test_what_is_stacked_has_silu_behind_all_or_none():
    members = [cuda_linear.build(nearest(nn.Linear(64, 32).bfloat16().requires_grad_(False), W8A16)) for _ in range(3)]
    for mx in members[:2]:
        mx.absorb(nn.SiLU())
    assert members[0].stacked(members[2:]) is None
    assert members[2].stacked(members[:1]) is None
    x = torch.randn(4, 64).bfloat16()
    stacked = members[0].stacked(members[1:2])
    assert torch.equal(stacked(x), torch.cat([m(x) for m in members[:2]], dim=1))
