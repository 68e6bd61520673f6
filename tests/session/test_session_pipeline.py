"""A frame decoded while the next is denoised is the frame that a step gives, bit for bit, in every arm."""

import threading
import time

import pytest
import torch

from harness.live.pipeline import Pipeline
from harness.session import Action, open_session

NOT_OF_PLAY = ("measure.", "data.limit")
ON_A_GPU = ("model=smoke", "trainer=gpu", "compile=on", "attention=fused", "quant=mxfp8_all", "kv=mx_v_only")
needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=needs_gpu)])
def session(request, game):
    words = [f"{key}={value}" for key, value in game.items() if not key.startswith(NOT_OF_PLAY)]
    ours = (*words, "quant=mxfp4_all", "kv=mx_v_only") if request.param == "cpu" else ON_A_GPU
    with open_session(*ours) as opened:
        yield opened


def moves(count):
    return [Action(("W",) if i % 2 else (), (float(i % 3 - 1), 0.0)) for i in range(count)]


@pytest.mark.parametrize("split", [False, True])
def test_decoding_beside_denoising_gives_the_frames_of_steps(session, split):
    clip, actions = session.engine.clips()[0].id, moves(24)
    session.reset(clip)
    session.split(split)
    stepped = []
    for action in actions:
        session.step(action)
        stepped.append({arm: session.frame_of(arm).clone() for arm in session.live})
    session.reset(clip)
    session.split(split)
    piped, ms = [], []

    def done(rolled, picture, note):
        piped.append({arm: moment.picture[0].clone() for arm, moment in rolled.moments.items()})
        ms.append(rolled.ms)
        assert torch.equal(picture, piped[-1][rolled.arm])

    pipeline = Pipeline(session, done)
    for action in actions:
        pipeline.put(session.advance(action), None)
    pipeline.drain()
    pipeline.close()
    assert len(piped) == len(stepped)
    for ours, theirs in zip(piped, stepped, strict=True):
        assert set(ours) == set(theirs) == set(session.live)
        for arm in ours:
            assert torch.equal(ours[arm], theirs[arm]), arm
    assert all(row[arm]["dit"] > 0 and row[arm]["decoder"] > 0 for row in ms for arm in session.live)


def test_one_frame_is_decoded_at_a_time_and_what_decoding_raises_is_raised(session, monkeypatch):
    session.reset(session.engine.clips()[0].id)
    inside, most, lock = 0, 0, threading.Lock()

    def slow(rolled):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= 1
        if rolled.frame == last:
            raise OSError("no picture")

    monkeypatch.setattr(session, "decode", slow)
    pipeline, last = Pipeline(session, lambda *_: None), session.frame + 4
    for action in moves(4):
        pipeline.put(session.advance(action), None)
    with pytest.raises(OSError, match="no picture"):
        pipeline.drain()
    pipeline.drain()  # once
    pipeline.close()
    assert most == 1
