"""Layers whose norms are in their products: how a layer is put together, on a CPU; on a GPU the kernels at sizes of
models against float64, and whole rollouts. The kernels' source on a CPU: tests/mx/test_mx_cuda_source.py."""

# ruff: noqa: E402  (what follows the skip needs the package triton)
import copy
import importlib.util
from types import SimpleNamespace

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

from rollout_cases import exact_attention, filled_cache, make_core, make_inputs, make_rollout, play

from harness.formats.mx import E2M1, E4M3, E5M2
from harness.formats.scales import ScaleMode
from harness.kernels import launch
from harness.kernels.cuda import linear as kernels_linear
from harness.kernels.cuda import ops as cuda_ops
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda.linear import PackedBF16Linear
from harness.kernels.cuda.stream import Modulating, Stream
from harness.kv import KVConf, KVStorage
from harness.kv.conf import KVFormat, KVScales
from harness.models.gamerft import RMS_EPS, BlockModulation, attend_from_projection
from harness.mx.conf import Activation, MXConf
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears.base import LinearFormat
from harness.mx.transform import apply_mx
from harness.mx.weights import nearest
from harness.rollout import AttentionKind, CompileConf, SamplerConf, fused, make_cache, steps
from harness.rollout.attention import FusedAttention, joined
from harness.rollout.linears import pack
from harness.rollout.steps import streams, through_layer_streamed

DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
REASON = kernels_linear.unavailable(DEVICE) if ON_GPU else "needs a CUDA GPU"
hopper = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(autouse=True)
def whatever_gains(monkeypatch):
    """Layers of any width and format stream, whether they are faster so or not."""
    torch.manual_seed(0)
    monkeypatch.setattr(steps, "STREAMED", dict.fromkeys((4, 8, 16), 1536))


def modulated_rows(h, scale, shift):
    """What a kernel leaves of a stream of ``h``: float64 sums of squares in three parts."""
    modulated = torch.full((65, h.shape[1]), torch.nan, dtype=h.dtype, device=h.device)
    modulated[: len(h)] = (h.double() * (1 + scale.double())).to(h.dtype)
    modulated[64] = shift
    squares = torch.stack([part.double().square().sum(1) for part in h.tensor_split(3, dim=1)], 1)
    return Stream(h, modulated, squares.float())


@pytest.fixture
def cpu_products(monkeypatch):
    """The kernels' products by torch, in the stream's own dtype: what a layer is put together from, without a GPU."""

    def dense(weight, sizes):
        return cuda_packing.unpack_plain(weight.tiles, *sizes).float(), weight.bias.float()

    def normed_product(stream, weight, out_features, eps, config, silu):
        rows, k = stream.total.shape
        inverse = torch.rsqrt(stream.squares.sum(1, keepdim=True) / k + eps)
        x = stream.modulated[:rows].float() * inverse + stream.modulated[64].float()
        out = F.linear(x, *dense(weight, (out_features, k)))
        return F.silu(out) if silu else out

    def residual_product(x, weight, total, vectors, config):
        gate, scale, shift = (vector.reshape(-1).float() for vector in vectors)
        out = F.linear(x, *dense(weight, (total.shape[1], x.shape[1])))
        return modulated_rows(total + gate * out, scale, shift)

    monkeypatch.setattr(cuda_ops, "normed_product", normed_product)
    monkeypatch.setattr(cuda_ops, "residual_product", residual_product)


