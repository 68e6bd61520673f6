"""One arm of a run: all that was measured of it besides its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from harness.report.sections.formats import Calibration, NumericPath, Transform
from harness.report.sections.memory import Memory
from harness.report.sections.numerics import KVStored, Numerics
from harness.report.sections.speed import Compilation, Parts, Speed


@dataclass
class ArmRecord:
    """One arm (``bf16`` or ``candidate``).

    ``label``: what a person calls it, such as ``mxfp8_all + mx_v_only``. ``speed_is_meaningful``: false where a kernel
    is emulated: its times say nothing about the format. ``transform``: ``None`` where no Linear was meant to be MX.
    ``parts``, ``kv_stats``, ``numerics``: ``None`` if not asked for. ``calibration``: ``None`` where weights were
    rounded to nearest. ``weights_sha256``: of all weights in their formats, by which an export is known to be what was
    judged; ``None`` without MX Linears.
    """

    label: str
    numeric_path: NumericPath
    speed_is_meaningful: bool
    transform: Transform | None
    speed: Speed
    parts: Parts | None
    memory: Memory
    compile: Compilation
    kv_stats: KVStored | None = None
    numerics: Numerics | None = None
    calibration: Calibration | None = None
    weights_sha256: str | None = None
