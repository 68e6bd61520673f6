"""What a gate asks: its thresholds, its rule, and what it leaves out by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

MIN_RESAMPLES = 2000
MAX_RESAMPLES = 1_000_000
FPS_FIGURES = ("pipeline_fps", "total_fps")
COUNTED_BYTES = ("weight_bytes", "kv_window_bytes", "kv_scratch_bytes", "kv_peak_bytes")
"""Bytes of buffers as stored: they are counted, and the same in every run."""
ALLOCATOR_BYTES = ("transient", "peak_allocated", "peak_reserved")
"""What the CUDA allocator saw at its peak: measured, once per batch."""
MEMORY_FIGURES = (*COUNTED_BYTES, *ALLOCATOR_BYTES)
THRESHOLDS = {
    "psnr": "max_psnr_drop",
    "ssim": "max_ssim_drop",
    "fidelity": "min_fidelity_psnr",
    "speed": "min_fps_ratio",
    "memory": "max_memory_ratio",
}
"""Criteria with a threshold: their name, and the field that holds it."""
CONDITIONS = ("clips", "instabilities")
CRITERIA = (*THRESHOLDS, *CONDITIONS)
FAMILIES = {"quality": ("psnr", "ssim", "fidelity", "instabilities")}
"""Names in ``without`` that stand for several criteria."""


class GateError(ValueError):
    """A gate that cannot be evaluated: its config is wrong, or the records do not compare."""


class Against(StrEnum):
    """What the candidate is held against: the BF16 arm of its own run, or the candidate of an earlier ``record``."""

    bf16 = "bf16"
    record = "record"


class Rule(StrEnum):
    """What decides a criterion: its whole ``interval`` on one side of the threshold, or its ``point`` alone."""

    interval = "interval"
    point = "point"


@dataclass
class GatesConf:
    """The thresholds of a gate; null = not asked for. Fits an OmegaConf structured config.

    Attributes:
        enabled: whether the run is judged at all.
        implied: no gate was named: the run is judged if it has a candidate, and its exit code does not tell the verdict
            unless a word of its command was about gates.
        title: what a person calls the gate.
        against: what drops and ratios are relative to.
        baseline: with ``against=record``, the ``record.json`` of what the candidate stands on.
        rule: ``interval``: a criterion passes or fails with its whole interval, and is undecided otherwise; ``point``:
            by its estimate alone, whatever the noise.
        without: criteria left out, by name: psnr, ssim, fidelity, speed, memory, clips, instabilities, or quality for
            the four that speak of pictures. The verdict says what was not asked.
        frames: judge the first so many generated frames of each clip; null = all. Choose it before looking.
        max_psnr_drop: dB of PSNR against the recording, mean over clips.
        max_ssim_drop: the same of SSIM.
        min_fidelity_psnr: dB of the candidate against BF16, mean over clips; for clips without a recording.
        min_fps_ratio: candidate / baseline. Against a record both are first divided by the BF16 arm of their own run,
            so that a machine that was slower that day does not count.
        fps: which FPS: ``pipeline_fps`` (DiT) or ``total_fps`` (with decode).
        max_memory_ratio: candidate / baseline of the sum of ``memory``.
        memory: figures of the record's memory section; by default what the KV cache needs at its worst: its buffers as
            allocated and the room to dequantise a layer, so that a cache which keeps BF16 copies gains nothing.
        min_clips: fewer clips leave the verdict open.
        no_instabilities: NaN, Inf, black or frozen frames or lost structure in the candidate fail the gate.
        confidence: of each end of an interval: the chance that the truth does not lie beyond it, at least 0.5.
        resamples: of the bootstrap. seed: of the bootstrap.
    """

    enabled: bool = False
    implied: bool = False
    title: str = ""
    against: Against = Against.bf16
    baseline: str | None = None
    rule: Rule = Rule.interval
    without: list[str] = field(default_factory=list)
    frames: int | None = None
    max_psnr_drop: float | None = None
    max_ssim_drop: float | None = None
    min_fidelity_psnr: float | None = None
    min_fps_ratio: float | None = None
    fps: str = "pipeline_fps"
    max_memory_ratio: float | None = None
    memory: list[str] = field(default_factory=lambda: ["kv_peak_bytes"])
    min_clips: int = 2
    no_instabilities: bool = True
    confidence: float = 0.95
    resamples: int = MIN_RESAMPLES
    seed: int = 0

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> GatesConf:
        """The gate of a record's ``config["gates"]``. Raises ``GateError`` on a field or value it does not know."""
        known = [item.name for item in fields(cls)]
        unknown = [name for name in section if name not in known]
        if unknown:
            raise GateError(f"gates: unknown {', '.join(map(str, unknown))}; allowed are {', '.join(sorted(known))}")
        try:
            kinds = {
                "against": Against(section.get("against", Against.bf16)),
                "rule": Rule(section.get("rule", Rule.interval)),
            }
        except ValueError as error:
            raise GateError(f"gates: {error}") from error
        return cls(**{**section, **kinds})

    @property
    def left_out(self) -> tuple[str, ...]:
        """Criteria that ``without`` names, families opened."""
        names = [one for name in self.without for one in FAMILIES.get(name, (name,))]
        return tuple(name for name in CRITERIA if name in names)

    def asks(self, criterion: str) -> bool:
        """Whether ``criterion`` has a threshold and is not left out."""
        if criterion in self.left_out:
            return False
        if criterion in THRESHOLDS:
            return getattr(self, THRESHOLDS[criterion]) is not None
        return self.no_instabilities if criterion == "instabilities" else True

    @property
    def not_asked(self) -> tuple[str, ...]:
        """Criteria with a threshold that this gate does not put, left out or never set."""
        return tuple(name for name in (*THRESHOLDS, "instabilities") if not self.asks(name))


