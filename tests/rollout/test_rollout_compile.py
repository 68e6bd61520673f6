"""Compilation without code generation (aot_eager traces and functionalises as Inductor does, in a second)."""

import pytest
import torch
from rollout_cases import make_core, make_inputs, make_rollout, play
from torch import nn

from harness.kv import KVConf, KVStorage
from harness.mx.conf import MXConf
from harness.mx.transform import apply_mx
from harness.rollout import AttentionKind, CompileConf, CompileCounters, FrameDecoder, SamplerConf
from harness.rollout import attention as attention_module
from harness.rollout.compile import compile_function, validate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TRACED = {"enabled": True, "backend": "aot_eager"}
MX = KVConf(storage=KVStorage.mx, quantize_k=True)


@pytest.fixture(scope="module")
def core():
    return make_core(n_layers=2)


@pytest.mark.parametrize(
    ("conf", "timesteps", "graphs"), [(KVConf(), [1.0, 0.25], 2), (MX, [1.0, 0.5, 0.25], 3)], ids=["plain", "mx"]
)
def test_compiled_equals_eager_without_breaks_or_recompiles(core, conf, timesteps, graphs):
    sampler = SamplerConf(window=4, timesteps=timesteps)
    context, frames = make_inputs(core, 11)
    eager = play(make_rollout(core, sampler, conf), context, frames)
    rollout = make_rollout(core, sampler, conf, **TRACED)
    before = [buffer.data_ptr() for buffer in rollout.cache.buffers()]
    warmup = rollout.warmup()
    assert (warmup.graphs, warmup.graph_breaks, warmup.cuda_graph) == (graphs, 0, False)
    assert warmup.seconds > 0

    counters = CompileCounters()
    torch.testing.assert_close(play(rollout, context, frames), eager, rtol=0, atol=1e-5)
    with torch.inference_mode():  # another caller, another mode, inputs that are inference tensors
        torch.testing.assert_close(play(rollout, *make_inputs(core, 11)), eager, rtol=0, atol=1e-5)
    assert (counters.graphs, counters.graph_breaks) == (0, 0)
    assert [buffer.data_ptr() for buffer in rollout.cache.buffers()] == before
    assert rollout.cache.nbytes().scratch == 0


@pytest.mark.parametrize(("conf", "graphs"), [(KVConf(), 5), (MX, 9)], ids=["plain", "mx"])
def test_layers_of_a_kind_share_compiled_code(conf, graphs):
    """prepare, and per step that is code of its own: enter, local layers, global layers, leave."""
    core = make_core(n_layers=6)
    context, frames = make_inputs(core, 6)
    eager = play(make_rollout(core, conf=conf), context, frames)
    rollout = make_rollout(core, conf=conf, scope="block", **TRACED)
    warmup, counters = rollout.warmup(), CompileCounters()
    assert (warmup.graphs, warmup.graph_breaks) == (graphs, 0)
    torch.testing.assert_close(play(rollout, context, frames), eager, rtol=0, atol=1e-5)
    assert (counters.graphs, counters.graph_breaks) == (0, 0)


def test_layers_of_other_formats_are_another_kind():
    """The last layer's Linears and cache are MX: a graph more than prepare, enter, leave, local and global."""
    core = make_core(n_layers=4).to(torch.bfloat16)
    apply_mx(core, MXConf(enabled=True, late_layers=1))
    conf = KVConf(KVStorage.mx, late_layers=1)
    context, frames = make_inputs(core, 3)
    sampler = SamplerConf(window=4, timesteps=[1.0])
    eager = play(make_rollout(core, sampler, conf), context, frames)
    rollout = make_rollout(core, sampler, conf, scope="block", **TRACED)
    assert rollout.warmup().graphs == 6
    torch.testing.assert_close(play(rollout, context, frames), eager, rtol=0, atol=1e-5)


def test_many_arms_do_not_exhaust_the_compiler():
    """Each compiled function has its own cache: more of them than the compiler's limit of entries per code object."""

    def arm(scale):
        def function(x):
            return x * scale

        return compile_function(function, CompileConf(**TRACED))

    for scale in range(12):
        counters = CompileCounters()
        run = arm(scale)
        assert torch.equal(run(torch.ones(3)), torch.full((3,), float(scale)))
        run(torch.zeros(3))
        assert counters.graphs == 1


