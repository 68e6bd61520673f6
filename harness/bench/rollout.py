"""Measure rollouts side by side: formats, attention and batch sizes on one machine in one process.

    python scripts/bench_rollout.py                                  # dit_v4, everything
    python scripts/bench_rollout.py --models dit_v4_5b --match 'B1/.*/fused'
    python scripts/bench_rollout.py --models smoke --device cpu --compile off --frames 4

Weights are random (seeded): speed is real, quality is not. Arms of one model and batch size arm ready together and
take turns frame by frame, so that ratios see the same machine. A time is a CUDA event's, around work that is waited
for after every frame; figures are medians over all frames. Every row's result is in OUT/bench.json as soon as it is
known, OUT/bench.md holds the table.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from harness.bench import arguments
from harness.bench.floors import decoder_floor_ms
from harness.bench.inputs import build, random_inputs
from harness.bench.ready import ReadyArm, time_limit
from harness.bench.rows import COLUMNS, NAMED, Result, Row, all_rows, line, plan_of
from harness.config import RunPlan, register
from harness.measure.environment import environment
from harness.models.dcae import DCAEDecoder
from harness.models.gamerft import GameRFTCore
from harness.rollout import LatentDecoder
from harness.streams import patient


class Bench:
    """Measures groups of rows and writes down what is known after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: list[Result] = []
        self._core: tuple[str, GameRFTCore] | None = None

    def run(self, rows: list[Row]) -> None:
        """Measure ``rows``, those of one model and batch together."""
        started = time.monotonic()
        for (model, batch), group in itertools.groupby(rows, key=lambda row: (row.model, row.batch)):
            if time.monotonic() - started > self.args.total:
                self.results += [Result(row.name, failed="no time left (--total)") for row in group]
            else:
                print(f"== {model}, {batch} clips", flush=True)
                self._group(list(group))
            self.write()

    def _group(self, rows: list[Row]) -> None:
        decoder: Callable[[Tensor], Tensor] | None = None
        arms = []
        for row in rows:
            try:
                with time_limit(self.args.limit):
                    plan = plan_of(row, self.args)
                    core = self._shared_core(row, plan)
                    decoder = decoder or self._decoder(plan)
                    arms.append(ReadyArm(row, plan, core, decoder))
                print(f"{row.name}: ready after {arms[-1].result.setup_s:.1f} s", flush=True)
            except Exception as error:  # whatever stops one row is that row's result; the others still count
                self._fail(Result(row.name), error)
        ready = self._play(arms)
        baseline = min(
            (arm.result.dit["median"] for arm in ready if "/bf16+bf16/" in arm.result.row and arm.result.dit),
            default=None,
        )
        decoder_floor = decoder_floor_ms(ready[0].plan, self.args.bandwidth) if ready else None
        for arm in ready:
            arm.result.decoder_floor_ms = decoder_floor
            if baseline is not None and arm.result.dit is not None:
                arm.result.of_bf16 = arm.result.dit["median"] / baseline
            self.results.append(arm.result)
            print(line(arm.result), flush=True)
        arms.clear()
        ready.clear()
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()

    def _play(self, arms: list[ReadyArm]) -> list[ReadyArm]:
        """Let the arms take turns of a few frames until each has its number; those that fail drop out."""
        turn = max(1, self.args.frames // 20)
        playing = list(arms)
        for first in range(0, self.args.frames, turn):
            frames = min(turn, self.args.frames - first)
            for arm in list(playing):
                self._attempt(arm, playing, partial(arm.play, frames))
        for arm in list(playing):
            self._attempt(arm, playing, partial(arm.finish, self.args.bandwidth, self.args.frames))
        return playing

    def _attempt(self, arm: ReadyArm, playing: list[ReadyArm], action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # as above
            playing.remove(arm)
            self._fail(arm.result, error)

    def _fail(self, result: Result, error: Exception) -> None:
        first = str(error).strip().splitlines()
        result.failed = f"{type(error).__name__}: {first[0][:300] if first else ''}"
        self.results.append(result)
        print(f"{result.row}: FAILED {result.failed}", flush=True)

    def _shared_core(self, row: Row, plan: RunPlan) -> GameRFTCore:
        """The model's weights, made once; arms that change them take a copy."""
        if self._core is None or self._core[0] != row.model:
            self._core = None
            self._core = (row.model, build(lambda: GameRFTCore(plan.arch), plan))
        return self._core[1]

    def _decoder(self, plan: RunPlan) -> Callable[[Tensor], Tensor]:
        start = time.perf_counter()
        conf = plan.conf.decoder
        module = build(lambda: DCAEDecoder(plan.dcae), plan)
        decode = LatentDecoder(module, plan.vae_scale, conf.dtype_on(plan.device), plan.conf.compile, conf.groups)
        (_, _, _, noise), _ = random_inputs(plan, plan.setup.batch)
        decode.warmup(noise[:, 0])
        print(f"decoder: ready after {time.perf_counter() - start:.1f} s, groups {decode.groups}", flush=True)
        return decode

    def write(self) -> None:
        """Write ``bench.json`` and ``bench.md``."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        arguments = {name: str(value) for name, value in vars(self.args).items()}
        record = {
            "environment": environment(torch.device(self.args.device)),
            "arguments": arguments,
            "rows": [asdict(result) for result in self.results],
        }
        (self.args.out / "bench.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
        table = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(line(r) for r in self.results)]
        (self.args.out / "bench.md").write_text("\n".join(f"| {text} |" for text in table) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments; ends with exit code 2 where an override sets what names a row."""
    parser = arguments.rollout()
    args = parser.parse_args(argv)
    if args.frames < 1:
        parser.error("--frames: at least 1")
    for override in args.overrides:
        if override.split("=")[0].lstrip("+~") in NAMED:
            parser.error(
                f"{override}: rows are named by this and set it; choose rows with --models, --batches, --match"
            )
    return args


@patient
def main(argv: list[str] | None = None) -> int:
    """Measure; 0 if every row gave a result."""
    args = parse(argv)
    register()
    rows = all_rows(args)
    if not rows:
        print(f"no row matches --match {args.match!r}", file=sys.stderr)
        return 2
    bench = Bench(args)
    bench.run(rows)
    print((args.out / "bench.md").read_text())
    return int(any(result.failed is not None for result in bench.results))


if __name__ == "__main__":
    sys.exit(main())
