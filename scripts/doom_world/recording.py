"""Play as arrays, for training, and as held-out clips. A scenario, seed and VizDoom version give the same frames."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doom_world.game import SCENARIOS, TICS_PER_SECOND, Game
from doom_world.player import A, D, Player, S, W
from harness.data.conf import BUTTON_NAMES

if TYPE_CHECKING:
    from harness.data.clips import Clip

HELD_OUT_SEEDS = 1_000_000
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
