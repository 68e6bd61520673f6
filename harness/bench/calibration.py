"""What formats cost a model, rounded to nearest and calibrated: the table of docs/calibration.md.

python scripts/bench_calibration.py                                   # on a CPU, hours: choose rows, clips and frames
python scripts/bench_calibration.py --clips 4 --frames 8 --match 'mxfp4_all$' --calibrated
python scripts/bench_calibration.py trainer=gpu                       # 12 clips × 48 frames of the demo, all rows
python scripts/bench_calibration.py trainer=gpu model=dit_v4 --only-calibrate quant=mxfp4_all  # seconds and peak memory

Words are a run's and hold for every row. BF16 and each candidate roll the same clips out; products are emulated, since
what is asked is what the formats do to pictures. *Drop* is PSNR against the recording that a candidate loses to BF16,
*fidelity* its PSNR against BF16, in dB with bounds of 95 % each on the mean over clips. Rollouts are chaotic and
amplify what they differ in; *velocities* is what they start from: signal over error of the model's velocities at a
frame's first and last step when every frame before was BF16's, in dB.
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch
from torch import Tensor

from harness.ab.arm import Arm
from harness.bench.inputs import compose_plan
from harness.calib.clips import check_disjoint, open_clips
from harness.calib.plan import make_encoder, plan_weights
from harness.calib.sequences import Clips, Recorded, record_rollout, velocities
from harness.calib.source import CalibratedWeights
from harness.config import RunPlan
from harness.config.problems import ConfigError
from harness.data.datamodule import ClipBatch, ClipDataModule
from harness.data.noise import batch_noise
from harness.entries import command_parser, count, output_folder, pattern
from harness.kv import KVConf
from harness.measure.quality import frame_psnr
from harness.models.dcae import to_frames
from harness.models.gamerft import GameRFTCore
from harness.mx.conf import MXConf
from harness.mx.linears.decoded import KeepDecoded, keep_decoded
from harness.report.gates.intervals import mean_interval
from harness.report.table import bytes_text
from harness.rollout import LatentDecoder, load_core, load_dcae
from harness.streams import complain

CONFIDENCE, RESAMPLES = 0.95, 2000


@dataclass(frozen=True)
class Row:
    """Formats by their words; ``linears``: whether there are MX weights to calibrate. ``goal``: drop, fidelity."""

    name: str
    words: tuple[str, ...]
    linears: bool = True
    goal: str = ""


def _kv(name: str, goal: str = "") -> Row:
    return Row(f"kv={name}", (f"kv={name}",), linears=False, goal=goal)


ROWS = (
    Row("mxfp8_all", ("quant=mxfp8_all",), goal="≤ 0.01, ≥ 53"),
    Row("mxfp4_mlp", ("quant=mxfp4_mlp",), goal="≤ 0.03, ≥ 46"),
    Row("4-bit attention", ("quant=mxfp4_all", "quant.scope=attn"), goal="≤ 0.10, ≥ 44"),
    Row("4-bit modulation", ("quant=mxfp4_all", "quant.scope=modulation"), goal="≤ 0.01, ≥ 55"),
    Row("mxfp4_all", ("quant=mxfp4_all",), goal="≤ 0.10, ≥ 42.5"),
    Row("W8A8", ("quant=mxfp8_all", "quant.activation=mx"), goal="≤ 0.05, ≥ 47"),
    Row("W4A8", ("quant=mxfp4_all", "quant.activation=mxfp8"), goal="≤ 0.15, ≥ 41"),
    Row("W4A4", ("quant=mxfp4_all", "quant.activation=mx"), goal="≤ 1.0, ≥ 33"),
    _kv("mx_kv"),
    _kv("mx_kv_e4m3"),
    _kv("mxfp4_kv", "fidelity ≥ 48"),
    _kv("mxfp4_kv_hadamard", "fidelity ≥ 48"),
    _kv("mxfp4_kv_recent", "fidelity ≥ 48"),
    Row("mxfp4_all kv=mx_kv_e4m3", ("quant=mxfp4_all", "kv=mx_kv_e4m3")),
    Row("mxfp4_all kv=mxfp4_kv", ("quant=mxfp4_all", "kv=mxfp4_kv")),
    Row("mxfp4_all kv=mxfp4_kv_recent", ("quant=mxfp4_all", "kv=mxfp4_kv_recent")),
)


@dataclass(frozen=True)
class Outcome:
    """A row's drop and fidelity by clip, dB; signal over error of velocities by step, dB; its calibration, if any."""

    drop: list[float]
    fidelity: list[float]
    steps: list[float]
    made: CalibratedWeights | None = field(repr=False)


