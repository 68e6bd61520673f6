"""The server on the tiny model: a game through its socket, whom it refuses, and what each mishap looks like."""

import re
import shutil
import time

import pytest
import torch
from starlette.websockets import WebSocketDisconnect

from harness.config.play import PlayConf, validate
from harness.data.clips import read_clip
from harness.live.page import Page
from harness.live.protocol import MOST_MESSAGES, Close
from harness.live.server import Game, url
from harness.session import Session, replay
from harness.session.recording import SUFFIX


def wait_until_free(game):
    end = time.monotonic() + 10
    while game.pool.used:
        assert time.monotonic() < end, "a session was not given back"
        time.sleep(0.01)


def test_a_player_sees_the_first_frame_plays_steps_and_pauses(make_game, serve, connect):
    game = make_game()
    with serve(game) as client, connect(client) as player:
        ready = player.last["ready"]
        assert set(ready["arms"]) == {"bf16", "candidate"}
        assert ready["arms"]["candidate"]["label"] == "mxfp4_all + mx_v_only"
        assert "kept decoded" in ready["arms"]["candidate"]["weights"]
        assert ready["buttons"][:4] == ["W", "A", "S", "D"]
        assert len(ready["clips"]) == 4
        assert player.last["state"]["reason"] == "start"
        assert player.frames[0]["frame"] == ready["window"] - 1
        player.send(type="play")
        player.until_frames(5)
        player.send(type="pause")
        player.until_state(playing=False, reason="player")
        count = len(player.frames)
        player.send(type="step")
        player.until_frames(1)
        assert player.frames[-1]["frame"] == player.frames[count - 1]["frame"] + 1
        assert player.pictures[0][:2] == b"\xff\xd8"
        serials = [frame["serial"] for frame in player.frames]
        assert serials == sorted(set(serials))
    wait_until_free(game)


def test_a_second_hello_is_a_complaint_and_the_game_goes_on(make_game, serve, connect):
    with serve(make_game()) as client, connect(client) as player:
        player.send(type="hello", protocol=1)
        player.until_notice("not understood: hello: it was said already")
        player.send(type="step")
        player.until_frames(1)
        assert player.last["state"]["released"] is False


def test_a_first_message_that_is_no_text_is_told_so(make_game, serve, connect):
    with serve(make_game()) as client, connect(client, hello=False) as player:
        player.socket.send_bytes(b"hello")
        closed = player.socket.receive()
        assert closed["code"] == Close.PROTOCOL
        assert closed["reason"] == "a binary message; messages to the server are text"


@pytest.mark.parametrize("headers", [{"origin": "http://["}, {"host": "127.0.0.1:8000]["}])
def test_an_address_that_is_none_is_refused(make_game, serve, headers):
    with serve(make_game()) as client:
        assert client.get("/", headers=headers).status_code == 403
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/play", headers=headers):
            pass


def test_inputs_are_echoed_with_the_frame_that_they_made(make_game, serve, connect):
    with serve(make_game()) as client, connect(client) as player:
        player.hold(0b10001, mouse=(3, -1), t=1234.5)
        player.send(type="step")
        player.until(lambda: player.frames[-1]["seq"] == 1)
        frame = player.frames[-1]
        assert (frame["t"], frame["buttons"], frame["mouse"]) == (1234.5, ["W", "LSHIFT"], [3, -1])
        assert frame["ms"]["candidate"]["dit"] > 0
        assert frame["rss"] > 1 << 20


def test_the_same_inputs_give_the_pictures_of_a_session(make_game, serve, connect, loaded):
    from harness.live.pictures import compress
    from harness.session import Action

    session = Session(loaded[0])
    with serve(make_game(codec="webp", quality=100)) as client, connect(client) as player:
        session.reset(player.last["state"]["clip"])
        for i in range(3):
            player.hold(1 << i, mouse=(i, 0))
            player.send(type="step")
            player.until_frames(1)
            names = loaded[0].button_names
            assert player.pictures[0] == compress(session.step(Action((names[i],), (float(i), 0.0))), "webp", 100)


