#!/usr/bin/env python3
"""Record gameplay of VizDoom's bundled Freedoom scenarios with a scripted player.

    pip install '.[doom]'
    python scripts/record_doom.py --out clips --clips 12 --seed 1000000

writes 12 clips (see `harness/data/clips.py`) of 100 frames, three of four of them `motion`, the rest
`stand_still`, spread over the scenarios. `record_arrays` and `record_many` give the same play as arrays,
for training.

**Actions.** One row a frame: what is held while that frame is produced. `buttons [n,11]` 0/1 in the order
W, A, S, D, LSHIFT, SPACE, R, F, E, LMB, RMB: W/S/A/D move forward, back, left, right, LSHIFT runs, SPACE
jumps, E uses, LMB attacks. R, F and RMB have no use in these scenarios and are always 0. `mouse [n,2]` is
`(dx, dy)` in degrees of view rotation per recorded frame: dx > 0 turns right (typically 0.5 to 2, at most 3),
dy > 0 looks down.

**Frames.** The game renders 320 x 256 square pixels at a 90 degree field of view without HUD, crosshair,
damage flashes or blood; the middle 256 x 256 is averaged over whole blocks of pixels to `size` x `size` RGB,
so nothing is stretched. One recorded frame every `frame_skip` tics of 1/35 s: 35 a second at the default 1.
The player cannot be hurt, so that play goes on.

**Seeds.** The same scenario, seed and VizDoom version give the same frames. Training uses seeds below
1 000 000, held-out clips seeds from 1 000 000 on. Each scenario has one fixed layout: held-out clips show the
same maps in other play (other spawn points, routes, fights), not other maps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    from harness.start import require

    require()

import numpy as np
from numpy.typing import NDArray

from harness.data.conf import BUTTON_NAMES

if TYPE_CHECKING:
    import vizdoom

    from harness.data.clips import Clip

GAME_INPUTS = (
    *("MOVE_FORWARD", "MOVE_LEFT", "MOVE_BACKWARD", "MOVE_RIGHT", "SPEED", "JUMP", "RELOAD", "ZOOM", "USE"),
    *("ATTACK", "ALTATTACK", "TURN_LEFT_RIGHT_DELTA", "LOOK_UP_DOWN_DELTA"),
)
POSE = ("POSITION_X", "POSITION_Y", "ANGLE", "PITCH")
W, A, S, D, LSHIFT, SPACE, E, LMB = 0, 1, 2, 3, 4, 5, 8, 9
TICS_PER_SECOND = 35
SIZES = (32, 64, 128, 256)
HELD_OUT_SEEDS = 1_000_000
EPISODE_TICS = 1400
SETTLE_TICS = 14  # the first tics of an episode ignore input while the weapon rises
# Degrees to the right of the view's centre in which the player looks for room.
RAYS = np.array([0, 10, -10, *range(30, 180, 25), *range(-30, -180, -25), 180], np.float64)
MONSTERS = {"Zombieman", "ShotgunGuy", "ChaingunGuy", "Demon", "DoomImp", "HellKnight", "MarineChainsawVzd"}


@dataclass(frozen=True)
class Scenario:
    """One bundled scenario: its share of a training mix and whether the player carries a weapon there."""

    share: float
    armed: bool


SCENARIOS = {
    "deathmatch": Scenario(share=0.30, armed=True),
    "my_way_home": Scenario(share=0.30, armed=False),
    "health_gathering_supreme": Scenario(share=0.16, armed=False),
    "defend_the_center": Scenario(share=0.12, armed=True),
    "defend_the_line": Scenario(share=0.12, armed=True),
}


def _import_vizdoom() -> Any:
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError("recording needs VizDoom: pip install '.[doom]'") from error
    return vizdoom


class Walls:
    """Line segments that block movement; answers how far a ray from a point gets (map units)."""

    def __init__(self, lines: NDArray[np.float64]):
        self.origin, self.edge = lines[:, :2], lines[:, 2:] - lines[:, :2]

    def distance(self, x: float, y: float, headings: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distance to the nearest wall along each heading (degrees from east to north); inf without one."""
        radians = np.radians(headings)[:, None]
        ray_x, ray_y = np.cos(radians), np.sin(radians)
        to_x, to_y = self.origin[:, 0] - x, self.origin[:, 1] - y
        cross = ray_x * self.edge[:, 1] - ray_y * self.edge[:, 0]
        cross = np.where(np.abs(cross) < 1e-9, 1e-9, cross)
        along_ray = (to_x * self.edge[:, 1] - to_y * self.edge[:, 0]) / cross
        along_edge = (to_x * ray_y - to_y * ray_x) / cross
        hit = (along_ray > 0) & (along_edge >= 0) & (along_edge <= 1)
        return np.where(hit, along_ray, np.inf).min(axis=1)


