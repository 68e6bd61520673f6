import json
import sys

import numpy as np
import pytest
import record_doom
from doom_world import game as game_module
from doom_world import recording
from doom_world.game import SCENARIOS, Game
from doom_world.player import LMB, A, D, Player, S, View, W, Walls
from doom_world.recording import HELD_OUT_SEEDS, record_arrays, record_clip, record_many

from harness.data.clips import find_clips, read_clip

ROOM = Walls(np.array([[0, 0, 800, 0], [800, 0, 800, 600], [800, 600, 0, 600], [0, 600, 0, 0]], np.float64))


@pytest.fixture
def game():
    return pytest.importorskip("vizdoom", reason="needs VizDoom: pip install '.[doom]'")


def walk(player: Player, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buttons, mouse and positions of a player in an empty room, at 16 map units a frame."""
    view = View(400, 300, 0, 0, np.empty((0, 2)))
    buttons, mouse, places = [], [], []
    for _ in range(frames):
        held, dx, dy = player.act(view)
        heading = view.heading - dx
        forward, left = int(held[W]) - int(held[S]), int(held[A]) - int(held[D])
        x = view.x + 16 * (forward * np.cos(np.radians(heading)) - left * np.sin(np.radians(heading)))
        y = view.y + 16 * (forward * np.sin(np.radians(heading)) + left * np.cos(np.radians(heading)))
        view = View(np.clip(x, 16, 784), np.clip(y, 16, 584), heading, view.pitch + dy, view.monsters)
        buttons.append(held)
        mouse.append((dx, dy))
        places.append((view.x, view.y))
    return np.array(buttons), np.array(mouse), np.array(places)


def test_walls_are_as_far_as_they_are():
    east_north_west_south = ROOM.distance(100, 200, np.array([0.0, 90.0, 180.0, 270.0]))
    np.testing.assert_allclose(east_north_west_south, [700, 400, 100, 200])
    assert ROOM.distance(-50, 300, np.array([180.0]))[0] == np.inf


def test_a_player_without_pauses_acts_in_every_frame():
    buttons, mouse, places = walk(Player(np.random.default_rng(0), ROOM, armed=False, pauses=False), 600)
    assert (buttons[:, [W, A, S, D]].any(1) | (np.abs(mouse[:, 0]) > 0.5)).mean() > 0.98
    assert np.ptp(places[:, 0]) > 300
    assert np.ptp(places[:, 1]) > 200


def test_turns_are_smooth_and_moderate():
    _, mouse, _ = walk(Player(np.random.default_rng(1), ROOM, armed=False, pauses=False), 600)
    assert np.abs(mouse[:, 0]).max() <= 9
    assert 1 < np.abs(mouse[:, 0]).mean() < 6
    assert np.abs(np.diff(mouse[:, 0])).max() < 5


def test_a_player_with_pauses_stands_about_one_frame_in_eight():
    buttons, mouse, _ = walk(Player(np.random.default_rng(2), ROOM, armed=False, pauses=True), 8_000)
    still = ~buttons.any(1) & ~mouse.any(1)
    assert 0.07 < still.mean() < 0.2


def test_a_player_told_to_stand_does_nothing():
    player = Player(np.random.default_rng(3), ROOM, armed=True, pauses=False)
    walk(player, 50)
    player.stand()
    buttons, mouse, _ = walk(player, 50)
    assert not buttons.any()
    assert not mouse.any()


def test_an_armed_player_turns_to_a_monster_and_shoots():
    player = Player(np.random.default_rng(4), ROOM, armed=True, pauses=False)
    heading, shots = 0.0, 0
    for _ in range(60):
        player.goal = None
        held, dx, _ = player.act(View(300, 300, heading, 0, np.array([[600.0, 400.0]])))
        heading -= dx
        shots += int(held[LMB])
    assert abs(heading - np.degrees(np.arctan2(100, 300))) < 6
    assert shots > 0


@pytest.mark.parametrize("scenario", ["my_way_home", "deathmatch"])
def test_the_same_seed_gives_the_same_frames(game, scenario):
    first, again = (record_arrays(scenario, 11, 40, size=64) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    other_seed = record_arrays(scenario, 12, 40, size=64)
    assert not np.array_equal(first[0], other_seed[0])


def test_arrays_are_as_promised(game):
    frames, buttons, mouse, segment = record_arrays("health_gathering_supreme", 0, 30, size=32, frame_skip=4)
    assert (frames.shape, frames.dtype) == ((30, 32, 32, 3), np.uint8)
    assert (buttons.shape, buttons.dtype) == ((30, 11), np.uint8)
    assert (mouse.shape, mouse.dtype) == ((30, 2), np.float32)
    assert segment.tolist() == [0] * 30
    assert set(np.unique(buttons)) == {0, 1}


def test_the_segment_changes_where_an_episode_ends(game, monkeypatch):
    monkeypatch.setattr(game_module, "EPISODE_TICS", 40)
    _, _, _, segment = record_arrays("my_way_home", 0, 60, size=32)
    assert set(np.diff(segment)) == {0, 1}
    assert 2 <= segment[-1] <= 4


def test_turning_right_moves_the_picture_left_in_the_frame_it_is_held(game):
    """Frame i is the result of action i: no frame of delay between the mouse and the picture."""
    with Game("my_way_home", 5, 128, 2) as doom:
        still = np.zeros(11, np.uint8)
        doom.step(still, 0, 0)
        before, heading = doom.frame().astype(int), doom.view().heading
        doom.step(still, 5.0, 0)
        after, turned = doom.frame().astype(int), doom.view().heading
        assert (heading - turned) % 360 == pytest.approx(5, abs=0.05)
        doom.step(still, 0, 0)
        assert doom.view().heading == turned
    shift = min(range(-20, 21), key=lambda s: np.abs(np.roll(before, s, 1) - after)[:, 24:-24].mean())
    assert -16 <= shift <= -4  # 5 degrees at about 0.6 degrees a pixel


def test_looking_down_moves_the_picture_up(game):
    with Game("my_way_home", 5, 128, 2) as doom:
        still = np.zeros(11, np.uint8)
        doom.step(still, 0, 0)
        before = doom.frame().astype(int)
        doom.step(still, 0, 4.0)
        after = doom.frame().astype(int)
        assert doom.view().pitch == pytest.approx(4, abs=0.05)
    shift = min(range(-20, 21), key=lambda s: np.abs(np.roll(before, s, 0) - after)[24:-24].mean())
    assert shift < 0


def test_the_seed_is_the_games_too(game):
    places = []
    for seed in (1, 2):
        with Game("my_way_home", seed, 32, 2) as doom:
            places.append((doom.view().x, doom.view().y))
    assert places[0] != places[1]


def test_clips_move_throughout_or_stand_throughout(game):
    moving = record_clip("defend_the_center", HELD_OUT_SEEDS, 20, "motion", size=32)
    still = record_clip("health_gathering_supreme", HELD_OUT_SEEDS + 1, 20, "stand_still", size=32)
    assert (moving.buttons.any(1) | (moving.mouse[:, 0].abs() > 0.5)).all()
    assert not still.buttons.any()
    assert not still.mouse.any()
    assert (moving.fps, moving.id) == (35.0, f"defend_the_center_{HELD_OUT_SEEDS}_motion")
    change = [clip.frames.float().diff(dim=0).abs().mean() for clip in (moving, still)]
    assert change[0] > 5 * change[1]


def test_training_and_held_out_seeds_are_kept_apart(tmp_path):
    with pytest.raises(ValueError, match="seeds 999999 to 1000000: those from 1000000 on are held out"):
        record_many(2, 1, HELD_OUT_SEEDS - 1, tmp_path, shard_frames=1)
    with pytest.raises(ValueError, match="seed 999999: clips are held out"):
        record_clip("deathmatch", HELD_OUT_SEEDS - 1, 10, "motion")


def test_workers_write_the_shards_that_one_game_gives(game, tmp_path):
    index = record_many(40, 2, 21, tmp_path, shard_frames=20, size=32)
    assert [(shard["seed"], shard["scenario"]) for shard in index] == [(21, "deathmatch"), (22, "my_way_home")]
    assert json.loads((tmp_path / "index.json").read_text()) == index
    expected = record_arrays("my_way_home", 22, 20, size=32)
    for name, array in zip(("frames", "buttons", "mouse", "segment"), expected, strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / f"shard_00001.{name}.npy"), array)


def test_shards_follow_the_scenarios_shares():
    names = recording._schedule(100)
    assert {name: names.count(name) for name in SCENARIOS} == {
        name: round(100 * scenario.share) for name, scenario in SCENARIOS.items()
    }


def test_one_command_records_clips_of_both_tags(game, tmp_path, monkeypatch, capsys):
    command = ["record_doom", "--out", str(tmp_path), "--clips", "4", "--frames", "8", "--size", "32"]
    monkeypatch.setattr("sys.argv", command)
    record_doom.main()
    clips = [read_clip(path) for path in find_clips(tmp_path)]
    assert sorted(clip.tag for clip in clips) == ["motion"] * 3 + ["stand_still"]
    assert len({clip.scenario for clip in clips}) == 4
    assert sorted(clip.seed for clip in clips) == [HELD_OUT_SEEDS + k for k in range(4)]
    assert capsys.readouterr().out.count("dB PSNR") == 4


def test_a_wrong_request_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["record_doom", "--out", str(tmp_path), "--seed", "3"])
    with pytest.raises(SystemExit, match="2"):
        record_doom.main()
    assert capsys.readouterr().err.startswith("error: seed 3: clips are held out")
    with pytest.raises(ValueError, match="unknown scenario 'e1m1': choose one of deathmatch"):
        record_arrays("e1m1", 0, 1)
    with pytest.raises(ValueError, match="size 100"):
        record_arrays("deathmatch", 0, 1, size=100)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clips", "0", "--frames", "-1"], "--clips 0: at least 1; --frames -1: at least 1"),
        (["--out", "/proc/x"], "/proc/x: cannot be written to"),
    ],
)
def test_nothing_to_record_and_nowhere_to_write_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["record_doom.py", *arguments, *out])
    with pytest.raises(SystemExit) as ended:
        record_doom.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
