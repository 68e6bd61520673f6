"""A rollout taken over at its place, real frames put into it, and moments that one comes back to."""

import pytest
import torch
from rollout_cases import make_core, make_inputs, make_rollout, play

from harness.kv import KVConf, KVScales, KVStorage

CONFS = {
    "plain": KVConf(),
    "int8": KVConf(KVStorage.i8_scale),
    "mx": KVConf(KVStorage.mx),
    "mx_ema": KVConf(KVStorage.mx, scales=KVScales.per_head_ema),
}


@pytest.fixture(scope="module")
def core():
    return make_core()


@pytest.fixture(params=CONFS.values(), ids=CONFS)
def conf(request):
    return request.param


def test_coming_back_to_a_saved_moment_plays_the_same_frames_bit_for_bit(core, conf):
    context, frames = make_inputs(core, 9)
    rollout = make_rollout(core, conf=conf)
    play(rollout, context, frames[:3])
    moment = rollout.saved()
    first = torch.stack([rollout.next_frame(*frame) for frame in frames[3:]])
    rollout.restore(moment)
    assert torch.equal(torch.stack([rollout.next_frame(*frame) for frame in frames[3:]]), first)


def test_a_moment_can_be_restored_by_another_rollout_of_the_same_model(core, conf):
    context, frames = make_inputs(core, 6)
    one, other = make_rollout(core, conf=conf), make_rollout(core, conf=conf)
    play(one, context, frames[:3])
    other.restore(one.saved())
    assert all(torch.equal(one.next_frame(*frame), other.next_frame(*frame)) for frame in frames[3:])


def test_a_moment_of_another_format_is_refused_and_changes_nothing(core):
    context, frames = make_inputs(core, 3)
    one, other = make_rollout(core), make_rollout(core, conf=CONFS["mx"])
    play(one, context, frames[:1])
    play(other, context, frames[:1])
    expected = one.saved()
    with pytest.raises(ValueError, match="another model, window, number of clips or KV format"):
        one.restore(other.saved())
    assert all(map(torch.equal, one.saved(), expected))


@pytest.mark.parametrize("first", [1, 5, 70])
def test_a_prefill_at_a_later_place_fills_the_slots_of_its_frames(core, conf, first):
    """Angles differ in rounding with the place, so frames agree but for that; frame and slots agree exactly."""
    context, frames = make_inputs(core, 6)
    zero, later = make_rollout(core, conf=conf), make_rollout(core, conf=conf)
    zero.prefill(*context)
    later.prefill(*context, first=first)
    assert int(later.cache.frame) == int(zero.cache.frame) + first
    exact = conf is CONFS["plain"]
    for frame in frames:
        torch.testing.assert_close(
            later.next_frame(*frame), zero.next_frame(*frame), rtol=0, atol=1e-4 if exact else 0.05
        )
    for layer in range(core.cfg.n_layers):
        for ours, theirs in zip(later.cache.ordered(layer)[1:], zero.cache.ordered(layer)[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if exact else 0.1)


def test_an_appended_frame_is_the_history_that_a_prefill_would_hold(core):
    """The first layer's K and V depend on their own frame alone, so there both ways must leave the same."""
    context, frames = make_inputs(core, 3, window=5)
    history, mouse, btn, noise = context
    rollout, whole = make_rollout(core), make_rollout(core)
    rollout.prefill(*(x[:, :4] for x in context))
    rollout.append(history[:, 4], noise[:, 4], mouse[:, 4], btn[:, 4])
    whole.prefill(*(x[:, 1:] for x in context), first=1)
    assert int(rollout.cache.frame) == int(whole.cache.frame) == 4
    for ours, theirs in zip(rollout.cache.ordered(0), whole.cache.ordered(0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ignoring = make_rollout(core)
    ignoring.prefill(*(x[:, :4] for x in context))
    ignoring.next_frame(noise[:, 4], mouse[:, 4], btn[:, 4])
    after, before, wrong = (r.next_frame(*frames[0]) for r in (rollout, whole, ignoring))
    assert (after - before).norm() < 0.5 * (wrong - before).norm(), "the real frame is what is seen"


def test_nothing_can_be_appended_or_saved_before_a_prefill(core):
    rollout = make_rollout(core)
    with pytest.raises(RuntimeError, match="call prefill"):
        rollout.append(torch.zeros(2, 8, 2, 2), torch.zeros(2, 8, 2, 2), torch.zeros(2, 2), torch.zeros(2, 11))
    with pytest.raises(RuntimeError, match="call prefill"):
        rollout.saved()