def test_formats_switch_and_split_without_a_restart(make_game, serve, connect):
    with serve(make_game()) as client, connect(client) as player:
        player.send(type="play")
        player.until_frames(3)
        player.send(type="arm", arm="bf16")
        player.until(lambda: player.frames[-1]["arm"] == "bf16")
        numbers = [frame["frame"] for frame in player.frames]
        assert numbers == sorted(numbers)
        player.send(type="view", view="split")
        player.until(lambda: len(player.frames[-1]["panes"]) == 2)
        player.until_frames(2)
        assert [pane["name"] for pane in player.frames[-1]["panes"]] == ["bf16", "candidate"]
        assert 5 < player.frames[-1]["psnr"]["mean"] <= 100
        assert set(player.frames[-1]["ms"]) == {"bf16", "candidate"}
        player.send(type="view", view="difference")
        player.until(lambda: len(player.frames[-1]["panes"]) == 3)
        player.send(type="view", view="one")
        player.until(lambda: len(player.frames[-1]["panes"]) == 1)
        assert player.frames[-1]["frame"] > numbers[-1]


def test_a_reset_takes_clip_start_and_seed(make_game, serve, connect):
    with serve(make_game()) as client, connect(client) as player:
        clips = [clip["id"] for clip in player.last["ready"]["clips"]]
        player.send(type="reset", clip=clips[1], start=2, seed=7)
        player.until_state(clip=clips[1], start=2, seed=7)
        player.send(type="reset", clip="nowhere", start=0, seed=None)
        player.until_notice("'nowhere': not one of 4 clips")
        player.send(type="reset", clip=None, start=0, seed=None)
        player.until_state(clip=clips[1], start=0, seed=0)


def test_what_was_played_is_a_clip_and_replays_bit_for_bit(make_game, serve, connect, loaded, record):
    """Through formats switched and split; and the harness judges both arms on the clip."""
    game = make_game()
    with serve(game) as client, connect(client) as player:
        player.send(type="record", on=True)
        player.until_state(recording=True)
        for i, change in enumerate((None, {"type": "arm", "arm": "bf16"}, {"type": "view", "view": "split"}, None)):
            if change:
                player.send(**change)
            player.hold(1 << i, mouse=(i, 0.5))
            player.send(type="step")
            player.until(lambda i=i: player.frames[-1]["recorded"] == i + 1)
        player.send(type="record", on=False)
        saved = player.until_notice("saved 4 frames")
        name = saved["saved"]
        assert "data.future_frames=4" in saved["command"]
        assert "play.port" not in saved["command"]
        player.until(lambda: "clips" in player.last)
        own = [clip for clip in player.last["clips"]["clips"] if clip["own"]]
        assert own == [{"id": f"played/{name}", "tag": "motion", "frames": 7, "own": True, "replayable": True}]
        player.send(type="replay", id=f"played/{name}")
        player.until_notice("all 4 frames are what they were, bit for bit")
        player.send(type="reset", clip=f"played/{name}", start=1, seed=3)
        player.until_state(clip=f"played/{name}")
    folder = game.shelf.folder
    clip = read_clip(folder / f"{name}.json")
    assert clip.buttons[3:].argmax(1).tolist() == [0, 1, 2, 3]
    assert clip.mouse[3:, 0].tolist() == [0, 1, 2, 3]
    assert replay(Session(loaded[0]), folder / f"{name}{SUFFIX}").identical


def test_the_harness_judges_both_arms_on_a_played_clip(make_game, serve, connect, record, game, overrides):
    live = make_game()
    with serve(live) as client, connect(client) as player:
        player.send(type="record", on=True)
        player.send(type="play")
        player.until(lambda: player.frames[-1]["recorded"] >= 4)
        player.send(type="record", on=False)
        notice = player.until_notice("saved")
    words = {**game, "data.paths": f"[{live.shelf.folder}]", "data.future_frames": notice["frames"], "data.limit": 1}
    made = record(*overrides(words), "quant=mxfp4_all", "kv=mx_v_only")
    assert [clip.clip_id for clip in made.clips] == [notice["saved"]]
    assert made.clips[0].scores["candidate"].psnr > 5


