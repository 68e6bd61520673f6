"""What loading an exported checkpoint takes: its size, and the most memory while it is read, in a process of its own.

python scripts/bench_export.py model=doom quant=mxfp4_all
python scripts/bench_export.py model=dit_v4 quant=mxfp4_all     # random weights; on a CPU, a minute

Words are a run's. The candidate is rounded to its formats, written, and loaded again in a new process on the CPU.
Printed are the file's bytes, the bytes of the same weights in BF16, and by how much loading raised that process's
resident peak, pages of the mapped file included. Needs Linux.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from harness.ab.arms import load_arms
from harness.bench.child import child
from harness.config import ConfigError, plan_run
from harness.config.compose import compose
from harness.entries import spelt
from harness.export.layout import ExportHeader
from harness.export.read import Export
from harness.export.write import write_export
from harness.measure.memory import module_bytes
from harness.models.checkpoint import random_gamerft
from harness.models.gamerft import GameRFTCore
from harness.mx.transform import apply_mx
from harness.streams import complain, patient


def write(words: Sequence[str], path: Path) -> int:
    """Write the candidate of ``words`` to ``path``; returns the bytes of its BF16 weights."""
    plan = plan_run(compose(*words))
    core, source = load_arms(plan, ["candidate"])["candidate"]
    plain = module_bytes(core)
    summary = apply_mx(core, plan.conf.quant, source)
    sections = {name: vars(getattr(plan.conf, name)) for name in ("kv", "sampler")}
    quant = {**vars(plan.conf.quant), "bits_by_category": vars(plan.conf.quant.bits_by_category), "kernel": "auto"}
    kv = {**sections["kv"], "ema": vars(plan.conf.kv.ema)}
    kv = {key: getattr(value, "name", value) for key, value in kv.items()}
    header = ExportHeader(
        model=vars(plan.arch),
        vae_scale=plan.vae_scale,
        quant={key: str(value) if hasattr(value, "name") else value for key, value in quant.items()},
        kv=kv,
        sampler=sections["sampler"],
        label=summary.numeric_path,
        calibration={},
        verdict={"verdict": "none"},
        quantization_config={},
    )
    write_export(core, header, path)
    return plain


def peak_of_loading(path: Path) -> tuple[int, float]:
    """Bytes by which loading raised this process's resident peak, and its seconds."""
    export, cpu = Export(path), torch.device("cpu")
    small = replace(export.arch, n_layers=1, d_model=64, n_heads=1)  # what is imported late is no part of a model
    apply_mx(random_gamerft(small, 0).to(torch.bfloat16), replace(export.quant, exclude=[], include=[]))
    GameRFTCore.skeleton(small, cpu)
    before, start = _peak(), time.perf_counter()
    apply_mx(export.skeleton(cpu), export.quant, export.source(cpu))
    return _peak() - before, time.perf_counter() - start


def _peak() -> int:
    # Not getrusage, whose peak a process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@patient
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--load"]:
        print(*peak_of_loading(Path(words[1])))
        return 0
    if not words or {"-h", "--help"} & set(words):
        print(spelt(__doc__))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        try:
            plain = write(words, path)
        except (ConfigError, ValueError) as error:
            complain(error)
            return 2
        done = subprocess.run(**child("export", "--load", str(path)), capture_output=True, text=True, check=True)
        peak, seconds = (float(number) for number in done.stdout.split()[-2:])
        size = path.stat().st_size
    print(f"BF16 weights {plain / 2**20:.1f} MiB, file {size / 2**20:.1f} MiB, ", end="")
    print(f"loading raised the resident peak by {peak / 2**20:.1f} MiB, in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
