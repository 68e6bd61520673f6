"""Time the frame decoder: as a whole, by kernel, and how far its pictures are from float32's. Needs a Hopper GPU.

    python scripts/bench_decoder.py
    python scripts/bench_decoder.py --compiled  # as Inductor compiles it, too

Weights are random (seeded). Times are medians of CUDA graph replays, waited for one by one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.bench.inputs import build, compose_plan
from harness.config import register
from harness.entries import count
from harness.kernels.cuda import conv
from harness.measure.timing import samples_ms
from harness.models.dcae import DCAEDecoder
from harness.rollout import CompileConf, DecoderGroups, FrameDecoder
from harness.rollout.compile import CapturedGraph
from harness.rollout.fused_decoder import FusedDecoder
from harness.streams import patient

REPLAYS = 50


def graph_us(function: Callable[[], object], inner: int = 1) -> float:
    """Median µs of a call, ``inner`` of them in one CUDA graph."""

    def run() -> None:
        for _ in range(inner):
            function()

    graph = CapturedGraph(run, torch.device("cuda"))
    return statistics.median(samples_ms(graph.replay, torch.device("cuda"), REPLAYS, wait=True)) * 1e3 / inner


Timed = list[tuple[str, Callable[[], object]]]


def stages(decoder: DCAEDecoder, batch: int) -> Timed:
    """What each stage of a fused decoder runs, by name."""
    fused: Any = FusedDecoder(decoder)
    found: Timed = []
    rows = torch.randn(batch, decoder.cfg.latent_size, decoder.cfg.latent_size, decoder.cfg.ch_max, device="cuda")
    x = rows.bfloat16()
    small, last = None, len(fused.stages) - 1
    for number, stage in enumerate(fused.stages):
        run = partial(stage, x, small)
        if number == last and fused.resizes:
            run = partial(stage.products, x, small, fused.rgb)
        elif number < last and fused.projection(number) is not None:
            run = partial(stage.followed_by, x, small, fused.projection(number))
        found.append((f"stage {number}, {tuple(x.shape)}", run))
        if not stage.small:
            found += parts(stage, x)
        made = run()
        x, small = made if isinstance(made, tuple) else (made, None)
    if fused.resizes:
        found.append(("sums of the last convolution, resize", partial(conv.resize, x, fused.colours, fused.size)))
    else:
        found.append(("last convolution", partial(conv.conv_rgb, x, fused.rgb, fused.colours)))
    return found


def parts(stage: Any, x: Tensor) -> Timed:
    """The kernels of a stage with many channels."""
    small = stage.projected(x)
    doubled, base = conv.upsample(small, x)
    block = stage.blocks[0]
    hidden = F.linear(doubled, block.wide, block.bias)
    rows = hidden.flatten(0, 2)
    return [
        ("   upsample", partial(conv.upsample, small, x)),
        ("   conv1", partial(F.linear, doubled, block.wide, block.bias)),
        ("   grouped_conv", partial(conv.grouped_conv, hidden, block.filters)),
        ("   conv3", partial(torch.addmm, base.flatten(0, 2), rows, block.narrow.t())),
    ]


def compare(plan: Any, latent: Tensor, compile: bool) -> None:
    """Times and errors of whole decoders."""
    made = build(lambda: DCAEDecoder(plan.dcae), plan).to(torch.bfloat16)
    exact = copy.deepcopy(made).float()(latent.float())
    decoders = [
        ("eager", DecoderGroups.grouped, CompileConf()),
        ("fused", DecoderGroups.fused, CompileConf(enabled=True)),
    ]
    if compile:
        decoders += [("compiled", DecoderGroups.grouped, CompileConf(enabled=True))]
    for name, groups, conf in decoders:
        decode = FrameDecoder(copy.deepcopy(made), conf, groups)
        picture = decode(latent).float()
        error = ((picture - exact).norm() / exact.norm()).item()
        ms = statistics.median(samples_ms(partial(decode, latent), torch.device("cuda"), REPLAYS, wait=True))
        print(
            f"{name:9} {ms:6.3f} ms, error {error:.2e} of float32's norm, ready after {decode.prepare_s:.1f} s",
            flush=True,
        )
    for name, function in stages(made, latent.shape[0]):
        print(f"  {graph_us(function):7.1f} us  {name}", flush=True)


@patient
@torch.inference_mode(False)
@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="dit_v4", help="a config of conf/model")
    parser.add_argument("--batch", type=count, default=1, help="clips")
    parser.add_argument("--compiled", action="store_true", help="time the decoder as Inductor compiles it, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a Hopper GPU; torch sees no CUDA GPU here")
    register()
    plan = compose_plan([f"model={args.model}", "trainer=gpu", f"data.batch_size={args.batch}"], Path("outputs/bench"))
    cfg = plan.dcae
    generator = torch.Generator("cuda").manual_seed(0)
    size = (args.batch, cfg.latent_channels, cfg.latent_size, cfg.latent_size)
    compare(plan, torch.randn(size, device="cuda", generator=generator).bfloat16(), args.compiled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
