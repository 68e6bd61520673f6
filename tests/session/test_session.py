"""The session API on a tiny model: the same code as a run, moments, formats switched in the same world."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.ab.job import build_data
from harness.ab.module import RolloutModule
from harness.config import plan_run
from harness.measure.stability import finite_clips
from harness.session import Action, Context, SessionError, SessionState, StateError, UnstableWorldError, open_session
from harness.session import session as session_module
from harness.session.engine import Engine, to_pictures
from harness.session.recording import Recorder, replay
from harness.session.session import Session

FORMATS = ("quant=mxfp4_all", "kv=mx_v_only")
NOT_OF_PLAY = ("measure.", "data.limit")


@pytest.fixture(scope="module")
def words(game):
    return [f"{key}={value}" for key, value in game.items() if not key.startswith(NOT_OF_PLAY)]


@pytest.fixture(scope="module")
def session(words):
    with open_session(*words, *FORMATS) as opened:
        yield opened


@pytest.fixture
def clip(session):
    return session.engine.clips()[0].id


def walk(session, frames, start=0):
    moves = [Action(("W",), (0.5, 0.0)), Action(("A", "LMB"), (-1.25, 0.5)), Action()]
    return [session.step(moves[(start + i) % 3]).clone() for i in range(frames)]


def watched(decode, latents):
    """``decode``, which also keeps what it is given."""

    def decoded(latent):
        latents.append(latent.cpu())
        return decode(latent)

    return decoded


def run_and_session(composed, words, frames):
    """Latents and pictures of each arm: of the module of a run over its first clip, and of a session fed the same."""
    plan = plan_run(composed(*words))
    data = build_data(plan)
    module = RolloutModule(plan)
    module._trainer = type("Trainer", (), {"is_global_zero": True})()
    module.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    batch = data.encode(batch)
    noise = module.noise(batch.clip_ids, frames)
    engine = Engine(plan)
    window = plan.conf.sampler.window
    for arm, side in module.arms.items():
        run_latents = []
        side.decode = watched(side.decode, run_latents)
        rolled = side.roll(batch, noise, lambda: None)
        session = Session(engine, arm)
        session.reset(batch.clip_ids if len(batch.clip_ids) > 1 else batch.clip_ids[0])
        latents, pictures = [], []
        for index in range(window, window + frames):
            actions = [
                Action.of_rows(batch.mouse[i, index], batch.btn[i, index], engine.button_names)
                for i in range(len(batch.clip_ids))
            ]
            frame = session.step(actions if len(actions) > 1 else actions[0])
            pictures.append(frame if frame.ndim == 4 else frame[None])
            latents.append(session.latent.cpu())
        theirs = torch.stack([to_pictures(rgb) for rgb in rolled.pictures.rgb().unbind(1)], 1)
        yield arm, torch.stack(run_latents, 1), torch.stack(latents, 1), theirs, torch.stack(pictures, 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_session_fed_a_clips_actions_gives_the_frames_of_a_run_bit_for_bit(composed, game, overrides, batch):
    words = [*overrides(game), *FORMATS, f"data.batch_size={batch}"]
    arms = list(run_and_session(composed, words, frames=4))
    assert [arm for arm, *_ in arms] == ["bf16", "candidate"]
    for _, run_latents, latents, run_pictures, pictures in arms:
        assert torch.equal(run_latents, latents)
        assert torch.equal(run_pictures, pictures)
    assert not torch.equal(arms[0][1], arms[1][1]), "the formats differ"


def test_the_smoke_model_plays_as_it_runs(composed):
    words = ["model=smoke", "quant=mxfp8_all", "kv=mx_ema", "data.future_frames=3"]
    for _, run_latents, latents, run_pictures, pictures in run_and_session(composed, words, frames=3):
        assert torch.equal(run_latents, latents)
        assert torch.equal(run_pictures, pictures)


def test_a_run_writes_the_frames_that_a_session_shows(record, composed, game, overrides, tmp_path):
    """Through the command's own path: the scores in its record are those of the session's frames."""
    from harness.measure.quality import score_frames

    made = record(*overrides(game), *FORMATS, "data.limit=1")
    plan = plan_run(composed(*overrides(game), *FORMATS, "data.limit=1"))
    data = build_data(plan)
    batch = data.encode(next(iter(data.predict_dataloader())))
    session = Session(Engine(plan))
    session.reset(made.clips[0].clip_id)
    frames = []
    for index in range(3, 7):
        frame = session.step(Action.of_rows(batch.mouse[0, index], batch.btn[0, index], session.engine.button_names))
        rgb = session._decode(session.latent)
        assert torch.equal(to_pictures(rgb)[0], frame)
        frames.append(((rgb[0].float() + 1) / 2).clamp(0, 1))
    psnr = score_frames(torch.stack(frames), batch.frames[0]).psnr
    assert made.clips[0].scores["candidate"].frames.psnr == pytest.approx(psnr, abs=1e-5)


def test_frames_are_pictures_that_follow_the_actions(session, clip):
    session.reset(clip)
    still = session.step(Action())
    session.reset(clip)
    moved = session.step(Action(("W", "LMB"), (3.0, -1.0)))
    assert (still.dtype, tuple(still.shape)) == (torch.uint8, (32, 32, 3))
    assert not torch.equal(still, moved)
    assert session.latent.dtype is torch.float32
    assert set(session.ms) == {"candidate"}
    assert session.ms["candidate"]["dit"] > 0


def test_the_seed_decides_the_noise(session, clip):
    session.reset(clip, seed=1)
    one = walk(session, 2)
    session.reset(clip, seed=2)
    two = walk(session, 2)
    session.reset(clip, seed=1)
    assert all(map(torch.equal, walk(session, 2), one))
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize("split", [False, True])
def test_a_saved_state_is_come_back_to_bit_for_bit(session, clip, split, tmp_path):
    session.reset(clip)
    session.split(split)
    walk(session, 2)
    state = session.state()
    state.save(tmp_path / "moment.safetensors")
    expected = walk(session, 3)
    session.reset(session.engine.clips()[1].id, seed=5)
    walk(session, 4)
    for moment in (state, SessionState.load(tmp_path / "moment.safetensors")):
        session.restore(moment)
        assert session.live == (("bf16", "candidate") if split else ("candidate",))
        assert all(map(torch.equal, walk(session, 3), expected))


def test_another_session_goes_on_from_a_state(session, clip, words):
    session.reset(clip)
    walk(session, 2)
    state = session.state()
    expected = walk(session, 2)
    other = Session(session.engine)
    other.restore(state)
    assert all(map(torch.equal, walk(other, 2), expected))


def test_a_state_that_does_not_fit_is_refused(session, clip, words, tmp_path):
    session.reset(clip)
    state = session.state()
    with open_session(*words) as plain, pytest.raises(StateError, match="a state of candidate; this session has bf16"):
        plain.restore(state)
    with open_session(*words, "quant=mxfp4_all", "kv=i8_scale") as other, pytest.raises(StateError, match="KV format"):
        other.restore(state)
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(StateError, match="not a readable"):
        SessionState.load(tmp_path / "broken.safetensors")


def altered(path, name, change):
    """A saved file whose tensor ``name`` is another, or is gone, and which says so: no digest tells."""
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "content"}
    tensors = load_file(path)
    made = change(tensors.pop(name))
    save_file({**tensors, **({} if made is None else {name: made})}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("candidate.latents", lambda x: x[..., :-1].contiguous(), "latents are torch.float32"),
        ("candidate.latents", lambda x: x.double(), "latents are torch.float64"),
        ("candidate.latents", lambda x: x * float("nan"), "latents hold NaN"),
        ("candidate.mouse", lambda x: torch.zeros(3, 1, 5), "mouse are torch.float32"),
        ("candidate.btn", lambda x: x.int(), "btn are torch.int32"),
        ("candidate.btn", lambda x: None, "lacks 'candidate.btn'"),
        ("candidate.cache.0001", lambda x: None, "KV format"),
    ],
)
def test_a_state_of_other_tensors_is_refused_before_anything_is_written(session, clip, tmp_path, name, change, told):
    session.reset(clip)
    session.state().save(tmp_path / "s.safetensors")
    with pytest.raises(StateError, match=told):
        session.restore(SessionState.load(altered(tmp_path / "s.safetensors", name, change)))


def test_a_state_with_one_flipped_bit_is_refused(session, clip, tmp_path):
    """Whichever it is: a world that goes on from another moment looks like any other."""
    session.reset(clip)
    path = tmp_path / "s.safetensors"
    session.state().save(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in (start, (start + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StateError, match="its content is not what was saved"):
            SessionState.load(path)


@pytest.fixture
def recorded(session, clip, tmp_path):
    """A recording of two steps, and the file that it is in."""
    session.reset(clip)
    recorder = Recorder(session, 1 << 24)
    for action in (Action(("W",), (0.5, 0.0)), Action()):
        recorder.step(action, session.step(action))
    recorder.recording.save(tmp_path / "r.safetensors")
    return tmp_path / "r.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("played.mouse", lambda x: torch.zeros(2, 3), "no pairs of finite numbers"),
        ("played.mouse", lambda x: x.int(), "no pairs of finite numbers"),
        ("played.mouse", lambda x: x + float("inf"), "no pairs of finite numbers"),
        ("played.btn", lambda x: x + 2, "not of 0 and 1"),
        ("played.btn", lambda x: x.float(), "not of 0 and 1"),
        ("played.btn", lambda x: x[:, :-1].contiguous(), "recorded with 10 buttons; this model has 11"),
        ("played.btn", lambda x: None, "holds no actions"),
        ("played.digests", lambda x: x[:1].clone(), "2 mouse rows, 2 of buttons, 1 digests"),
    ],
)
def test_a_recording_of_other_tensors_is_refused(session, recorded, name, change, told):
    assert replay(session, recorded).identical
    with pytest.raises(StateError, match=told):
        replay(session, altered(recorded, name, change))


@pytest.mark.parametrize("key", ["about", "counters", "events"])
@pytest.mark.parametrize("value", [None, 5, "x", [1], [[1, 2, 3]], [[True, "switch", "bf16"]]])
def test_a_recording_that_says_something_else_is_refused(session, recorded, key, value):
    with safe_open(recorded, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "content"}
    metadata["header"] = json.dumps({**json.loads(metadata["header"]), key: value})
    save_file(load_file(recorded), recorded, metadata)
    with pytest.raises(StateError, match=re.escape(str(recorded))):
        replay(session, recorded)


def test_formats_switch_in_the_same_world(session, clip):
    """The window's latents and actions stay, positions go on, and the other arm's frames follow from them."""
    session.reset(clip)
    walk(session, 4)
    before, frame = [m.latent for m in session.history()], session.frame
    session.switch("bf16")
    assert session.frame == frame
    assert int(session._worlds["bf16"].rollout.cache.frame) == frame
    assert all(map(torch.equal, [m.latent for m in session.history()], before))
    switched = walk(session, 2, start=4)
    session.reset(clip)
    session.switch("candidate")
    walk(session, 4)
    stayed = walk(session, 2, start=4)
    error = (switched[0].float() - stayed[0].float()).abs().mean()
    session.reset(session.engine.clips()[1].id)
    elsewhere = (walk(session, 1, start=4)[0].float() - stayed[0].float()).abs().mean()
    assert 0 < error < elsewhere, "another format of the same world, not another world"


def test_switching_before_a_reset_decides_where_it_begins(session, clip):
    session.switch("bf16")
    session.reset(clip)
    assert session.live == ("bf16",)
    session.switch("candidate")
    assert session.live == ("candidate",)


def test_split_arms_step_under_the_same_actions_and_noise(session, clip):
    session.switch("bf16")
    session.reset(clip)
    alone = walk(session, 4)
    session.reset(clip)
    first = walk(session, 1)
    session.split(True)
    both = [(session.step(a), session.frame_of("candidate")) for a in (Action(("A", "LMB"), (-1.25, 0.5)), Action())]
    assert torch.equal(first[0], alone[0])
    assert all(torch.equal(bf16, mine) for (bf16, _), mine in zip(both, alone[1:], strict=False))
    assert not torch.equal(*both[-1])
    assert set(session.ms) == {"bf16", "candidate"}
    session.switch("candidate")
    kept = session.frame_of("candidate")
    session.split(False)
    assert session.live == ("candidate",)
    assert torch.equal(session.frame_of("candidate"), kept), "the candidate's own split world goes on"


def test_real_pictures_can_be_put_in(session, clip):
    context = session.engine.context(clip)
    session.switch("candidate")
    session.reset(clip)
    real = session.engine.context(session.engine.clips()[1].id).pictures
    for picture in real:
        session.append_frame(picture, Action(("W",)))
    assert torch.equal(session.frame_of("candidate"), real[-1])
    assert session.frame == session.window - 1 + len(real)
    forced = session.step(Action())
    session.reset(clip)
    for _ in real:
        session.step(Action(("W",)))
    assert not torch.equal(session.step(Action()), forced)
    with pytest.raises(ValueError, match=r"give uint8 \[N, 32, 32, 3\]"):
        session.append_frame(torch.zeros(8, 8, 3, dtype=torch.uint8), Action())
    assert context.pictures.shape[1:] == (32, 32, 3)


def test_own_frames_and_actions_begin_a_world(session):
    shape = session.engine.shape
    pictures = torch.randint(0, 255, (shape.window, 32, 32, 3), dtype=torch.uint8)
    own = Context.of_pictures(session.engine, "mine", pictures, [Action(("W",))] * shape.window)
    session.reset(own)
    assert torch.equal(session.history()[0].picture[0], pictures[0])
    assert session.step(Action()).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="give 3 pictures and as many actions"):
        Context.of_pictures(session.engine, "mine", pictures[:2], [Action()])


def test_what_cannot_be_is_said(session, clip, words):
    session.reset(clip)
    with pytest.raises(ValueError, match="buttons JUMP: the model has W, A"):
        session.step(Action(("JUMP",)))
    with pytest.raises(ValueError, match="two finite numbers"):
        session.step(Action((), (float("nan"), 0.0)))
    with pytest.raises(ValueError, match="2 actions for 1 worlds"):
        session.step([Action(), Action()])
    with pytest.raises(ValueError, match="'nowhere': not one of 4 clips"):
        session.reset("nowhere")
    with pytest.raises(ValueError, match="arm 'fp2': this engine has bf16, candidate"):
        session.switch("fp2")
    with pytest.raises(ValueError, match="this config .* has bf16"):
        Engine(session.engine.plan, arms=["bf17"])
    fresh = Session(session.engine)
    with pytest.raises(SessionError, match="call reset"):
        fresh.step(Action())
    fresh.close()
    with pytest.raises(SessionError, match="closed"):
        fresh.reset(clip)


def test_a_world_with_nan_is_named_and_a_reset_brings_it_back(session, clip, monkeypatch):
    session.switch("bf16")
    session.reset(clip)
    expected = walk(session, 2)
    session.reset(clip)
    weight = session.engine.arms["bf16"].core.proj_in.weight
    kept = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(UnstableWorldError, match="arm bf16: NaN or Inf in frame 3"):
        session.step(Action())
    with torch.no_grad():
        weight.copy_(kept)
    with pytest.raises(SessionError, match="call reset"):
        session.step(Action())
    session.reset(clip)
    assert all(map(torch.equal, walk(session, 2), expected))


def test_two_sessions_of_an_engine_do_not_see_each_other(session, clip):
    session.switch("candidate")
    session.reset(clip)
    expected = walk(session, 3)
    session.reset(clip)
    other = Session(session.engine)
    other.reset(session.engine.clips()[1].id)
    got = []
    for i in range(3):
        got += walk(session, 1, start=i)
        walk(other, 1, start=i + 1)
    assert all(map(torch.equal, got, expected))


def test_long_play_stays_finite_and_keeps_its_window(session, clip):
    session.reset(clip)
    walk(session, 70)
    assert len(session.history()) == session.window
    assert bool(finite_clips(session.latent).all())
    assert session_module.FUTURE == "future", "the noise of a run"