@pytest.mark.skipif(ON_GPU, reason="of Triton's interpreter")
@pytest.mark.usefixtures("cpu_products")
def test_layers_are_the_models_layers():
    """Two layers one after the other, as the model has them, in float32 over BF16 weights."""
    core = make_core(n_layers=2).bfloat16().requires_grad_(False)
    plain = copy.deepcopy(core).float()
    pack(core)
    tokens, dim = core.cfg.tokens_per_frame, core.cfg.d_model
    x = torch.randn(1, tokens, dim)
    mods = [BlockModulation(*(torch.randn(1, 1, dim) for _ in range(6))) for _ in range(3)]
    angles = torch.rand(tokens, core.cfg.head_dim // 2)
    rotary = angles.cos(), angles.sin()

    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def streamed(layer, qkv, stream, rotary):
        return attend_from_projection(attend, layer, qkv.normed(stream, RMS_EPS)[None], core.cfg.n_heads, rotary)[0]

    norms = [(mod.attn_scale, mod.attn_shift) for mod in mods]
    stream, want = modulated_rows(x[0], *(vector.flatten() for vector in norms[0])), x
    for block, other, mod, norm in zip(core.blocks, plain.blocks, mods, norms[1:], strict=False):
        assert streams(block, tokens)
        stream = through_layer_streamed(block, SimpleNamespace(streamed=streamed), stream, mod, norm, rotary)
        want = other(want, mod, rotary, attend)
    torch.testing.assert_close(stream.total[None], want, rtol=1e-4, atol=1e-4)


def test_what_streams(monkeypatch):
    core = make_core(n_layers=3).bfloat16().requires_grad_(False)
    assert not streams(core.blocks[0], 4)
    apply_mx(core, MXConf(enabled=True, kernel="emulated", include=["*.0.*"], scope="mlp", exclude=["*.1.*", "*.2.*"]))
    pack(core)
    assert not streams(core.blocks[0], 4)
    assert streams(core.blocks[1], 64)
    assert not streams(core.blocks[1], 65)
    core.blocks[2].mlp.fc1.silu = False
    assert not streams(core.blocks[2], 4)
    for widths in ({}, {16: 32}, {8: 1536}):
        monkeypatch.setattr(steps, "STREAMED", widths)
        assert not streams(core.blocks[1], 64)


def test_only_captured_frames_of_one_clip_do(monkeypatch):
    core = make_core(n_layers=2, channels=16, sample_size=4, tokens_per_frame=16).bfloat16().requires_grad_(False)
    pack(core)
    conf = CompileConf(enabled=True, cuda_graph=True)

    def asked(batch=1, attention=AttentionKind.fused, conf=conf, kv=None, core=core):
        return steps.all_stream(core, make_cache(core, SamplerConf(4), kv or KVConf(), batch), attention, conf)

    assert asked()
    other = make_core(n_layers=2).bfloat16().requires_grad_(False)  # of 8 channels and 4 tokens
    pack(other)
    assert not asked(core=other)
    assert not asked(batch=2)
    assert not asked(attention=AttentionKind.sdpa)
    assert not asked(conf=CompileConf(enabled=True))  # on a CPU nothing is captured
    assert not asked(conf=CompileConf(enabled=True, cuda_graph=True, scope="frame"))
    assert not asked(kv=KVConf(KVStorage.i8_scale))
    core.proj_in.float()
    assert not asked()
    core.proj_in.bfloat16()
    monkeypatch.setattr(steps, "streams", lambda block, rows: False)
    assert not asked()


FORMATS = {"BF16": None, "W8A16": E4M3, "E5M2": E5M2, "W4A16": E2M1}


def make(n, k, name):
    linear = nn.Linear(k, n).bfloat16().requires_grad_(False).to(DEVICE)
    if FORMATS[name] is None:
        return PackedBF16Linear.from_linear(linear)
    return cuda_linear.build(nearest(linear, LinearFormat(FORMATS[name], ScaleMode.rceil, Activation.bf16)))


def vectors(n):
    stacked = torch.randn(1, 2, 3 * n, device=DEVICE).bfloat16()
    return Modulating(*stacked[:, 1:].chunk(3, dim=-1))


def exactly(linear, x):
    return F.linear(x.double(), linear.dense_weight().double(), linear.bias.double())


SIZES = [(64, 4608, 1536), (64, 6144, 1536), (49, 7680, 2560), (64, 10240, 2560), (33, 200, 96), (3, 48, 512)]


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
class TestKernels:
    pytestmark = hopper

    def test_a_product_of_a_modulated_norm(self, m, n, k, name, dependent, monkeypatch):
        monkeypatch.setattr(launch, "ENABLED", dependent)
        linear, (_, scale, shift) = make(n, k, name), vectors(k)
        h = (torch.randn(m, k, device=DEVICE) * torch.exp2(torch.randint(-4, 8, (m, 1), device=DEVICE))).bfloat16()
        stream = modulated_rows(h, scale.flatten(), shift.flatten())
        got = linear.normed(stream, RMS_EPS)
        inverse = torch.rsqrt(h.double().square().mean(1, keepdim=True) + RMS_EPS)
        want = exactly(linear, stream.modulated[:m].double() * inverse + shift.flatten().double())
        terms = stream.modulated[:m].double().abs() * inverse + shift.flatten().double().abs()
        slack = 2**-8 * want.abs() + 2**-17 * F.linear(terms, linear.dense_weight().double().abs())
        assert ((got.double() - want).abs() <= slack).all()
        assert torch.equal(got, linear.normed(stream, RMS_EPS))
        # Of the norm itself no worse than one that is rounded to BF16.
        x = h.double() * inverse * (1 + scale.flatten().double()) + shift.flatten().double()
        exact, rounded = exactly(linear, x), exactly(linear, x.bfloat16()).bfloat16()
        assert (got.double() - exact).norm() < 1.1 * (rounded.double() - exact).norm()
        assert linear.absorb(nn.SiLU())
        assert torch.equal(linear.normed(stream, RMS_EPS), F.silu(got))

    def test_a_product_added_to_the_residual_stream(self, m, n, k, name, dependent, monkeypatch):
        monkeypatch.setattr(launch, "ENABLED", dependent)
        n, k = (k, n) if k % 16 == 0 and n % 32 == 0 else (48, 96)
        linear, given = make(n, k, name), vectors(n)
        x, before = (torch.randn(m, width, device=DEVICE).bfloat16() for width in (k, n))
        gate, scale, shift = (vector.flatten().double() for vector in given)
        stream, again = (linear.added(x, before, given) for _ in range(2))
        want = before.double() + gate * exactly(linear, x)
        terms = F.linear(x.double().abs(), linear.dense_weight().double().abs())
        slack = 2**-8 * (want.abs() + (gate * exactly(linear, x)).abs()) + 2**-17 * gate.abs() * terms
        assert ((stream.total.double() - want).abs() <= slack).all()
        modulated = stream.total.double() * (1 + scale)
        assert ((stream.modulated[:m].double() - modulated).abs() <= 2**-8 * modulated.abs()).all()
        assert torch.equal(stream.modulated[64].double(), shift)
        squares = stream.total.double().square().sum(1)
        torch.testing.assert_close(stream.squares.double().sum(1), squares, rtol=1e-5, atol=0)
        assert torch.equal(stream.total, again.total)
        assert torch.equal(stream.modulated[:m], again.modulated[:m])
        assert torch.equal(stream.squares, again.squares)


MX = KVStorage.mx
STORAGES = {
    "plain": KVConf(),
    "v_e4m3": KVConf(MX),
    "kv_e5m2_e4m3": KVConf(MX, quantize_k=True),
    "k_e5m2_v_e2m1": KVConf(MX, quantize_k=True, v_format=KVFormat.e2m1),
    "kv_e2m1": KVConf(MX, quantize_k=True, bits=4),
    "k_e5m2": KVConf(MX, quantize_k=True, quantize_v=False),
}
OTHERS = {
    "per_head": KVConf(MX, quantize_k=True, scales=KVScales.per_head_ema),
    "int8": KVConf(KVStorage.i8_scale, quantize_k=True),
    "turned": KVConf(MX, quantize_k=True, bits=4, hadamard=True),
}


def filled(conf, heads, frames):
    """A cache of one layer whose ring has gone round."""
    return filled_cache(conf, 1, heads, frames, 64, 64, torch.bfloat16, newer=3, device=DEVICE)


def a_layer(name, heads, width):
    """A projection, a residual stream in front of it and the frame's rotation."""
    qkv, (_, scale, shift) = make(192 * heads, width, name), vectors(width)
    stream = modulated_rows(torch.randn(64, width, device=DEVICE).bfloat16(), scale.flatten(), shift.flatten())
    angles = 6 * torch.rand(64, 32, device=DEVICE)
    return qkv, stream, (angles.cos(), angles.sin())


class TestAttention:
    """Of a frame, projection and attention in one launch."""

    pytestmark = hopper

    @pytest.mark.parametrize("dependent", [False, True])
    @pytest.mark.parametrize("store", [False, True])
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize(
        ("name", "heads", "width", "frames"),
        [
            ("BF16", 24, 1536, 60),
            ("W8A16", 24, 1536, 16),
            ("W4A16", 4, 320, 6),
            ("E5M2", 1, 64, 2),
            ("BF16", 33, 96, 1),
        ],
    )
    def test_it_is_as_close_to_float64_as_in_two(
        self, name, heads, width, frames, storage, store, dependent, monkeypatch
    ):
        monkeypatch.setattr(launch, "ENABLED", dependent)
        qkv, stream, rotary = a_layer(name, heads, width)
        one, two = (FusedAttention(filled(STORAGES[storage], heads, frames), store) for _ in range(2))
        assert joined(one.cache, 0, qkv, store) is not None
        projected = qkv.normed(stream, RMS_EPS)
        exact = exact_attention(filled(STORAGES[storage], heads, frames), projected[None], rotary, heads)[0]
        want = two.projected(0, projected[None], rotary)[0].double()
        got = one.streamed(0, qkv, stream, rotary)
        errors = [float((out.double() - exact).norm() / exact.norm()) for out in (got, want)]
        assert errors[0] < 1.3 * errors[1] + 1e-3, errors
        for ring, other in zip(one.cache.rings[0].values(), two.cache.rings[0].values(), strict=True):
            for mine, theirs in zip(stored(ring), stored(other), strict=True):
                # The sums are added up in another order: few elements are rounded the other way.
                assert (mine != theirs).float().mean() < 0.02
        again = FusedAttention(filled(STORAGES[storage], heads, frames), store)
        assert torch.equal(again.streamed(0, qkv, stream, rotary), got)
        for ring, other in zip(one.cache.rings[0].values(), again.cache.rings[0].values(), strict=True):
            assert all(torch.equal(*both) for both in zip(stored(ring), stored(other), strict=True))

    @pytest.mark.parametrize("storage", OTHERS)
    def test_it_is_in_two_where_the_kernel_knows_no_storage(self, storage):
        qkv, stream, rotary = a_layer("BF16", 2, 128)
        attend, other = (FusedAttention(filled(OTHERS[storage], 2, 4), store=True) for _ in range(2))
        assert joined(attend.cache, 0, qkv, store=True) is None
        want = other.projected(0, qkv.normed(stream, RMS_EPS)[None], rotary)[0]
        assert torch.equal(attend.streamed(0, qkv, stream, rotary), want)


def stored(ring):
    """What a ring's memory holds, as bytes."""
    return [t.view(torch.uint8) for t in fused.ring_view(ring)[:2] if t is not None]


QUANTS = {
    "BF16": MXConf(),
    "MXFP8": MXConf(enabled=True, scope="all", kernel="cuda"),
    "MXFP4": MXConf(enabled=True, scope="all", kernel="cuda", bits=4),
}


class TestRollouts:
    pytestmark = hopper

    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.parametrize("dim", [256, 1536])
    @pytest.mark.parametrize("quant", QUANTS)
    def test_frames_are_as_close_to_float32_as_with_norms_by_themselves(self, quant, dim, monkeypatch):
        """Of the same weights: BF16's own error decides, not where the norms are."""
        sizes = {"channels": 16, "sample_size": 8, "tokens_per_frame": 64, "n_layers": 3}
        core = make_core(**sizes, d_model=dim, n_heads=dim // 64).to("cuda", torch.bfloat16).requires_grad_(False)
        apply_mx(core, QUANTS[quant])
        pack(core)
        exact = make_core(**sizes, d_model=dim, n_heads=dim // 64).cuda().requires_grad_(False)
        for (path, _, _, linear), (_, _, _, packed) in zip(list(exact.linears()), list(core.linears()), strict=True):
            linear.weight.copy_(packed.dense_weight())
            assert path
        for name, parameter in exact.named_parameters():
            if "blocks" not in name or name.endswith("bias"):
                parameter.copy_(parameter.bfloat16())
        sampler = SamplerConf(window=6)
        context, frames = make_inputs(core, 12, 6, batch=1)
        want = play(make_rollout(exact, sampler, batch=1), context, frames)
        errors = []
        for streamed in (True, False):
            if not streamed:
                monkeypatch.setattr(steps, "all_stream", lambda *args: False)
            rollout = make_rollout(core, sampler, batch=1, attention=AttentionKind.fused, enabled=True)
            assert steps.all_stream(core, rollout.cache, rollout.attention, rollout.compile) is streamed
            rollout.warmup()
            got = play(rollout, context, frames)
            assert torch.equal(got, play(rollout, context, frames))
            errors.append(float((got - want).norm() / want.norm()))
        assert errors[0] < 1.15 * errors[1], errors
