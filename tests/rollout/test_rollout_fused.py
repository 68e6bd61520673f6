"""attention=fused against attention=sdpa. Without a GPU Triton's interpreter runs the kernels (see conftest.py)."""

# ruff: noqa: E402  (what follows the skips needs the package triton)
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy below 2.4", allow_module_level=True)

from rollout_cases import SAMPLER, exact_attention, filled_cache, make_core, make_inputs, make_rollout, own_rows, play

from harness.formats.scales import ScaleMode
from harness.kv import KVConf, KVStorage
from harness.kv.conf import KVFormat, KVScales
from harness.models.gamerft import attend_from_projection, gated, modulated_norm
from harness.rollout import AttentionKind, CompileCounters, fused
from harness.rollout.attention import FusedAttention, RingAttention, check_storage
from harness.rollout.norms import residual_norm

MX = KVStorage.mx
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
STORAGES = {
    "plain": KVConf(),
    "v_e4m3": KVConf(MX),
    "k_e5m2_v_e2m1": KVConf(MX, quantize_k=True, v_format=KVFormat.e2m1),
    "kv_e2m1": KVConf(MX, quantize_k=True, bits=4),
    "per_head": KVConf(MX, quantize_k=True, scales=KVScales.per_head_ema),
    "int8": KVConf(KVStorage.i8_scale, quantize_k=True),
    "kv_e2m1_turned": KVConf(MX, quantize_k=True, bits=4, hadamard=True),
    "int8_turned": KVConf(KVStorage.i8_scale, quantize_k=True, hadamard=True),
}
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]  # the interpreter multiplies no BF16


@pytest.fixture
def small_tiles(monkeypatch):
    """Launch shapes under which even a tiny window is split, and into several tiles each."""
    real, small = fused.WindowConfig, (2, 16, 2, 16)
    monkeypatch.setattr(fused, "WindowConfig", lambda *sizes: real(*(sizes or small)))
    monkeypatch.setattr(fused, "OWN_ROWS", 16)


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")


def filled(*sizes, newer):
    return filled_cache(*sizes, newer=newer, device=DEVICE)