def test_a_replay_on_other_formats_is_refused(make_game, serve, connect, loaded, tmp_path, game):
    from harness.session import StateError, open_session
    from harness.session.recording import Recorder

    session = Session(loaded[0])
    session.reset(loaded[0].clips()[0].id)
    recorder = Recorder(session, 1 << 20)
    from harness.session import Action

    recorder.step(Action(), session.step(Action()))
    recorder.recording.save(tmp_path / f"one{SUFFIX}")
    words = [f"{k}={v}" for k, v in game.items() if not k.startswith(("measure.", "data.limit"))]
    with open_session(*words, "quant=mxfp8_all") as other, pytest.raises(StateError, match="another quant, kv"):
        replay(other, tmp_path / f"one{SUFFIX}")


def test_a_recording_ends_where_memory_does(make_game, serve, connect, monkeypatch):
    with serve(make_game()) as client, connect(client) as player:
        monkeypatch.setattr("harness.live.taping.RECORD_UNIT", 32 * 32 * 3 // 100)
        player.send(type="record", on=True)
        player.send(type="play")
        player.until_notice("as long as play.record_mb allows")
        assert player.until_notice("frames as")["frames"] == 5


def test_sessions_are_bounded_and_a_lost_connection_frees_its_own(make_game, serve, connect):
    game = make_game(max_sessions=1)
    with serve(game) as client:
        with connect(client) as player:
            player.send(type="play")
            with connect(client, hello=False) as second:
                second.send(type="hello", protocol=1)
                with pytest.raises(ConnectionError) as refused:
                    second.hear()
                assert refused.value.args[0] == Close.BUSY
                assert "all 1 sessions are in use" in refused.value.args[1]
            assert client.get("/status").json()["sessions"]["used"] == 1
        wait_until_free(game)
        with connect(client) as player:
            player.send(type="step")
            player.until_frames(1)
    wait_until_free(game)


def test_a_new_player_does_not_see_the_last_ones_world(make_game, serve, connect):
    game = make_game(max_sessions=1)
    with serve(game) as client:
        with connect(client) as player:
            first = player.pictures[0]
            player.send(type="arm", arm="bf16")
            player.send(type="view", view="split")
            player.send(type="play")
            player.until_frames(6)
        wait_until_free(game)
        with connect(client) as player:
            assert player.pictures == [first]
            assert (player.last["state"]["arm"], player.last["state"]["view"]) == ("candidate", "one")


def test_a_stalled_browser_pauses_the_game_and_goes_on_when_it_draws(make_game, serve, connect):
    with serve(make_game(stall_s=0.3, in_flight=2)) as client, connect(client) as player:
        player.draws = False
        player.send(type="play")
        player.until_state(playing=False, reason="stalled")
        assert len(player.frames) <= 3, "no more than is in flight was sent"
        player.draws = True
        player.send(type="drawn", serial=player.frames[-1]["serial"])
        player.until_state(playing=True)
        player.until_frames(2)
        assert player.frames[-1]["dropped"] > 0


def test_nobody_playing_pauses_and_then_frees_the_session(make_game, serve, connect):
    game = make_game(idle_s=0.3, release_s=0.4)
    with serve(game) as client, connect(client) as player:
        player.send(type="play")
        player.until_state(playing=False, reason="idle")
        assert player.until_closed() == Close.RELEASED
        wait_until_free(game)


def test_nan_in_the_model_is_told_and_a_reset_goes_on(make_game, serve, connect, loaded):
    weight = loaded[0].arms["candidate"].core.proj_in.weight
    kept = weight.clone()
    with serve(make_game()) as client, connect(client) as player:
        player.send(type="play")
        player.until_frames(2)
        try:
            with torch.no_grad():
                weight.fill_(float("nan"))
            player.until_state(playing=False, reason="unstable")
        finally:
            with torch.no_grad():
                weight.copy_(kept)
        player.until_notice("NaN or Inf in frame")
        player.send(type="play")
        player.until_notice("no world to go on with: reset")
        player.send(type="reset", clip=None, start=0, seed=None)
        player.until_state(playing=True)
        player.until_frames(2)


def test_a_fault_of_the_game_ends_that_game_alone(make_game, serve, connect, monkeypatch):
    game = make_game()
    with serve(game) as client:
        with connect(client) as player:
            monkeypatch.setattr(Session, "advance", lambda *_: 1 / 0)
            player.send(type="step")
            player.until_closed()
            assert "the game broke" in player.notices[-1]["text"]
        wait_until_free(game)
        monkeypatch.undo()
        with connect(client) as player:
            player.send(type="step")
            player.until_frames(1)


def test_messages_that_cannot_be_read_are_answered_then_refused(make_game, serve, connect):
    with serve(make_game()) as client, connect(client) as player:
        player.socket.send_text("{")
        player.until_notice("not understood: a message that is no JSON")
        player.socket.send_bytes(b"x")
        player.until_notice("messages to the server are text")
        for _ in range(10):
            player.socket.send_text('{"type": "fly"}')
        assert player.until_closed() == Close.POLICY


def test_a_flood_of_messages_is_cut_off(make_game, serve, connect):
    with serve(make_game()) as client, connect(client) as player:
        for _ in range(2 * MOST_MESSAGES + 2):
            player.socket.send_text('{"type": "drawn", "serial": 0}')
        assert player.until_closed() == Close.POLICY


@pytest.mark.parametrize("first", ['{"type": "hello", "protocol": 2}', '{"type": "play"}', "nonsense"])
def test_another_protocol_is_told_and_closed(make_game, serve, connect, first):
    game = make_game()
    with serve(game) as client, connect(client, hello=False) as player:
        player.socket.send_text(first)
        with pytest.raises(ConnectionError) as ended:
            player.hear()
        assert ended.value.args[0] == Close.PROTOCOL
    assert game.pool.used == 0


def test_pages_elsewhere_may_not_connect(make_game, serve, connect):
    with serve(make_game()) as client:
        with connect(client, origin="http://127.0.0.1:8000") as player:
            assert player.frames
        with pytest.raises(WebSocketDisconnect), connect(client, origin="http://evil.example"):
            pass
        with (
            pytest.raises(WebSocketDisconnect),
            connect(client, host="evil.example:8000", origin="http://evil.example:8000"),
        ):
            pass
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_an_open_address_needs_the_token(make_game, serve, connect):
    game = make_game(host="0.0.0.0")
    assert re.fullmatch(r"http://0\.0\.0\.0:5/\?token=[0-9a-f]{32}", url(game, 5))
    with serve(game) as client:
        assert client.get("/").status_code == 403
        assert client.get("/?token=wrong").status_code == 403
        assert client.get(f"/?token={game.token}").status_code == 200
        assert client.get("/status").status_code == 403
        with pytest.raises(WebSocketDisconnect), connect(client):
            pass
        with connect(client, path=f"/play?token={game.token}") as player:
            assert player.frames
    assert make_game().token is None
    assert make_game(token="abcdefgh1").token == "abcdefgh1"


def test_the_page_asks_for_nothing_else_and_runs_nothing_else():
    page = Page.load()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,)""", page.html)
    assert "http://" not in page.html.replace("http://www.w3.org", "")
    assert "https://" not in page.html
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["Referrer-Policy"] == "no-referrer"


def test_every_setting_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"(?s)play\.port=70000.*play\.fps=0.*play\.quality=101.*play\.token"):
        validate(PlayConf(port=70000, fps=0, quality=101, token="a b"))
    validate(PlayConf())
    assert PlayConf(host="::1").is_local
    assert PlayConf(host="localhost").is_local
    assert not PlayConf(host="0.0.0.0").is_local


def test_a_game_without_a_candidate_has_one_arm(loaded, game, tmp_path, serve, connect):
    from harness.session.open import load_play

    words = [f"{k}={v}" for k, v in game.items() if not k.startswith(("measure.", "data.limit"))]
    engine, conf, labels = load_play([*words, f"play.folder={tmp_path}"])
    with serve(Game.of(engine, conf, labels)) as client, connect(client) as player:
        assert set(player.last["ready"]["arms"]) == {"bf16"}
        player.send(type="view", view="split")
        player.until_notice("a split needs a candidate")
        player.send(type="arm", arm="candidate")
        player.until_notice("this engine has bf16")
    shutil.rmtree(tmp_path, ignore_errors=True)