@dataclass
class View:
    """What the player knows before it acts: pose (map units, degrees) and monsters' positions [m,2]."""

    x: float
    y: float
    heading: float
    pitch: float
    monsters: NDArray[np.float64]


@dataclass
class Player:
    """Scripted player: walks and turns smoothly to where there is room, fights what it sees, stops at times.

    `pauses`: mix in stops (short ones, and long standing bouts: about one frame in eight); False never stops.
    """

    rng: np.random.Generator
    walls: Walls
    armed: bool
    pauses: bool
    rate: float = 0.0  # degrees per recorded frame, > 0 to the right
    target_rate: float = 0.0
    goal: float | None = None  # a heading to turn to
    target_pitch: float = 0.0
    keys: tuple[int, ...] = (W,)
    timers: dict[str, int] = field(default_factory=lambda: {"turn": 0, "keys": 0, "bout": 0, "fire": 0})
    standing: bool = False
    blocked: int = 0
    last_xy: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.timers["bout"] = int(self.rng.integers(100, 600))

    def stand(self) -> None:
        """Let go of everything, for good."""
        self.standing, self.timers["bout"] = True, sys.maxsize

    def act(self, view: View) -> tuple[NDArray[np.uint8], float, float]:
        """Buttons [11], dx, dy (degrees) to hold during the next recorded frame."""
        for name in self.timers:
            self.timers[name] -= 1
        reach, ahead = self._room(view)
        buttons = np.zeros(len(BUTTON_NAMES), np.uint8)
        if self.pauses or self.standing:
            self._plan_bout(view)
        if self.standing:
            self.rate, self.last_xy = 0.0, None
            return buttons, 0.0, 0.0
        self._plan_keys()
        self._plan_turn(view, reach, ahead)
        self._fight(view)
        self.rate += 0.2 * (self.target_rate - self.rate) + self.rng.normal(0, 0.03)
        buttons[[key for key in self.keys if ahead > 48 or key not in (W, LSHIFT)]] = 1
        buttons[SPACE] = self.rng.random() < 0.002
        buttons[E] = self.rng.random() < 0.002
        buttons[LMB] = self.armed and self.timers["fire"] > 0
        dy = float(np.clip(0.1 * (self.target_pitch - view.pitch), -0.75, 0.75))
        return buttons, round(float(np.clip(self.rate, -3, 3)), 3), round(dy, 3)

    def _room(self, view: View) -> tuple[NDArray[np.float64], float]:
        """Distance to a wall along each of `RAYS`, and ahead, in map units (at most 1000)."""
        reach = np.minimum(self.walls.distance(view.x, view.y, view.heading - RAYS), 1000)
        return reach, float(min(reach[0], 1.8 * reach[1], 1.8 * reach[2]))  # beside a corridor walls may be nearer

    def hemmed_in(self, view: View) -> bool:
        """Is there nothing to look at here but a wall?"""
        return self._room(view)[1] < 150

    def _plan_bout(self, view: View) -> None:
        if self.timers["bout"] > 0 or (not self.standing and self.hemmed_in(view)):
            return
        self.standing = not self.standing
        if not self.standing:
            self.timers["bout"] = int(self.rng.integers(200, 840))
        elif self.rng.random() < 0.65:
            self.timers["bout"] = int(self.rng.integers(10, 48))
        else:
            self.timers["bout"] = int(self.rng.integers(80, 240))

    def _plan_keys(self) -> None:
        if self.timers["keys"] > 0:
            return
        choices = [(W,), (W, A), (W, D), (A,), (D,), (S,), ()]
        keys = choices[self.rng.choice(len(choices), p=[0.60, 0.10, 0.10, 0.05, 0.05, 0.04, 0.06])]
        self.timers["keys"] = int(self.rng.integers(20, 120) if keys[:1] == (W,) else self.rng.integers(16, 48))
        self.keys = (*keys, LSHIFT) if keys and self.rng.random() < 0.05 else keys
        if not keys:  # turning on the spot: never a pause in disguise
            self._turn_at(self._sign() * self.rng.uniform(0.75, 2), self.timers["keys"])
        if self.rng.random() < 0.35:
            self.target_pitch = self.rng.normal(0, 4)
        if self.armed and self.rng.random() < 0.3:
            self.timers["fire"] = int(self.rng.integers(8, 32))

    def _plan_turn(self, view: View, reach: NDArray[np.float64], ahead: float) -> None:
        if self._stuck(view) or (ahead < 130 and self.goal is None):
            self._head_for(view, np.where(np.abs(RAYS) < 20, 0, reach))
        elif self.goal is not None:
            off = (view.heading - self.goal + 180) % 360 - 180
            self.target_rate = float(np.clip(0.08 * off, -2, 2))
            if abs(off) < 4:
                self._turn_at(self.rng.normal(0, 0.2), int(self.rng.integers(8, 60)))
        elif self.timers["turn"] <= 0:
            if ahead > 250 and self.rng.random() < 0.6:
                self._turn_at(self._sign() * self.rng.uniform(0.5, 2), int(self.rng.integers(20, 80)))
            else:
                self._head_for(view, np.where(np.abs(RAYS) > 100, 0, reach))

    def _turn_at(self, rate: float, frames: int) -> None:
        self.goal, self.target_rate, self.timers["turn"] = None, rate, frames

    def _head_for(self, view: View, room: NDArray[np.float64]) -> None:
        """Choose a heading among the rays, the more likely the more room it has."""
        ray = self.rng.choice(RAYS, p=room**2 / (room**2).sum())
        self.goal = (view.heading - ray + self.rng.normal(0, 4)) % 360

    def _stuck(self, view: View) -> bool:
        """Has the player pushed against something for several frames?"""
        if self.last_xy is not None and any(key in self.keys for key in (W, A, S, D)):
            moved = math.hypot(view.x - self.last_xy[0], view.y - self.last_xy[1])
            self.blocked = self.blocked + 1 if moved < 2 else 0
        self.last_xy = (view.x, view.y)
        if self.blocked < 12:
            return False
        self.blocked = 0
        return True

    def _fight(self, view: View) -> None:
        """Now and then turn to the nearest monster in sight and shoot at it."""
        if not self.armed or len(view.monsters) == 0 or self.goal is not None:
            return
        offset = view.monsters - (view.x, view.y)
        distance = np.hypot(offset[:, 0], offset[:, 1])
        bearing = np.degrees(np.arctan2(offset[:, 1], offset[:, 0]))
        right = (view.heading - bearing + 180) % 360 - 180
        near = int(np.argmin(np.where(np.abs(right) < 38, distance, np.inf)))
        seen = abs(right[near]) < 38 and distance[near] < min(
            700, self.walls.distance(view.x, view.y, bearing[near : near + 1])[0]
        )
        if seen:
            self.target_rate = float(np.clip(0.12 * right[near], -2, 2))
            if abs(right[near]) < 4 and self.timers["fire"] <= 0 and self.rng.random() < 0.15:
                self.timers["fire"] = int(self.rng.integers(8, 28))

    def _sign(self) -> float:
        return 1.0 if self.rng.random() < 0.5 else -1.0


