"""What the measuring commands of ``mx-world`` take.

Without torch, so that ``--help`` and a misspelt option are answered at once. Each parser explains itself with the
docstring of the module that does the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.entries import command_parser, count, counts, module_doc, output, output_folder, pattern
from harness.mx.conf import KernelChoice

LINEAR_FORMATS = ("W8A16", "W8A8", "W4A16", "W4A8", "W4A4")
"""Bits of weights and activations of an MX Linear, as the microbenchmark names them."""
TUNED_BITS = (8, 4, 16)
"""Of the weights whose launch shapes are searched; 16: BF16 in our kernel's form."""


def rollout() -> argparse.ArgumentParser:
    """Of ``mx-world bench``."""
    parser = command_parser(module_doc("harness.bench.rollout"))
    parser.add_argument("--models", default="dit_v4", help="comma-separated configs of conf/model")
    parser.add_argument("--batches", type=counts, default="1,4,16", help="comma-separated numbers of clips")
    parser.add_argument("--attention", default="sdpa,flex,fused", help="comma-separated configs of conf/attention")
    # Not --only: Inductor takes the value of an option of that name into the names of its kernels.
    parser.add_argument("--match", type=pattern, default="", help="regular expression; rows it finds are measured")
    parser.add_argument("--compile", default="on", help="config of conf/compile")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--frames", type=count, default=200, help="timed frames of each row")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that setting up one row may take")
    parser.add_argument("--total", type=float, default=1e9, help="seconds after which no further group begins")
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s that the floor assumes")
    parser.add_argument("--out", type=output_folder, default="outputs/bench")
    parser.add_argument("overrides", nargs="*", help="further overrides of every row's config")
    return parser


def micro() -> argparse.ArgumentParser:
    """Of ``mx-world microbench``."""
    parser = command_parser(module_doc("harness.bench.micro"))
    parser.add_argument("--model", default="dit_v4", help="a model config by name, or a YAML file")
    parser.add_argument("--batch", type=count, nargs="+", default=[1], help="clips")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is a GPU)")
    parts = ("linear", "attention", "kv")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--products", nargs="+", help="only Linears whose name contains one of these")
    parser.add_argument("--formats", nargs="+", choices=LINEAR_FORMATS, default=list(LINEAR_FORMATS))
    named = [str(kernel) for kernel in KernelChoice if kernel != KernelChoice.auto]
    parser.add_argument("--kernels", nargs="+", choices=named, help="only these (default: all but emulated ones)")
    tune = "search launch shapes of kernel=triton and cuda; prints entries for tuned/"
    parser.add_argument("--tune", action="store_true", help=tune)
    parser.add_argument("--iterations", type=count, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150.0, help="start nothing new after this long")
    parser.add_argument("--json", type=output, help="where to write every figure")
    return parser


def profile() -> argparse.ArgumentParser:
    """Of ``mx-world profile``."""
    parser = command_parser(module_doc("harness.bench.profile"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--frames", type=count, default=10)
    parser.add_argument("--top", type=count, default=15)
    parser.add_argument("--out", type=output, default="outputs/profile/frame.json")
    parser.add_argument("--before", type=Path, help="an earlier JSON to compare with")
    parser.add_argument("overrides", nargs="*", help="as for harness/run.py")
    return parser


def tune_layer() -> argparse.ArgumentParser:
    """Of ``mx-world tune``."""
    parser = command_parser(module_doc("harness.bench.tune_layer"))
    parser.add_argument("--model", default="dit_v4", help="a model config by name, or a YAML file")
    parser.add_argument("--bits", type=int, nargs="+", default=list(TUNED_BITS), choices=TUNED_BITS)
    parser.add_argument("--layers", type=count, default=8, help="layers of the graph: more than L2 holds")
    parser.add_argument("--batch", type=count, default=1, help="clips")
    parser.add_argument("--most", type=count, default=180, help="launch shapes of each Linear that are tried")
    parser.add_argument("--seconds", type=float, default=100.0, help="of each number of bits; then only what is begun")
    parser.add_argument("--kv", default="bf16", choices=("bf16", "mx"), help="what the rings hold")
    parser.add_argument("--json", type=output, help="where to write every figure")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="search nothing; time layers whose attention is one launch with its projection, and two",
    )
    return parser


def parity() -> argparse.ArgumentParser:
    """Of ``mx-world parity``."""
    parser = command_parser(module_doc("harness.bench.parity"))
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="config.yaml, weights and io")
    return parser


def world_model() -> argparse.ArgumentParser:
    """Of ``mx-world world-model``."""
    parser = command_parser(module_doc("harness.bench.world_model"))
    parser.add_argument("words", nargs="*", help="as for harness/run.py, and future_frames=N")
    return parser
