"""The scripted player: what it sees, where it goes, when it stops and shoots. Knows nothing of the game's engine."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from harness.data.conf import BUTTON_NAMES

W, A, S, D, LSHIFT, SPACE, E, LMB = 0, 1, 2, 3, 4, 5, 8, 9
"""Places of the buttons in an action, see ``scripts/record_doom.py``."""
RAYS = np.array([0, 10, -10, *range(30, 180, 25), *range(-30, -180, -25), 180], np.float64)
"""Degrees to the right of the view's centre in which the player looks for room."""


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
