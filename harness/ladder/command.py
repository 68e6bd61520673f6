"""Climb from BF16 to the most aggressive MX configuration that ships, each step judged by its gate.

python scripts/ladder.py model=doom
python scripts/ladder.py --out outputs/ladder --kv mx_kv data.limit=4 data.future_frames=32

Steps: BF16; MXFP8 in the MLPs; MXFP8 in every Linear; a quantised KV cache on top; MXFP4 in the MLPs; MXFP4 in the
last 8 layers, then everywhere. A step that its gate rejects, or that noise leaves undecided, is narrowed (early layers
BF16, attention BF16, K back to BF16, fewer KV layers, scales per token) until it ships or nothing is left of it; then
the ladder stays where it stood.

On a CPU speed is left out by name, and what only speed or a viewer asks for is spared: BF16 is rolled out once and its
frames serve every run (measure.reuse_bf16), there are no parts of a frame and no videos, and each core rolls out clips
of its own (trainer.devices). Any of these words, if given, is left as it is.

Words of the form name=value go to every run, in any order; without data.limit every clip is taken. Each run is a
process of its own; its folder and the state of the ladder are under --out, where one ladder works at a time. A ladder
that was killed goes on where it stopped when it is started again with the same --out: a run is known by its config,
the commit and what it stands on. A run that broke is told of, never taken for a result, and tried again.

Exit code: 0 done (also if only BF16 ships), 1 a run broke, 2 wrong input, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.config import ConfigError
from harness.config.compose import compose
from harness.entries import command_parser
from harness.imports import import_lightning
from harness.ladder.state import LadderError, locked
from harness.signals import Signals, Stopped
from harness.streams import complain, patient

BROKE, WRONG_INPUT = 1, 2
FILE_WIDTH = 160
"""Columns of the table where there is no terminal."""


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/ladder"), help="folder of the ladder; same = resume")
    parser.add_argument("--kv", default="mx_kv_e4m3", help="KV config of step 4 (default mx_kv_e4m3)")
    parser.add_argument("overrides", nargs="*", help="words for every run, such as model=doom data.limit=4")
    return parser


@patient
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    args = arguments().parse_intermixed_args(argv)
    try:
        compose(*args.overrides)  # a misspelt word is told before torch is imported
    except ConfigError as error:
        complain(error)
        return WRONG_INPUT
    import_lightning()
    from harness.ladder.climb import BrokenOff, Ladder
    from harness.ladder.show import show
    from harness.measure.environment import git_state

    again = f"start it again with --out {args.out} to go on"
    try:
        with Signals(), locked(args.out):
            ladder = Ladder(args.out, args.overrides, args.kv)
            if git_state()["dirty"]:
                print("note: the working tree differs from its commit; a resumed ladder does not see such changes")
            best = ladder.climb()
    except (LadderError, OSError) as error:
        complain(error)
        return WRONG_INPUT
    except BrokenOff as error:
        complain(f"{error}; {again}")
        return BROKE
    except Stopped as stop:
        print(f"stopped by {stop.signal.name}; {again}", file=sys.stderr)
        return stop.exit_code
    show(ladder, best, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
    if ladder.failed:
        complain(f"{len(ladder.failed)} of the runs failed; {again}")
        return BROKE
    return 0


def cli() -> None:
    """The command as a process."""
    sys.exit(main())