class Game:
    """A headless VizDoom game of one scenario: `reset`, `view`, `step`, as a context manager."""

    def __init__(self, scenario: str, seed: int, size: int, frame_skip: int):
        if scenario not in SCENARIOS:
            raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
        if size not in SIZES:
            raise ValueError(f"size {size}: frames are averaged from 256 x 256, choose one of {SIZES}")
        if frame_skip < 1:
            raise ValueError(f"frame_skip {frame_skip}: at least one tic a frame")
        self.size, self.frame_skip, self.episode = size, frame_skip, 0
        self.walls = _walls(scenario)
        self.settings = tempfile.TemporaryDirectory()
        self.game = _start(scenario, seed, self.settings.name)
        self.reset(first=True)

    def __enter__(self) -> Game:
        return self

    def __exit__(self, *_: object) -> None:
        self.game.close()
        self.settings.cleanup()

    def reset(self, first: bool = False) -> None:
        """Begin a new episode, unhurtable, with the weapon up."""
        if not first:
            self.episode += 1
            self.game.new_episode()
        self.game.send_game_command("god")
        self.game.make_action([0.0] * self.game.get_available_buttons_size(), SETTLE_TICS)
        self.state: Any = self.game.get_state()

    @property
    def finished(self) -> bool:
        """The episode is over (its time is up, or the player reached a goal or died)."""
        return self.game.is_episode_finished() or self.game.is_player_dead()

    def view(self) -> View:
        """The player's pose and the monsters on the map."""
        state = self.state
        x, y, angle, pitch = (float(value) for value in state.game_variables)
        monsters = [(o.position_x, o.position_y) for o in state.objects if o.name in MONSTERS]
        return View(x, y, angle, (pitch + 180) % 360 - 180, np.array(monsters, np.float64).reshape(-1, 2))

    def step(self, buttons: NDArray[np.uint8], dx: float, dy: float) -> None:
        """Hold an action for one recorded frame."""
        tic = 1 / self.frame_skip  # VizDoom applies the deltas at every tic; its look axis points up
        self.game.make_action([*buttons.tolist(), dx * tic, -dy * tic], self.frame_skip)
        self.state = self.game.get_state()

    def frame(self) -> NDArray[np.uint8]:
        """The current picture, [size,size,3] uint8."""
        crop, block = self.state.screen_buffer[:, 32:288], 256 // self.size
        rows = crop[::block].astype(np.uint16)
        for i in range(1, block):
            rows += crop[i::block]
        total = rows[:, ::block] + (block * block // 2)
        for j in range(1, block):
            total += rows[:, j::block]
        total //= block * block
        return total.astype(np.uint8)


def _start(scenario: str, seed: int, settings: str, sectors: bool = False) -> vizdoom.DoomGame:
    """A running game; the engine keeps its settings in the folder `settings`, a fresh one for repeatable games."""
    vzd = _import_vizdoom()
    game = vzd.DoomGame()
    game.load_config(str(Path(vzd.scenarios_path) / f"{scenario}.cfg"))
    game.set_doom_game_path(str(Path(vzd.__file__).parent / "freedoom2.wad"))
    game.set_doom_config_path(str(Path(settings) / "vizdoom.ini"))
    game.set_mode(vzd.Mode.PLAYER)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_resolution(vzd.ScreenResolution.RES_320X256)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_render_hud(False)
    game.set_render_crosshair(False)
    game.set_render_messages(False)
    game.set_render_screen_flashes(False)
    game.set_render_effects_sprites(False)  # blood and puffs: random and often right at the camera
    game.set_render_particles(False)
    game.set_objects_info_enabled(True)
    game.set_sectors_info_enabled(sectors)
    game.set_episode_timeout(EPISODE_TICS)
    game.set_episode_start_time(1)
    game.set_available_buttons([getattr(vzd.Button, name) for name in GAME_INPUTS])
    game.set_available_game_variables([getattr(vzd.GameVariable, name) for name in POSE])
    game.add_game_args("+sv_cheats 1 +sv_infiniteammo 1 +neverswitchonpickup 1")
    game.set_seed(seed)
    with contextlib.chdir(settings):  # the engine also makes a folder where it starts
        game.init()
    return game


_WALLS: dict[str, Walls] = {}


def _walls(scenario: str) -> Walls:
    """The scenario's blocking lines, read once from a game of its own: describing them every frame costs."""
    if scenario not in _WALLS:
        with tempfile.TemporaryDirectory() as settings:
            game = _start(scenario, 0, settings, sectors=True)
            lines = {
                (line.x1, line.y1, line.x2, line.y2)
                for sector in game.get_state().sectors
                for line in sector.lines
                if line.is_blocking
            }
            game.close()
        _WALLS[scenario] = Walls(np.array(sorted(lines), np.float64))
    return _WALLS[scenario]


Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]