def validate(conf: GatesConf) -> None:
    """Raise ``GateError`` naming every field of ``conf`` that is out of range or contradicts another."""
    problems = [*_against_problems(conf), *_without_problems(conf), *_number_problems(conf)]
    if conf.fps not in FPS_FIGURES:
        problems.append(f"fps={conf.fps}: allowed are {', '.join(FPS_FIGURES)}")
    unknown = [name for name in conf.memory if name not in MEMORY_FIGURES]
    if unknown or not conf.memory:
        problems.append(f"memory={list(conf.memory)}: allowed are {', '.join(MEMORY_FIGURES)}")
    if problems:
        raise GateError("gates config: " + "; ".join(problems))


def _against_problems(conf: GatesConf) -> list[str]:
    if conf.against == Against.record and conf.baseline is None:
        return [
            "against=record: give gates.baseline=<folder>/record.json, the run of what this configuration stands on "
            "(or gates.against=bf16)"
        ]
    if conf.against == Against.bf16 and conf.baseline is not None:
        return [f"baseline={conf.baseline} with against=bf16; use gates.against=record, or drop the baseline"]
    return []


def _without_problems(conf: GatesConf) -> list[str]:
    allowed = (*CRITERIA, *FAMILIES)
    problems = []
    for name in conf.without:
        if name not in allowed:
            close = get_close_matches(str(name), allowed, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"without={name}: allowed are {', '.join(allowed)}{meant}")
    if conf.enabled and not problems and not any(map(conf.asks, THRESHOLDS)):
        left = " that is not left out by gates.without" if conf.without else ""
        problems.append(
            f"an enabled gate needs a threshold{left}: set one of {', '.join(THRESHOLDS.values())}, "
            "choose a gate (gates=a, say), or gates=none"
        )
    return problems


def _number_problems(conf: GatesConf) -> list[str]:
    problems = []
    numbers = (*THRESHOLDS.values(), "confidence", "min_clips", "resamples", "seed", "frames")
    for name in numbers:
        value = getattr(conf, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(f"{name}={value}: must be a finite number")
        elif (wrong := _range_problem(name, value)) is not None:
            problems.append(f"{name}={value}: {wrong}")
    return problems


def _range_problem(name: str, value: float) -> str | None:
    if name in ("min_fps_ratio", "max_memory_ratio") and not value > 0:
        return "must be above 0"
    if name in ("min_clips", "frames") and value < 1:
        return "must be at least 1"
    if name == "confidence" and not 0.5 <= value < 1:
        return "must be at least 0.5 and below 1"
    if name == "resamples" and not MIN_RESAMPLES <= value <= MAX_RESAMPLES:
        return f"must be at least {MIN_RESAMPLES}, and at most {MAX_RESAMPLES}"
    if name == "seed" and value < 0:
        return "must be at least 0"
    return None
