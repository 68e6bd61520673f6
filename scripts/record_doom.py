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
import sys
from pathlib import Path

if __name__ == "__main__":
    from harness.start import require

    require()

from doom_world.game import SCENARIOS, SIZES
from doom_world.recording import HELD_OUT_SEEDS, record_arrays, record_clip, record_many

__all__ = ["HELD_OUT_SEEDS", "SCENARIOS", "record_arrays", "record_clip", "record_many"]


def record_clips(args: argparse.Namespace) -> None:
    """Record `args.clips` clips into `args.out`, each with its own seed, and say what each is like."""
    from harness.data.clips import read_clip, write_clip
    from harness.files.writing import folder_problem

    wrong = [f"--{name} {getattr(args, name)}: at least 1" for name in ("clips", "frames") if getattr(args, name) < 1]
    if (problem := folder_problem(args.out)) is not None:
        wrong.append(f"--out {problem}")
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
