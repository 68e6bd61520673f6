import pytest
import torch
from omegaconf import OmegaConf
from rollout_cases import SAMPLER, NaiveRollout, make_core, make_inputs, make_rollout, play

from harness.kv import KVConf, KVStorage
from harness.rollout import CompileConf, SamplerConf
from harness.rollout.sampler import validate

MX_V = KVConf(storage=KVStorage.mx)


@pytest.fixture(scope="module")
def core():
    return make_core()


def naive_play(core, sampler, context, frames):
    naive = NaiveRollout(core, sampler)
    naive.prefill(*context)
    return torch.stack([naive.next_frame(*frame)[0] for frame in frames], dim=1)


@pytest.mark.parametrize("rope_impl", ["motion", "ortho"])
def test_goes_on_past_n_frames(rope_impl):
    core = make_core(rope_impl=rope_impl, n_frames=8)
    context, frames = make_inputs(core, 25)
    out = play(make_rollout(core), context, frames)
    torch.testing.assert_close(out, naive_play(core, SAMPLER, context, frames), rtol=0, atol=2e-5)


def test_clips_of_a_batch_do_not_see_each_other(core):
    context, frames = make_inputs(core, 6, batch=3)
    together = play(make_rollout(core, batch=3), context, frames)
    for i in range(3):
        one = play(
            make_rollout(core, batch=1), [x[i : i + 1] for x in context], [[x[i : i + 1] for x in f] for f in frames]
        )
        torch.testing.assert_close(one, together[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("conf", [KVConf(), MX_V], ids=["plain", "mx"])
def test_warmup_and_earlier_rollouts_leave_no_trace(core, conf):
    context, frames = make_inputs(core, 6)
    fresh = play(make_rollout(core, conf=conf), context, frames)
    used = make_rollout(core, conf=conf)
    used.warmup()
    play(used, *make_inputs(core, 3, seed=5))
    assert torch.equal(play(used, context, frames), fresh)


def test_quantised_cache_changes_little_but_something(core):
    context, frames = make_inputs(core, 6)
    exact = play(make_rollout(core), context, frames)
    fine, coarse = (play(make_rollout(core, conf=KVConf(KVStorage.mx, bits=bits)), context, frames) for bits in (8, 4))
    error8, error4 = ((x - exact).abs().max() for x in (fine, coarse))
    assert 0 < error8 < error4 < 0.5 * exact.abs().max()


def test_each_step_lowers_x_by_its_velocity(core):
    context, frames = make_inputs(core, 2)
    rollout = make_rollout(core, SamplerConf(window=4, timesteps=[0.9, 0.5, 0.1]))
    rollout.prefill(*context)
    for noise, mouse, btn in frames:
        frame = rollout.next_frame_with_velocities(noise, mouse, btn)
        a, b, c = frame.velocities
        torch.testing.assert_close(frame.latent, noise - 0.4 * a - 0.4 * b - 0.1 * c)


def test_bf16_model_keeps_a_float32_state():
    core = make_core().to(torch.bfloat16)
    context, frames = make_inputs(core, 3)
    rollout = make_rollout(core)
    out = play(rollout, context, frames)
    assert out.dtype == torch.float32
    assert rollout.cache.ordered(0)[0].dtype == torch.bfloat16
    assert not torch.equal(out, out.bfloat16().float())


def test_results_are_ordinary_tensors_whatever_the_caller_does(core):
    context, frames = make_inputs(core, 2)
    rollout = make_rollout(core)
    with torch.inference_mode():
        rollout.prefill(*context)
        inside = rollout.next_frame(*frames[0])
    outside = rollout.next_frame(*frames[1])
    assert not inside.is_inference()
    assert not outside.requires_grad


def test_unconditional_model_needs_no_controls():
    core = make_core(uncond=True)
    context, frames = make_inputs(core, 2)
    rollout = make_rollout(core)
    rollout.prefill(context[0], noise=context[3])
    assert torch.isfinite(rollout.next_frame(frames[0][0])).all()


def test_no_frame_without_prefill(core):
    context, frames = make_inputs(core, 1)
    rollout = make_rollout(core)
    with pytest.raises(RuntimeError, match=r"call prefill\(\) first"):
        rollout.next_frame(*frames[0])
    rollout.prefill(*context)
    rollout.warmup()
    with pytest.raises(RuntimeError, match=r"call prefill\(\) first"):
        rollout.next_frame(*frames[0])


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda x: x[:, :3], r"history has shape \(2, 3, 8, 2, 2\), this rollout takes \(2, 4, 8, 2, 2\)"),
        (1, lambda x: x[..., :1], "mouse has shape"),
        (2, lambda x: x[:1], "btn has shape"),
        (2, lambda x: None, "conditioned on controls: pass mouse and btn"),
        (3, lambda x: None, "context_noise=0.25: prefill needs the history's noise"),
    ],
)
def test_wrong_inputs_are_named(core, which, change, message):
    context, _ = make_inputs(core, 1)
    context = [change(x) if i == which else x for i, x in enumerate(context)]
    with pytest.raises(ValueError, match=message):
        make_rollout(core).prefill(*context)


def test_wrong_frame_inputs_are_named(core):
    context, frames = make_inputs(core, 1)
    rollout = make_rollout(core)
    rollout.prefill(*context)
    noise, mouse, btn = frames[0]
    with pytest.raises(ValueError, match=r"noise has shape \(1, 8, 2, 2\), this rollout takes \(2, 8, 2, 2\)"):
        rollout.next_frame(noise[:1], mouse, btn)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        (SamplerConf(window=0), "window=0"),
        (SamplerConf(timesteps=[]), r"timesteps=\[\]: give at least one"),
        (SamplerConf(timesteps=[0.25, 1.0]), "falling"),
        (SamplerConf(timesteps=[1.0, 0.0]), "above 0"),
        (SamplerConf(timesteps=[1.5]), "at most 1"),
        (SamplerConf(context_noise=1.5), "context_noise=1.5: must lie between 0 and 1"),
    ],
)
def test_sampler_config_is_checked(core, conf, message):
    with pytest.raises(ValueError, match=message):
        validate(conf)


@pytest.mark.parametrize("conf", [SamplerConf(), CompileConf()])
def test_configs_fit_omegaconf(conf):
    assert OmegaConf.to_object(OmegaConf.structured(conf)) == conf
