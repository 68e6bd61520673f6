"""attention=fused against attention=sdpa. Without a GPU Triton's interpreter runs the kernels (see conftest.py)."""

# ruff: noqa: E402  (what follows the skips needs the package triton)
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy below 2.4", allow_module_level=True)

from rollout_cases import SAMPLER, make_core, make_inputs, make_rollout, play

from harness.kv import KVCache, KVConf, KVStorage
from harness.kv.conf import KVFormat, KVScales
from harness.models.gamerft import rms_norm
from harness.models.rope import MotionRotary, apply_rotary
from harness.mx.conf import ScaleMode
from harness.rollout import AttentionKind, CompileCounters, fused

MX = KVStorage.mx
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
STORAGES = {
    "plain": KVConf(),
    "v_e4m3": KVConf(MX),
    "k_e5m2_v_e2m1": KVConf(MX, quantize_k=True, v_format=KVFormat.e2m1),
    "kv_e2m1": KVConf(MX, quantize_k=True, bits=4),
    "per_head": KVConf(MX, quantize_k=True, scales=KVScales.per_head_ema),
    "int8": KVConf(KVStorage.i8_scale, quantize_k=True),
}
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]  # the interpreter multiplies no BF16
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")


def filled(conf, batch, heads, frames, tokens, dim, dtype, newer):
    """A cache of one layer at the start of frame ``frames + newer``."""
    generator = torch.Generator().manual_seed(frames)
    cache = KVCache(1, batch, heads, dim, tokens, [frames], conf, dtype, DEVICE)

    def normal(n):
        return torch.randn(batch, heads, n, dim, generator=generator).to(DEVICE, dtype)

    cache.load(0, normal(frames * tokens), normal(frames * tokens))
    for _ in range(newer):
        cache.advance()
        own = normal(tokens), normal(tokens)
        cache.window(0, *own)
        cache.store(0, *own)
    cache.advance()
    return cache, normal


def views(cache):
    return [fused.ring_view(cache.rings[0][name]) for name in ("k", "v")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "frames", "tokens", "dim"),
    [(1, 2, 5, 16, 64), (2, 1, 1, 16, 32), (1, 1, 3, 20, 128), (1, 1, 2, 80, 32)],
)
@pytest.mark.parametrize("storage", STORAGES)
def test_equals_sdpa_over_the_unpacked_window(storage, batch, heads, frames, tokens, dim, dtype):
    cache, normal = filled(STORAGES[storage], batch, heads, frames, tokens, dim, dtype, newer=frames + 1)
    (k_view, v_view), slot = views(cache), cache.slot(0)
    q = normal(tokens).transpose(1, 2).contiguous().transpose(1, 2)  # as the projection leaves it
    k, v = normal(tokens), normal(tokens)
    for view in (k_view, v_view):  # what the slot holds is stale and must not matter
        view.data[:, :, int(slot)] = 1
    formats = (k_view.format, k_view.per, v_view.format, v_view.per)
    out = fused.window_attention(q, k, v, k_view.data, k_view.scales, v_view.data, v_view.scales, slot, *formats)
    expected = F.scaled_dot_product_attention(q.double(), *(x.double() for x in cache.window(0, k, v)))
    assert out.transpose(1, 2).is_contiguous()
    assert (out - expected).norm() / expected.norm() < (2e-6 if dtype == torch.float32 else 5e-3)


def extremes(x):
    """Put zeros, NaN, infinity and both ends of the range into a few tokens of ``x [B, P, D]``."""
    x[0, 0] = 0
    x[0, 1, 3], x[0, 2, 3] = float("nan"), float("inf")
    x[0, 3] *= 1e-30
    x[0, 4] *= 1e37
    return x


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("storage", ["v_e4m3", "k_e5m2_v_e2m1"])
def test_stores_exactly_what_the_ring_would(storage, mode):
    conf = KVConf(**{**vars(STORAGES[storage]), "scale_mode": mode})
    heads, dim, tokens = 1, 64, 16
    caches = [filled(conf, 2, heads, 3, tokens, dim, torch.float32, newer=1)[0] for _ in range(2)]
    qkv = torch.randn(2, tokens, 3 * heads * dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    extremes(qkv[..., 2 * heads * dim :])
    cos, sin = (x.to(DEVICE) for x in MotionRotary(dim, 4, 2.0)(torch.tensor([77])))
    key, value = views(caches[0])
    rings = (key.data, key.scales, value.data, value.scales)
    formats = (key.format, value.format, mode.value)
    q_out, k_out = fused.frame_heads(qkv, cos, sin, *rings, caches[0].slot(0), True, True, *formats)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (apply_rotary(rms_norm(x), cos, sin) for x in (q, k))
    torch.testing.assert_close((q_out, k_out), (q, k), rtol=2e-6, atol=2e-6)
    caches[1].window(0, k_out, v)
    caches[1].store(0, k_out, v)
    for ours, theirs in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("storage", "compiled"), [("plain", False), ("kv_e2m1", True), ("int8", False)])