class Bench:
    """BF16's side of every row: its model, clips, pictures and velocities."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan, conf = plan, plan.conf
        self.core = load_core(plan.arch, conf.model.checkpoint, conf.model.seed, plan.device, conf.model.weights)
        decoder = load_dcae(plan.dcae, conf.decoder.checkpoint, conf.decoder.seed, plan.device)
        self.decode = LatentDecoder(
            decoder, plan.vae_scale, conf.decoder.dtype_on(plan.device), conf.compile, conf.decoder.groups
        )
        data = ClipDataModule(conf.data, plan.clip_shape, make_encoder(plan))
        data.check()
        if conf.calib.enabled:
            check_disjoint(open_clips(conf.calib, plan.clip_shape, make_encoder(plan)), data)
        self.batch: ClipBatch = data.first_batch(plan.device)
        shape, frames = plan.clip_shape, conf.data.future_frames
        noise = batch_noise(conf.sampler.seed, self.batch.clip_ids, shape.window, frames, shape.channels, shape.side)
        self.noise = noise[0].to(plan.device), noise[1].to(plan.device)
        self.pictures = self._roll(Arm(copy.deepcopy(self.core), MXConf(), KVConf(), plan, self.decode).warm())
        self.recorded = self._record()
        self.velocities = velocities(self.core, conf.sampler, KVConf(), self.recorded)

    def _record(self) -> Recorded:
        batch = self.batch
        clips = Clips(batch.latents_context, batch.mouse, batch.btn, self.noise)
        return record_rollout(self.core, self.plan.conf.sampler, clips)

    def _roll(self, arm: Arm) -> list[Tensor]:
        """Frames of each clip, ``[F, 3, h, w]`` in [0, 1]."""
        return [to_frames(rgb) for rgb in arm.roll(self.batch, self.noise, lambda: None, patient=True).pictures.rgb()]

    def measure(self, plan: RunPlan) -> Outcome:
        """A candidate of ``plan``."""
        core, conf = copy.deepcopy(self.core), plan.conf
        source = plan_weights(plan, core)
        arm = Arm(core, conf.quant, conf.kv, plan, self.decode, source).warm()
        keep_decoded(core, KeepDecoded.always)
        steps = velocities(core, conf.sampler, conf.kv, self.recorded)[1:]
        pictures = self._roll(arm)
        fidelity = [mean(frame_psnr(ours, theirs)) for ours, theirs in zip(pictures, self.pictures, strict=True)]
        errors = [signal_over_error(ours, theirs) for ours, theirs in zip(steps, self.velocities[1:], strict=True)]
        return Outcome(self._drops(pictures), fidelity, [errors[0], errors[-1]], source)

    def _drops(self, pictures: list[Tensor]) -> list[float]:
        if self.batch.frames is None:
            return []
        recording = self.batch.frames.cpu()
        both = zip(self.pictures, pictures, recording, strict=True)
        return [mean(frame_psnr(bf16, real)) - mean(frame_psnr(ours, real)) for bf16, ours, real in both]


def signal_over_error(x: Tensor, reference: Tensor) -> float:
    """10 log10 of the power of ``reference`` over that of the difference, dB."""
    return float(10 * (reference.square().mean() / (x - reference).square().mean()).log10())


def bounded(values: Sequence[float], digits: int) -> str:
    """Mean and interval, such as ``0.14 (-0.07 … 0.37)``."""
    if not values:
        return "–"
    found = mean_interval(values, CONFIDENCE, RESAMPLES, 0)
    interval = "" if found is None else f" ({found[0]:.{digits}f} … {found[1]:.{digits}f})"
    return f"{mean(values):.{digits}f}{interval}"


def line(row: Row, calibrated: bool, out: Outcome) -> str:
    """A row of the table."""
    made = ""
    if out.made is not None:
        facts = out.made.facts
        made = f"{facts.seconds:.0f} s{' (kept)' if out.made.found else ''}, {bytes_text(facts.peak_bytes)}"
    name = f"{row.name}{', calibrated' if calibrated else ''}"
    steps = ", ".join(f"{step:.1f}" for step in out.steps)
    return f"| {name} | {bounded(out.drop, 2)} | {bounded(out.fidelity, 1)} | {steps} | {made} | {row.goal} |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser(__doc__)
    parser.add_argument("--clips", type=count, default=12, help="clips that are judged, all at once (default 12)")
    parser.add_argument("--frames", type=count, default=48, help="frames rolled out of each (default 48)")
    parser.add_argument("--match", type=pattern, default="", help="only rows whose name has this regular expression")
    parser.add_argument("--calibrated", action="store_true", help="leave out rounding to nearest")
    parser.add_argument("--only-calibrate", action="store_true", help="time one calibration of the words' candidate")
    parser.add_argument("--out", type=output_folder, default="outputs/bench", help="folder that words are composed for")
    parser.add_argument("words", nargs="*", help="words for every row, such as trainer=gpu")
    return parser.parse_intermixed_args(argv)


def table(args: argparse.Namespace) -> None:
    """Measure and print row after row. Raises ``ValueError`` for words that make no run."""
    sizes = (f"data.limit={args.clips}", f"data.batch_size={args.clips}", f"data.future_frames={args.frames}")
    common = ["model=doom", *args.words, *sizes, "gates=none"]
    rows = [row for row in ROWS if re.search(args.match, row.name)]
    plans: list[tuple[Row, bool, RunPlan]] = []
    for row in rows:
        kernel = ["quant.kernel=emulated"] if row.linears else []
        for calibrated in (True,) if args.calibrated and row.linears else (False, True)[: 1 + row.linears]:
            calib = f"calib={'gptq' if calibrated else 'none'}"  # by name: words that set its fields hold for every row
            plans.append((row, calibrated, compose_plan([*common, *row.words, *kernel, calib], args.out)))
    if not plans:
        raise ConfigError(f"--match {args.match}: no row has it; rows are {', '.join(row.name for row in ROWS)}")
    bench = Bench(plans[-1][2])
    print("| formats | drop dB | fidelity dB | velocities dB: first, last step | calibration | goal |")
    print("|---|---|---|---|---|---|", flush=True)
    for row, calibrated, plan in plans:
        print(line(row, calibrated, bench.measure(plan)), flush=True)
        gc.collect()


def only_calibrate(args: argparse.Namespace) -> None:
    """Calibrate once, and print what that took. Raises ``ValueError`` for words that make no run."""
    plan = compose_plan(["model=doom", *args.words, "calib=gptq", "gates=none"], args.out)
    conf, start = plan.conf, time.perf_counter()
    core = load_core(plan.arch, conf.model.checkpoint, conf.model.seed, plan.device, conf.model.weights)
    assert isinstance(core, GameRFTCore)
    weights = sum(parameter.nbytes for parameter in core.parameters())
    print(f"model: {bytes_text(weights)} of weights, loaded in {time.perf_counter() - start:.1f} s", flush=True)
    made = plan_weights(plan, core)
    assert made is not None
    facts = made.facts
    print(
        f"{facts.linears} Linears from {len(facts.clips)} clips, {facts.frames} frames each, on {facts.device}: "
        f"{facts.seconds:.1f} s{' (kept from an earlier run)' if made.found else ''}, "
        f"peak {bytes_text(facts.peak_bytes)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parse(argv)
    torch.set_grad_enabled(False)
    try:
        (only_calibrate if args.only_calibrate else table)(args)
    except (ValueError, OSError) as error:
        complain(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