def test_counters_see_recompiles():
    def function(x):
        return x + 1

    run = compile_function(function, CompileConf(**TRACED))
    run(torch.ones(2))
    counters = CompileCounters()
    run(torch.ones(2))
    assert counters.graphs == 0
    run(torch.ones(5))
    assert counters.graphs == 1


def test_a_graph_break_is_an_error():
    def function(x):
        return x * x.sum().item() if x.sum() > 0 else x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_function(function, CompileConf(**TRACED))(torch.ones(2))


def test_decoder_compiles():
    decoder = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=2, mode="bicubic")).requires_grad_(False)
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    counters = CompileCounters()
    decode = FrameDecoder(decoder, CompileConf(**TRACED))
    torch.testing.assert_close(decode(z), decoder(z))
    with torch.inference_mode():
        decode(z * 2)
    assert counters.graphs == 1
    torch.testing.assert_close(FrameDecoder(decoder, CompileConf())(z), decoder(z))
    assert counters.graphs == 1


@pytest.mark.parametrize(
    ("conf", "device", "message"),
    [
        (CompileConf(scope="layer"), CPU, "scope='layer': allowed are frame, block"),
        (CompileConf(True, "reduce-overhead", scope="block"), CUDA, "which would capture each layer; use mode=default"),
        (CompileConf(mode="fast"), CPU, "mode='fast': allowed are default, reduce-overhead"),
        (CompileConf(backend="tvm"), CPU, "backend='tvm': allowed are inductor"),
        (CompileConf(cuda_graph=True), CPU, "cuda_graph=true on cpu: CUDA graphs need a CUDA device"),
        (CompileConf(True, "reduce-overhead"), CPU, "mode=reduce-overhead on cpu: it is about CUDA graphs"),
        (CompileConf(True, "reduce-overhead", True), CUDA, "which captures graphs itself"),
    ],
)
def test_config_is_checked(conf, device, message):
    with pytest.raises(ValueError, match=message):
        validate(conf, device)


@pytest.mark.parametrize(
    ("conf", "device", "captures"),
    [
        (CompileConf(), CUDA, False),
        (CompileConf(enabled=True), CUDA, True),
        (CompileConf(enabled=True), CPU, False),
        (CompileConf(enabled=True, mode="reduce-overhead"), CUDA, False),
        (CompileConf(enabled=True, cuda_graph=False), CUDA, False),
        (CompileConf(cuda_graph=True), CUDA, True),
    ],
)
def test_when_a_frame_is_captured(conf, device, captures):
    validate(conf, device)
    assert conf.captures(device) is captures


@pytest.mark.parametrize(
    ("conf", "device", "scope"),
    [
        (CompileConf(enabled=True), CUDA, "block"),
        (CompileConf(enabled=True), CPU, "frame"),
        (CompileConf(enabled=True, cuda_graph=False), CUDA, "frame"),
        (CompileConf(enabled=True, scope="frame"), CUDA, "frame"),
        (CompileConf(enabled=True, scope="block"), CPU, "block"),
    ],
)
def test_layers_are_compiled_one_by_one_where_calling_them_costs_nothing(conf, device, scope):
    validate(conf, device)
    assert conf.scope_on(device) == scope


def test_flex_traces_into_the_step(core):
    context, frames = make_inputs(core, 3)
    rollout = make_rollout(core, attention=AttentionKind.flex, **TRACED)
    assert rollout.warmup().graphs == 2
    torch.testing.assert_close(
        play(rollout, context, frames), play(make_rollout(core), context, frames), rtol=0, atol=1e-5
    )


def test_flex_says_where_it_cannot_run(core, monkeypatch):
    monkeypatch.setattr(attention_module.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="attention=flex: FlexAttention on a CPU needs AVX2"):
        make_rollout(core, attention=AttentionKind.flex)
    make_rollout(core, attention=AttentionKind.sdpa)