def projection(batch, heads, tokens, dim, dtype, seed=1):
    """``qkv`` as a layer's projection gives it, and the frame's ``(cos, sin)``."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * dim, generator=generator).to(DEVICE, dtype)
    angles = torch.rand(tokens, dim // 2, generator=generator).to(DEVICE)
    return qkv, (angles.cos(), angles.sin())


def assert_empty(meeting, dim):
    """As a launch must find it and leave it."""
    if dim > 64:  # those programs meet by counting, epoch by epoch
        assert not meeting.arrived[0].any()
    else:
        assert not meeting.arrived.any()
        assert (meeting.parts == fused.EMPTY).all()


def closeness(out, expected):
    return (out - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "frames", "tokens", "dim"),
    [(1, 2, 5, 16, 64), (2, 1, 1, 16, 32), (1, 1, 3, 20, 128), (1, 1, 2, 80, 32), (1, 1, 5, 80, 128)],
)
@pytest.mark.parametrize("storage", STORAGES)
def test_equals_sdpa_over_the_unpacked_window(storage, batch, heads, frames, tokens, dim, dtype, small_tiles):
    cache = filled(STORAGES[storage], batch, heads, frames, tokens, dim, dtype, newer=frames + 1)
    qkv, rotary = projection(batch, heads, tokens, dim, dtype)
    expected = exact_attention(cache, qkv, rotary, heads)
    for name in ("k", "v"):  # what the slot holds is stale and must not matter
        fused.ring_view(cache.rings[0][name]).data[:, :, int(cache.slot(0))] = 1
    out = FusedAttention(cache, store=False).projected(0, qkv, rotary)
    assert out.is_contiguous()
    assert closeness(out, expected) < (2e-6 if dtype == torch.float32 else 5e-3)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("frames", "tokens", "dim"), [(2, 80, 32), (2, 64, 64), (16, 64, 64), (60, 64, 64), (60, 64, 128)]
)
@pytest.mark.parametrize("storage", [*STORAGES, "v_e2m1"])
def test_equals_sdpa_in_tiles_of_full_size(storage, frames, tokens, dim):
    """As models run it: BF16, warpgroup products of every shape."""
    conf = STORAGES.get(storage, KVConf(MX, v_format=KVFormat.e2m1))
    cache = filled(conf, 1, 4, frames, tokens, dim, torch.bfloat16, newer=frames + 1)
    qkv, rotary = projection(1, 4, tokens, dim, torch.bfloat16)
    out = FusedAttention(cache, store=False).projected(0, qkv, rotary)
    assert closeness(out, exact_attention(cache, qkv, rotary, 4)) < 5e-3


@pytest.mark.parametrize("storage", ["plain", "v_e4m3", "kv_e2m1", "int8", "kv_e2m1_turned"])
@pytest.mark.parametrize(("frames", "tokens"), [(6, 16), (4, 20), (7, 18), (3, 70)])
@pytest.mark.parametrize("multiprocessors", [3, 7, 132])  # of 2 heads: 3 and 7 splits, and as many as there are tiles
def test_splits_of_any_number_give_the_same(monkeypatch, small_tiles, storage, frames, tokens, multiprocessors):
    monkeypatch.setattr(fused, "_multiprocessors", lambda device: multiprocessors)
    cache = filled(STORAGES[storage], 1, 2, frames, tokens, 32, torch.float32, newer=2)
    qkv, rotary = projection(1, 2, tokens, 32, torch.float32)
    out = FusedAttention(cache, store=False).projected(0, qkv, rotary)
    assert closeness(out, exact_attention(cache, qkv, rotary, 2)) < 2e-6


@pytest.mark.parametrize(
    ("storage", "tokens", "dim"),
    [
        *((name, 16, 32) for name in STORAGES),
        *((name, 16, 128) for name in ("plain", "kv_e2m1", "per_head")),
        ("k_e5m2_v_e2m1", 80, 32),
        ("k_e5m2_v_e2m1", 80, 128),
    ],
)  # 80: two blocks of queries, of which one stores
def test_launch_after_launch_begins_with_nothing(storage, tokens, dim, small_tiles, monkeypatch):
    """Several frames of two steps each, two clips: every output and all that is stored; nothing is left to the next."""
    real = fused.WindowConfig
    monkeypatch.setattr(fused, "WindowConfig", lambda *sizes: replace(real(*sizes), min_rows=16 * 64 // max(64, dim)))
    caches = [filled(STORAGES[storage], 2, 1, 3, tokens, dim, torch.float32, newer=0) for _ in range(2)]
    ours = [FusedAttention(caches[0], store) for store in (False, True)]
    theirs = [RingAttention(caches[1], AttentionKind.sdpa, store) for store in (False, True)]
    splits = fused.launch_shape(3, tokens, dim, 2, DEVICE, fused.WindowConfig()).splits
    for frame in range(4):
        for step in range(2):
            qkv, rotary = projection(2, 1, tokens, dim, torch.float32, seed=10 * frame + step)
            out, expected = (attend_from_projection(x[step], 0, qkv, 1, rotary) for x in (ours, theirs))
            assert closeness(out, expected) < 2e-6
            assert_empty(ours[step].meeting, dim)
        for own, other in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
            difference = (own.float() - other.float()).abs()
            assert (difference > 1e-5).float().mean() < 0.01  # a last bit may flip a rounding
        for cache in caches:
            cache.advance()
    assert splits > 1


def test_one_launch_gives_the_same_bits_every_time(small_tiles):
    cache = filled(STORAGES["v_e4m3"], 1, 2, 6, 16, 32, torch.float32, newer=1)
    qkv, rotary = projection(1, 2, 16, 32, torch.float32)
    attend = FusedAttention(cache, store=False)
    first = attend.projected(0, qkv, rotary)
    assert all(torch.equal(attend.projected(0, qkv, rotary), first) for _ in range(3))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("frames", "heads"), [(16, 24), (60, 24), (16, 4), (6, 60)])
def test_who_combines_what_changes_no_bit(monkeypatch, frames, heads, dim):
    """Programs that do not wait for the others leave their share to the last one, as where the GPU has no room."""
    cache = filled(STORAGES["v_e4m3"], 1, heads, frames, 64, dim, torch.bfloat16, newer=1)
    qkv, rotary = projection(1, heads, 64, dim, torch.bfloat16)
    attend = FusedAttention(cache, store=False)
    waited = attend.projected(0, qkv, rotary)
    for polls in (1, 3):
        monkeypatch.setattr(fused, "POLLS", polls)
        for _ in range(50):
            assert torch.equal(attend.projected(0, qkv, rotary), waited)
        assert_empty(attend.meeting, dim)


@pytest.mark.parametrize("storage", ["plain", "v_e4m3", "per_head"])
def test_an_empty_window_is_zeros(storage, small_tiles):
    """As in a warm-up, before any prefill."""
    cache = filled(STORAGES[storage], 1, 1, 4, 16, 32, torch.float32, newer=0)
    cache.reset()
    cache.advance()
    qkv, rotary = projection(1, 1, 16, 32, torch.float32)
    out = FusedAttention(cache, store=False).projected(0, qkv, rotary)
    assert closeness(out, exact_attention(cache, qkv, rotary, 1)) < 2e-6


def test_an_earlier_step_leaves_a_quantised_ring_alone(small_tiles):
    cache = filled(STORAGES["kv_e2m1"], 1, 1, 3, 16, 32, torch.float32, newer=0)
    before = [buffer.clone() for buffer in cache.buffers()]
    qkv, rotary = projection(1, 1, 16, 32, torch.float32)
    FusedAttention(cache, store=False).projected(0, qkv, rotary)
    assert all(torch.equal(x, y) for x, y in zip(cache.buffers(), before, strict=True))
    FusedAttention(cache, store=True).projected(0, qkv, rotary)
    changed = [not torch.equal(x, y) for x, y in zip(cache.buffers(), before, strict=True)]
    assert any(changed)


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
    caches = [filled(conf, 2, heads, 3, tokens, dim, torch.float32, newer=1) for _ in range(2)]
    qkv, rotary = projection(2, heads, tokens, dim, torch.float32)
    extremes(qkv[..., 2 * heads * dim :])
    views = [fused.ring_view(caches[0].rings[0][name]) for name in ("k", "v")]
    rings = [tensor for view in views for tensor in (view.data, view.scales)]
    formats = [part for view in views for part in (view.format, view.per, True)]
    meeting = fused.meeting([3], tokens, dim, 2 * heads, DEVICE)
    slot, turns = caches[0].slot(0), [caches[0].turns(name, 0) for name in ("k", "v")]
    _, k_out = fused.window_attention(qkv, *rotary, *rings, slot, *meeting, *formats, mode.value, [], True, *turns)
    _, k, v = own_rows(qkv, rotary, heads)
    torch.testing.assert_close(k_out, k, rtol=2e-6, atol=2e-6)
    caches[1].window(0, k_out, v)
    caches[1].store(0, k_out, v)
    for ours, theirs in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("storage", "compiled"), [("plain", False), ("kv_e2m1", True), ("int8", False), ("kv_e2m1_turned", True)]
)
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
    # prepare; per step: enter, local layers, global layers, leave; on a GPU captured layers are launches, not compiled
    assert rollout.warmup(1).graphs == (5 if ON_GPU else 9)
    atol = 5e-2 if ON_GPU else 2e-4
    torch.testing.assert_close(play(rollout, context, frames), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dim", [16, 48, 256])
def test_unsuitable_heads_are_refused_before_anything_runs(dim):
    core = make_core(n_layers=1, n_heads=1, d_model=dim).to(DEVICE)
    with pytest.raises(ValueError, match=f"head size {dim}; the kernels take 32, 64 or 128"):
        make_rollout(core, SAMPLER, attention=AttentionKind.fused)


def test_a_window_is_split_to_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(fused, "_multiprocessors", lambda device: 132)
    for frames, heads in ((60, 24), (16, 24), (60, 96), (60, 384), (1, 24), (2, 24)):
        shape = fused.launch_shape(frames, 64, 64, heads, DEVICE)
        tiles, rest = divmod((frames - 1) * 64, shape.block_n)
        assert tiles <= shape.splits * shape.share
        assert shape.rest >= rest
        assert shape.splits * heads <= max(2 * 132, heads)
    assert fused.launch_shape(60, 64, 64, 24, DEVICE)[:2] == (11, 6)
    assert fused.launch_shape(16, 64, 64, 24, DEVICE)[:2] == (9, 2)  # eight of them of the ring, one of the frame's own


def test_compiles_for_hopper_without_a_gpu():
    """Every matrix product becomes a warpgroup instruction, and scales are fetched like elements: asynchronously."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    products = {"plain/e4m3": (12, 1), "e5m2/e2m1": (12, 2), "e2m1/e2m1/hadamard": (20, 2)}
    # A window that leaves a rest of rows beside tiles held in registers; heads of 128.
    products |= {"e4m3/e2m1/heads=4/frames=2/tokens=80/dim=32": (12, 2), "plain/e2m1/dim=128": (12, 1)}
    command = [sys.executable, str(Path(__file__).with_name("rollout_aot.py")), *products]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert set(lines) == set(products)
    for pair, (wgmma, quantised) in products.items():
        words = dict(zip(lines[pair][1::2], map(int, lines[pair][2::2]), strict=True))
        assert words["wgmma"] >= wgmma
        assert words["shared"] < (128 if "dim=128" in pair else 64) * 1024
        assert words["asynchronous"] >= 2 + quantised
        assert words["awaited"] == 0


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


