"""Prefill with our kernels gives what the model's masked attention and the rings' own loading give."""

import pytest
import torch
from rollout_cases import make_core, make_inputs, make_rollout

from harness.kv import KVConf, KVStorage
from harness.kv.conf import KVFormat
from harness.rollout import AttentionKind, SamplerConf
from harness.rollout import prefill as fused_prefill
from harness.rollout.linears import pack

triton = pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not (ON_GPU or triton.knobs.runtime.interpret), reason="needs a CUDA GPU, or Triton's interpreter"
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of which even a tiny history has several, with and without a mask."""
    monkeypatch.setattr(fused_prefill, "BLOCK_M", 16)
    monkeypatch.setattr(fused_prefill, "BLOCK_N", 16)


def both(core, sampler, conf, first, window):
    """Velocity and rings of a prefill, by our kernels and by torch's."""
    context, _ = make_inputs(core, 0, window)
    rollouts = [
        make_rollout(core, sampler, conf, attention=AttentionKind.fused, enabled=True, backend="eager", scope="block"),
        make_rollout(core, sampler, conf),
    ]
    assert [rollout._layers is not None for rollout in rollouts] == [True, False]
    return [(rollout.prefill(*context, first=first), rollout.cache) for rollout in rollouts]


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(
    ("conf", "causal", "side", "window"),
    [
        (KVConf(), True, 4, 6),
        (KVConf(KVStorage.mx), True, 4, 6),
        (KVConf(KVStorage.mx, quantize_k=True, v_format=KVFormat.e2m1), False, 2, 7),
        (KVConf(KVStorage.i8_scale, quantize_k=True), True, 5, 5),
        (KVConf(KVStorage.mx, quantize_k=True, bits=4, hadamard=True), True, 4, 6),
        (KVConf(KVStorage.i8_scale, quantize_k=True, hadamard=True), True, 4, 6),
    ],
)
def test_velocity_and_rings_are_the_same(conf, causal, side, window, first, small_tiles):
    core = make_core(
        d_model=64, n_heads=2, sample_size=side, tokens_per_frame=side**2, local_window=3, causal=causal, n_layers=2
    ).to(DEVICE)
    (got, ours), (want, theirs) = both(core, SamplerConf(window=window), conf, first, window)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
    assert ours.frame.item() == theirs.frame.item() == first + window - 1
    for layer in range(core.cfg.n_layers):
        assert torch.equal(ours.slot(layer), theirs.slot(layer))
        for mine, other in zip(ours.ordered(layer), theirs.ordered(layer), strict=True):
            # A value that rounding puts on the other side of a tie is a step of its format away.
            near = (mine.float() - other.float()).abs() <= 1e-4 + 1e-4 * other.float().abs()
            assert near.float().mean() > 0.995
            assert (mine.float() - other.float()).norm() < 0.01 * other.float().norm()


def test_a_history_shorter_than_a_window_is_refused():
    core = make_core(d_model=64, n_heads=2).to(DEVICE)
    rollout = make_rollout(core, SamplerConf(window=4), attention=AttentionKind.fused, enabled=True, backend="eager")
    with pytest.raises(ValueError, match="prefill of 3 frames: layer 0 keeps a window of 4"):
        rollout.cache.check_history(3)


def test_layers_that_round_their_inputs_prefill_as_torch_does():
    core = make_core(d_model=64, n_heads=2)
    assert fused_prefill.fits(core)
    core.blocks[1].mlp.fc1.fmt = type("Format", (), {"activation_element": "e4m3"})()
    assert not fused_prefill.fits(core)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("quant", [False, True])
def test_in_bf16_it_is_as_near_to_float32_as_torchs(quant):
    """Tiles of full size; packed Linears, whose weights are unpacked for a history's rows."""
    sizes = {"d_model": 256, "n_heads": 4, "sample_size": 8, "tokens_per_frame": 64, "local_window": 5, "n_layers": 4}
    exact = make_core(**sizes).cuda()
    plain, core = (make_core(**sizes).cuda().bfloat16() for _ in range(2))
    for mine, theirs in zip(exact.parameters(), core.parameters(), strict=True):
        mine.data = theirs.data.float()
    sampler, conf = SamplerConf(window=20), KVConf(KVStorage.mx) if quant else KVConf()
    context, _ = make_inputs(core, 0, 20)
    want = make_rollout(exact, sampler).prefill(*context)
    usual = make_rollout(plain, sampler).prefill(*context)
    pack(core)
    rollout = make_rollout(core, sampler, conf, attention=AttentionKind.fused, enabled=True)
    rollout.warmup()
    error, eager = ((x.float() - want).norm() / want.norm() for x in (rollout.prefill(*context), usual))
    assert error < 1.3 * eager
