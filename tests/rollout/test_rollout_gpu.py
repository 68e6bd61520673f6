"""The same claims on a GPU: Inductor, CUDA graphs, no growth."""

import gc

import pytest
import torch
from rollout_cases import make_core, make_inputs, make_rollout, play

from harness.kv import KVConf, KVStorage
from harness.rollout import AttentionKind, CompileCounters, SamplerConf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]
SIZES = {"channels": 16, "sample_size": 8, "tokens_per_frame": 64, "d_model": 128, "n_layers": 2}
SAMPLER = SamplerConf(window=6)
STORAGES = {
    "plain": KVConf(),
    "mx_v": KVConf(storage=KVStorage.mx),
    "mx4_kv": KVConf(storage=KVStorage.mx, quantize_k=True, bits=4),
}
WAYS = {
    "eager_graph": {"cuda_graph": True},
    "compiled": {"enabled": True, "cuda_graph": False},
    "compiled_layers": {"enabled": True, "cuda_graph": False, "scope": "block"},
    "compiled_graph": {"enabled": True},
    "compiled_frame_graph": {"enabled": True, "scope": "frame"},
    "reduce_overhead": {"enabled": True, "mode": "reduce-overhead"},
}


@pytest.fixture(scope="module")
def core():
    return make_core(**SIZES).cuda()


def inputs(core, frames, seed=0):
    return make_inputs(core, frames, SAMPLER.window, seed=seed)


@pytest.mark.parametrize(
    ("way", "storage"), [*((way, "plain") for way in WAYS), ("compiled_graph", "mx_v"), ("compiled_graph", "mx4_kv")]
)
def test_every_way_to_run_gives_the_eager_frames(core, storage, way):
    """Float32: 4-bit rounding may flip on the last bit, so that storage gets room."""
    conf, atol = STORAGES[storage], 5e-2 if storage == "mx4_kv" else 1e-3
    context, frames = inputs(core, 20)
    eager = play(make_rollout(core, SAMPLER, conf), context, frames)
    rollout = make_rollout(core, SAMPLER, conf, **WAYS[way])
    warmup = rollout.warmup()
    assert warmup.graph_breaks == 0
    assert warmup.cuda_graph == way.endswith("_graph")
    out = play(rollout, context, frames)
    torch.testing.assert_close(out, eager, rtol=0, atol=atol)
    play(rollout, *inputs(core, 3, seed=7))
    torch.testing.assert_close(play(rollout, context, frames), out, rtol=0, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_captured_eager_frame_is_bit_exact(core, storage):
    context, frames = inputs(core, 15)
    eager = play(make_rollout(core, SAMPLER, STORAGES[storage]), context, frames)
    rollout = make_rollout(core, SAMPLER, STORAGES[storage], cuda_graph=True)
    rollout.warmup()
    assert torch.equal(play(rollout, context, frames), eager)


@pytest.mark.parametrize(
    ("attention", "storage"),
    [(AttentionKind.sdpa, "plain"), (AttentionKind.sdpa, "mx4_kv"), (AttentionKind.flex, "mx_v")],
)
def test_100_bf16_frames_compile_nothing_and_allocate_nothing(storage, attention):
    core = make_core(**SIZES).to("cuda", torch.bfloat16)
    context, frames = inputs(core, 100)
    rollout = make_rollout(core, SAMPLER, STORAGES[storage], attention=attention, enabled=True)
    rollout.warmup()
    play(rollout, context, frames[:5])
    torch.cuda.synchronize()
    counters, allocated, reserved = CompileCounters(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    rollout.prefill(*context)
    for frame in frames:
        out = rollout.next_frame(*frame)
    del out
    torch.cuda.synchronize()
    assert (counters.graphs, counters.graph_breaks) == (0, 0)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (allocated, reserved)


def test_a_frame_never_waits_for_the_device():
    core = make_core(**SIZES).to("cuda", torch.bfloat16)
    context, frames = inputs(core, 3)
    rollout = make_rollout(core, SAMPLER, STORAGES["mx_v"])
    play(rollout, context, frames)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for frame in frames:
            rollout.next_frame(*frame)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_frames_before_warmup_are_refused_where_a_graph_is_replayed(core):
    context, frames = inputs(core, 1)
    rollout = make_rollout(core, SAMPLER, enabled=True)
    rollout.prefill(*context)
    with pytest.raises(RuntimeError, match=r"call warmup\(\) before prefill\(\)"):
        rollout.next_frame(*frames[0])


@pytest.mark.parametrize("storage", ["mx_v", "mx4_kv"])
def test_a_quantised_cache_allocates_less(core, storage):
    def allocated_by(conf):
        gc.collect()
        before = torch.cuda.memory_allocated()
        rollout = make_rollout(core, SamplerConf(window=60), conf, enabled=True)
        return torch.cuda.memory_allocated() - before, rollout.cache.nbytes()

    for conf in (KVConf(), STORAGES[storage]):
        allocated_by(conf)  # what the first of a kind allocates once (stacked weights, workspaces) is not the cache's
    (plain, _), (quantised, size) = allocated_by(KVConf()), allocated_by(STORAGES[storage])
    assert quantised < plain
    assert abs((plain - quantised) - (size.plain - size.allocated)) < 0.02 * size.plain