@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 4, 32), (3, 5, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_sum_and_its_norm_are_the_models(batch, tokens, dim, dtype):
    torch.manual_seed(0)
    x, branch = (torch.randn(batch, tokens, dim).to(DEVICE, dtype) for _ in range(2))
    stacked = torch.randn(batch, 2, 3 * dim).to(DEVICE, dtype)  # vectors are views, as stacked modulation gives them
    gate, scale, shift = stacked[:, 1:].chunk(3, dim=-1)
    total, normed = residual_norm(x, branch, gate, scale, shift)
    expected = x + gated(branch, gate)
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if dtype is torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    assert torch.equal(total, expected)
    torch.testing.assert_close(normed, modulated_norm(expected, scale, shift), **tolerance)


@pytest.mark.parametrize("conf", STORAGES.values(), ids=STORAGES)
def test_every_storage_there_is_can_be_read(conf):
    check_storage(AttentionKind.fused, conf, head_dim=64)


def test_a_storage_that_the_kernels_cannot_read_is_refused_before_there_is_a_model(monkeypatch):
    class Foreign:
        format_name = "sparse"

    monkeypatch.setattr("harness.kv.cache.build_ring", lambda *args: Foreign())
    with pytest.raises(ValueError, match="attention=fused does not know the storage sparse; use attention=sdpa"):
        check_storage(AttentionKind.fused, KVConf(), head_dim=64)
    check_storage(AttentionKind.sdpa, KVConf(), head_dim=64)