def record_arrays(scenario: str, seed: int, frames: int, size: int = 128, frame_skip: int = 1) -> Arrays:
    """Play `frames` recorded frames of mixed play: motion, short stops, and standing (one frame in eight).

    Args:
        scenario: a key of `SCENARIOS`.
        seed: seeds both the game and the player; below 1 000 000 for training.
        frames: how many frames n to record.
        size: side of the square frames; divides 256.
        frame_skip: tics a frame.

    Returns:
        frames uint8 [n,size,size,3]; buttons uint8 [n,11]; mouse float32 [n,2] (degrees); segment int32 [n],
        which changes wherever frame i does not follow from frame i-1 (a new episode): never train across.
        Row i of buttons and mouse is what was held while frame i was produced.

    Raises:
        ValueError: an unknown scenario, size or frame_skip.
    """
    with Game(scenario, seed, size, frame_skip) as game:
        player = Player(np.random.default_rng(seed), game.walls, SCENARIOS[scenario].armed, pauses=True)
        return _play(game, player, frames)


def _play(game: Game, player: Player, frames: int) -> Arrays:
    """The next `frames` frames of a game; see `record_arrays`."""
    pictures = np.empty((frames, game.size, game.size, 3), np.uint8)
    buttons = np.zeros((frames, len(BUTTON_NAMES)), np.uint8)
    mouse = np.zeros((frames, 2), np.float32)
    segment = np.zeros(frames, np.int32)
    for i in range(frames):
        buttons[i], mouse[i, 0], mouse[i, 1] = player.act(game.view())
        game.step(buttons[i], *map(float, mouse[i]))
        if game.finished:  # there is no picture of this step: repeat it from the new start
            game.reset()
            player.last_xy = None
            game.step(buttons[i], *map(float, mouse[i]))
        pictures[i] = game.frame()
        segment[i] = game.episode
    return pictures, buttons, mouse, segment


def record_clip(scenario: str, seed: int, frames: int, tag: str, size: int = 128, frame_skip: int = 1) -> Clip:
    """One clip of a player that moves in all of it (`motion`) or stands in all of it (`stand_still`).

    Play goes on unrecorded for a while first. The clip is the first stretch in which no episode ends and, for
    `motion`, every frame is acted in and most pictures change; it is chosen by nothing else.

    Raises:
        ValueError: an unknown scenario, size or frame_skip, or a seed of the training range.
        RuntimeError: no such stretch in 20 attempts.
    """
    import torch  # here and below: recording arrays for training needs neither torch nor a video library

    from harness.data.clips import Clip

    if seed < HELD_OUT_SEEDS:
        raise ValueError(f"seed {seed}: clips are held out, and seeds below {HELD_OUT_SEEDS} are for training")
    with Game(scenario, seed, size, frame_skip) as game:
        for attempt in range(20):
            rng = np.random.default_rng([seed, attempt])
            player = Player(rng, game.walls, SCENARIOS[scenario].armed, pauses=False)
            game.reset()
            _play(game, player, int(rng.integers(120, 480)))
            if tag == "stand_still":
                while player.hemmed_in(game.view()):
                    _play(game, player, 1)
                player.stand()
                _play(game, player, 24)  # until the player has slid to a halt
            pictures, buttons, mouse, segment = _play(game, player, frames)
            if segment[0] == segment[-1] and (tag == "stand_still" or _moves(pictures, buttons, mouse)):
                return Clip(
                    id=f"{scenario}_{seed}_{tag}",
                    frames=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
                    buttons=torch.from_numpy(buttons),
                    mouse=torch.from_numpy(mouse),
                    fps=TICS_PER_SECOND / frame_skip,
                    tag=tag,
                    scenario=scenario,
                    seed=seed,
                )
    raise RuntimeError(f"{scenario}, seed {seed}: no {tag} clip of {frames} frames in 20 attempts; try fewer frames")


