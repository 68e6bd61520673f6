"""Calibrating a small model: it is shown what rollouts show it, and its rollouts come out closer to BF16's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from harness.calib.calibrate import calibrate
from harness.calib.sequences import Clips, Stream, layer_cache_conf, record_rollout, velocities
from harness.calib.source import formats_of
from harness.calib.statistics import CAUGHT_UP, FEW_ROWS, Moments, every
from harness.kv import KVConf, KVStorage
from harness.models.checkpoint import random_gamerft
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.mx.conf import Activation, MXConf, Scope
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.mx.transform import apply_mx
from harness.rollout import Rollout, SamplerConf, make_cache

ARCH = GameRFTConfig(
    n_layers=3,
    n_heads=2,
    d_model=64,
    channels=8,
    sample_size=4,
    tokens_per_frame=16,
    local_window=2,
    local_idx=2,
)
SAMPLER = SamplerConf(window=4)
ALL_4_BIT = MXConf(enabled=True, bits=4, scope=Scope.all)


@pytest.fixture(scope="module")
def core() -> GameRFTCore:
    return random_gamerft(ARCH, 0).to(torch.bfloat16)


def some_clips(count: int = 4, frames: int = 4, seed: int = 0) -> Clips:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    latent, length = (ARCH.channels, ARCH.sample_size, ARCH.sample_size), SAMPLER.window + frames
    base = normal(count, 1, *latent)
    history = base + 0.3 * normal(count, SAMPLER.window, *latent)
    buttons = (normal(count, length, ARCH.n_buttons) > 0).float()
    noise = normal(count, SAMPLER.window, *latent), normal(count, frames, *latent)
    return Clips(history, normal(count, length, 2), buttons, noise)


def rolled(core: GameRFTCore, clips: Clips, kv: KVConf | None = None) -> Tensor:
    rollout = Rollout(core, make_cache(core, SAMPLER, kv or KVConf(), len(clips)), SAMPLER)
    window = SAMPLER.window
    rollout.prefill(clips.history, clips.mouse[:, :window], clips.btn[:, :window], clips.noise[0])
    frames = [
        rollout.next_frame(clips.noise[1][:, i], clips.mouse[:, window + i], clips.btn[:, window + i])
        for i in range(clips.frames)
    ]
    return torch.stack(frames, 1)


class Given:
    """A weight source of a dict."""

    chosen_by = "gptq"

    def __init__(self, weights: dict[str, MXWeight]) -> None:
        self.weights = weights

    def unsuitable(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> str | None:
        return None

    def weight(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> MXWeight:
        return self.weights[name]


def distance(core: GameRFTCore, quant: MXConf, weights: dict[str, MXWeight] | None, kv: KVConf | None = None) -> float:
    """Of a candidate's rollouts of unseen clips from BF16's."""
    clips, candidate = some_clips(seed=9), copy.deepcopy(core)
    apply_mx(candidate, quant, None if weights is None else Given(weights))
    reference = rolled(core, clips)
    return float((rolled(candidate, clips, kv) - reference).norm() / reference.norm())


def test_a_stream_shows_every_linear_what_a_rollout_shows_it(core: GameRFTCore) -> None:
    clips, seen = some_clips(count=2, frames=3), {}
    name = "transformer.blocks.2.mlp.fc2"

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(inputs[0])

    hook = core.get_submodule(name).register_forward_pre_hook(watch)
    rolled(core, clips)
    hook.remove()
    prefill, *frames = seen[name]  # a frame's two steps, frame after frame
    stream = Stream(core, SAMPLER, KVConf(), record_rollout(core, SAMPLER, clips))
    for layer in range(ARCH.n_layers):
        block = core.blocks[layer]
        stream.enter(layer, lambda within, x, block=block: block.get_submodule(within)(x))
        for within in ("attn.qkv", "attn.out", "mlp.fc1"):
            stream.leave(within)
        found = list(stream.inputs("mlp.fc2"))
        stream.leave("mlp.fc2")
    for expected, part in zip((prefill, torch.cat(frames[0::2], 1), torch.cat(frames[1::2], 1)), found, strict=True):
        torch.testing.assert_close(part.float(), expected.float(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("quant", "share"),
    [
        (ALL_4_BIT, 0.7),
        (MXConf(enabled=True, bits=8, scope=Scope.all), 0.7),
        (MXConf(enabled=True, bits=4, scope=Scope.mlp), 0.8),
        (MXConf(enabled=True, bits=4, scope=Scope.all, activation=Activation.mxfp8), 0.75),
    ],
    ids=["mxfp4_all", "mxfp8_all", "mxfp4_mlp", "w4a8"],
)
def test_rollouts_of_unseen_clips_come_closer_to_bf16(core: GameRFTCore, quant: MXConf, share: float) -> None:
    weights = calibrate(core, formats_of(core, quant), some_clips(count=12), SAMPLER, KVConf())
    assert distance(core, quant, weights) < share * distance(core, quant, None)


def test_calibration_leaves_the_model_as_it_was_and_gives_the_same_twice(core: GameRFTCore) -> None:
    before = copy.deepcopy(core.state_dict())
    one, other = (
        calibrate(core, formats_of(core, ALL_4_BIT), some_clips(), SAMPLER, KVConf(), on_layer=lambda: None)
        for _ in range(2)
    )
    assert all(torch.equal(x, before[name]) for name, x in core.state_dict().items())
    for name, weight in one.items():
        assert torch.equal(weight.blocks.elements, other[name].blocks.elements), name
        assert torch.equal(weight.bias, other[name].bias), name
        assert weight.bias.dtype is torch.bfloat16


def test_clips_in_groups_count_as_clips_at_once(core: GameRFTCore, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = MXConf(enabled=True, bits=8, scope=Scope.mlp)
    one = calibrate(core, formats_of(core, quant), some_clips(count=12), SAMPLER, KVConf())
    monkeypatch.setattr("harness.calib.calibrate.GROUP_VALUES", 1)
    each = calibrate(core, formats_of(core, quant), some_clips(count=12), SAMPLER, KVConf())
    assert distance(core, quant, each) == pytest.approx(distance(core, quant, one), rel=0.3)


def test_a_layers_cache_is_stored_as_the_whole_caches_is() -> None:
    conf = KVConf(storage=KVStorage.mx, quantize_k=True, bits=4, late_layers=2)
    early, late = (layer_cache_conf(conf, layer, 4) for layer in (1, 2))
    assert not early.enabled
    assert {late.storage_of(name) for name in "kv"} == {KVStorage.mx}
    assert late.element_format("k").name == "e2m1"
    assert late.late("k") is None


def test_a_candidates_own_cache_is_what_it_is_calibrated_on(core: GameRFTCore) -> None:
    kv = KVConf(storage=KVStorage.mx, quantize_k=True, bits=4)
    formats = formats_of(core, ALL_4_BIT)
    plain, own = (calibrate(core, formats, some_clips(), SAMPLER, cache) for cache in (KVConf(), kv))
    name = "transformer.blocks.1.attn.out"
    assert not torch.equal(plain[name].blocks.elements, own[name].blocks.elements)


def test_the_bias_makes_up_for_the_outputs_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 32, generator=generator), torch.randn(8, generator=generator)
    y, x = torch.randn(500, 32, generator=generator) + 3, torch.randn(500, 32, generator=generator) + 2
    moments = Moments(weight, bias)
    moments.add(y, x)
    other = weight + 0.1 * torch.randn(8, 32, generator=generator)
    fitted = moments.fitted_bias(other)
    assert fitted is not None
    torch.testing.assert_close((y @ other.T + fitted).mean(0), (x @ weight.T + bias).mean(0), rtol=1e-4, atol=1e-4)


def test_the_target_is_the_regression_of_bf16s_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 32, generator=generator), torch.zeros(8)
    x = torch.randn(4000, 32, generator=generator) + 1
    y = x * 0.9 + 0.3 * torch.randn(4000, 32, generator=generator)
    moments = Moments(weight, bias)
    moments.add(y, x)
    centred = y - y.mean(0)
    expected = torch.linalg.lstsq(centred, (x - x.mean(0)) @ weight.T).solution.T
    found = moments.target(torch.linalg.inv(moments.covariance()))
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


def test_what_adds_to_the_residual_stream_catches_up_with_what_it_is_behind_by() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, bias, y = normal(8, 32), normal(8), normal(4000, 32) + 1
    gate, way = 0.5 + normal(1, 8).expand(4000, 8).abs(), normal(8, 32)
    behind = gate * (y @ way.T + 2)  # all of it shows in y
    moments = Moments(weight, bias)
    moments.add(y, y, (gate, behind))
    found = moments.target(torch.linalg.inv(moments.covariance())).float()
    share = CAUGHT_UP * (1 - FEW_ROWS * 32 / 4000)
    torch.testing.assert_close(found, weight + share * way, rtol=1e-3, atol=1e-3)
    fitted = moments.fitted_bias(found)
    assert fitted is not None
    left = behind + gate * (y @ weight.T + bias) - gate * (y @ found.T + fitted)
    torch.testing.assert_close(left, (1 - share) * behind, rtol=1e-2, atol=1e-2)


def test_a_shut_gate_is_no_reason_to_divide_by_nothing() -> None:
    moments = Moments(torch.ones(4, 32), torch.zeros(4))
    y = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    moments.add(y, y, (torch.zeros(100, 4), torch.ones(100, 4)))
    assert torch.equal(moments.target(torch.eye(32, dtype=torch.float64)).float(), torch.ones(4, 32))


def test_few_rows_are_not_learned_by_heart() -> None:
    weight, y = torch.ones(4, 32), torch.randn(FEW_ROWS * 32, 32, generator=torch.Generator().manual_seed(0))
    moments = Moments(weight, torch.zeros(4))
    moments.add(y, y, (torch.ones(len(y), 4), torch.randn(len(y), 4, generator=torch.Generator().manual_seed(1))))
    assert torch.equal(moments.target(torch.eye(32, dtype=torch.float64)).float(), weight)


def test_velocities_of_the_model_itself_are_those_of_its_rollout(core: GameRFTCore) -> None:
    clips = some_clips(count=2, frames=3)
    rollout = Rollout(core, make_cache(core, SAMPLER, KVConf(), 2), SAMPLER)
    window = SAMPLER.window
    prefill = rollout.prefill(clips.history, clips.mouse[:, :window], clips.btn[:, :window], clips.noise[0])
    frames = [
        rollout.next_frame_with_velocities(clips.noise[1][:, i], clips.mouse[:, window + i], clips.btn[:, window + i])
        for i in range(3)
    ]
    found = velocities(core, SAMPLER, KVConf(), record_rollout(core, SAMPLER, clips))
    expected = [prefill, *(torch.stack([frame.velocities[step] for frame in frames], 1) for step in range(2))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0.05, atol=0.02)


def test_rows_are_thinned_where_there_are_more_than_enough() -> None:
    assert every(1000, 192) == 1
    assert every(100_000, 192) % 2 == 1
    assert 100_000 // every(100_000, 192) >= 128 * 192