def test_rollout_equals_sdpas(storage, compiled):
    """Float32; on a GPU another order of sums may flip a stored value's rounding."""
    core = make_core(n_layers=1, n_heads=1, d_model=32).to(DEVICE)
    context, frames = make_inputs(core, 2, batch=1)
    sizes = {"conf": STORAGES[storage], "batch": 1}
    expected = play(make_rollout(core, **sizes), context, frames)
    way = {"enabled": True, "backend": "aot_eager"} if compiled else {}
    rollout = make_rollout(core, attention=AttentionKind.fused, **sizes, **way)
    rollout.warmup()  # on a GPU compiled frames are captured
    torch.testing.assert_close(
        play(rollout, context, frames), expected, rtol=0, atol=5e-2 if ON_GPU and storage != "plain" else 2e-4
    )


def test_one_step_serves_all_where_nothing_is_quantised():
    core = make_core(n_layers=1, n_heads=1, d_model=32).to(DEVICE)
    way = {"enabled": True, "backend": "aot_eager", "scope": "frame"}
    rollout = make_rollout(core, batch=1, attention=AttentionKind.fused, **way)
    assert rollout.warmup(1).graphs == 2  # prepare, step


def test_layers_of_a_kind_share_compiled_code():
    core = make_core(n_layers=4, n_heads=1, d_model=32).to(DEVICE)
    context, frames = make_inputs(core, 1, batch=1)
    sizes = {"conf": STORAGES["v_e4m3"], "batch": 1, "attention": AttentionKind.fused}
    expected = play(make_rollout(core, **sizes), context, frames)
    rollout = make_rollout(core, enabled=True, backend="aot_eager", scope="block", **sizes)
    assert rollout.warmup(1).graphs == 9  # prepare; per step: enter, local layers, global layers, leave
    atol = 5e-2 if ON_GPU else 2e-4
    torch.testing.assert_close(play(rollout, context, frames), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dim", [16, 48, 256])
def test_unsuitable_heads_are_refused_before_anything_runs(dim):
    core = make_core(n_layers=1, n_heads=1, d_model=dim).to(DEVICE)
    with pytest.raises(ValueError, match=f"head size {dim}; the kernels take 32, 64 or 128"):
        make_rollout(core, SAMPLER, attention=AttentionKind.fused)


def test_a_window_is_split_to_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(fused, "_multiprocessors", lambda device: 132)
    for tiles, programs in ((60, 24), (16, 24), (60, 96), (60, 384), (1, 24)):
        splits, share = fused.splits_for(tiles, programs, DEVICE)
        assert (splits - 1) * share < tiles <= splits * share
        assert splits * programs <= max(2 * 132, programs)
    assert fused.splits_for(60, 24, DEVICE) == (10, 6)


def test_compiles_for_hopper_without_a_gpu():
    """Every matrix product becomes a warpgroup instruction."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("rollout_aot.py")), "plain/e4m3", "e5m2/e2m1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert set(lines) == {"plain/e4m3", "e5m2/e2m1", "combine", "heads"}
    for pair in ("plain/e4m3", "e5m2/e2m1"):
        assert int(lines[pair][2]) >= 12
        assert int(lines[pair][4]) < 64 * 1024


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES)
def test_captured_bf16_frames_compile_nothing_and_stay_close(storage):
    core = make_core(channels=16, sample_size=8, tokens_per_frame=64, d_model=128, n_layers=2).to(
        "cuda", torch.bfloat16
    )
    sampler = type(SAMPLER)(window=6)
    context, frames = make_inputs(core, 30, 6)
    expected = play(make_rollout(core, sampler, STORAGES[storage]), context, frames)
    rollout = make_rollout(core, sampler, STORAGES[storage], attention=AttentionKind.fused, enabled=True)
    rollout.warmup()
    play(rollout, context, frames[:3])
    counters, allocated = CompileCounters(), torch.cuda.memory_allocated()
    out = play(rollout, context, frames)
    assert (counters.graphs, counters.graph_breaks) == (0, 0)
    del counters
    assert (out - expected).norm() / expected.norm() < 5e-2
    del out
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated
