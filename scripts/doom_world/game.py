"""VizDoom without a window: a scenario, its walls, and one picture for each action that is held."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doom_world.player import View, Walls

if TYPE_CHECKING:
    import vizdoom

GAME_INPUTS = (
    *("MOVE_FORWARD", "MOVE_LEFT", "MOVE_BACKWARD", "MOVE_RIGHT", "SPEED", "JUMP", "RELOAD", "ZOOM", "USE"),
    *("ATTACK", "ALTATTACK", "TURN_LEFT_RIGHT_DELTA", "LOOK_UP_DOWN_DELTA"),
)
POSE = ("POSITION_X", "POSITION_Y", "ANGLE", "PITCH")
TICS_PER_SECOND = 35
SIZES = (32, 64, 128, 256)
EPISODE_TICS = 1400
SETTLE_TICS = 14  # the first tics of an episode ignore input while the weapon rises
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