def _moves(pictures: NDArray[np.uint8], buttons: NDArray[np.uint8], mouse: NDArray[np.float32]) -> bool:
    acted = buttons[:, [W, A, S, D]].any(1) | (np.abs(mouse[:, 0]) > 0.25)
    change = np.abs(np.diff(pictures.astype(np.int16), axis=0)).mean((1, 2, 3))
    return bool(acted.all() and np.mean(change > 1) > 0.95)


def _schedule(jobs: int) -> list[str]:
    """A scenario for each job, in proportion to the shares, evenly interleaved."""
    owed = dict.fromkeys(SCENARIOS, 0.0)
    names = []
    for _ in range(jobs):
        for name, scenario in SCENARIOS.items():
            owed[name] += scenario.share
        name = max(owed, key=lambda key: owed[key])
        owed[name] -= 1
        names.append(name)
    return names


def _record_shard(job: tuple[Path, str, int, int, int, int]) -> dict[str, Any]:
    stem, scenario, seed, frames, size, frame_skip = job
    names = ("frames", "buttons", "mouse", "segment")
    arrays: tuple[NDArray[Any], ...] = record_arrays(scenario, seed, frames, size, frame_skip)
    for name, array in zip(names, arrays, strict=True):
        np.save(f"{stem}.{name}.npy", array)
    return {"stem": stem.name, "scenario": scenario, "seed": seed, "frames": frames}


def record_many(
    n_total: int,
    workers: int,
    seed: int,
    out_dir: str | Path,
    shard_frames: int = 4096,
    size: int = 128,
    frame_skip: int = 1,
) -> list[dict[str, Any]]:
    """Record at least `n_total` frames of all scenarios with `workers` processes, as .npy shards.

    Shard k is one game with seed `seed + k`: `shard_{k:05d}.{frames,buttons,mouse,segment}.npy`, as
    `record_arrays` gives them. `index.json` lists the shards (stem, scenario, seed, frames). Callers need the
    usual `if __name__ == "__main__":` guard, since workers are spawned.

    Raises:
        ValueError: the seeds would reach into those of held-out clips.
    """
    jobs = math.ceil(n_total / shard_frames)
    if seed + jobs > HELD_OUT_SEEDS:
        raise ValueError(f"seeds {seed} to {seed + jobs - 1}: those from {HELD_OUT_SEEDS} on are held out")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    work = [
        (out / f"shard_{k:05d}", name, seed + k, shard_frames, size, frame_skip)
        for k, name in enumerate(_schedule(jobs))
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        index = list(pool.imap(_record_shard, work))
    (out / "index.json").write_text(json.dumps(index, indent=1))
    return index


def record_clips(args: argparse.Namespace) -> None:
    """Record `args.clips` clips into `args.out`, each with its own seed, and say what each is like."""
    from harness.data.clips import read_clip, write_clip

    wrong = [f"--{name} {getattr(args, name)}: at least 1" for name in ("clips", "frames") if getattr(args, name) < 1]
    if wrong:
        raise ValueError("; ".join(wrong))
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(args.scenarios)
    for k in range(args.clips):
        tag = "stand_still" if k % 4 == 3 else "motion"
        clip = record_clip(names[k % len(names)], args.seed + k, args.frames, tag, args.size, args.frame_skip)
        video = write_clip(args.out, clip, args.crf)
        stored = read_clip(video).frames
        error = (stored.double() - clip.frames.double()).square().mean((1, 2, 3)).clamp_min(1e-3)
        size = video.stat().st_size / 1024
        psnr = float((10 * (255**2 / error).log10()).mean())
        print(f"{video}  {len(stored)} frames  {size:.0f} KB  stored at {psnr:.1f} dB PSNR", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record clips of VizDoom's bundled scenarios with a scripted player.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the clips to")
    parser.add_argument("--clips", type=int, default=12, help="how many; every fourth one stands still")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEEDS, help=f"of the first clip, from {HELD_OUT_SEEDS} on")
    parser.add_argument("--frames", type=int, default=100, help="frames a clip")
    parser.add_argument("--size", type=int, default=128, choices=SIZES, help="side of the square frames, in pixels")
    parser.add_argument("--frame-skip", type=int, default=1, help="game tics (1/35 s) a frame")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--crf", type=int, default=24, help="quality of the video (x264): lower is better and larger")
    try:
        record_clips(parser.parse_args())
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
