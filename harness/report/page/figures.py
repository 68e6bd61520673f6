"""Reads figures out of a record and words them: what all pages, a run's, a sweep's and two runs', have in common."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report.gates import terms
from harness.report.gates.advice import changed, command
from harness.report.record import COMPLETE, RunRecord
from harness.report.sections import ArmRecord, MeanScores, QualitySection
from harness.report.table import bytes_text

ABSENT = "–"
ARMS = (("bf16", "bf16"), ("candidate", "cand"))
"""Arms and their CSS class."""
EMULATED = "emulated kernel: its speed says nothing about MX"


def last_arm(record: RunRecord) -> str:
    """The arm that a run is about: its candidate, or the baseline that ran alone."""
    return "candidate" if "candidate" in record.arms else "bf16"


def over_all(record: RunRecord) -> QualitySection:
    """Quality over all clips; without a figure where nothing was scored."""
    return record.quality.all if record.quality else QualitySection(0)


def drop_of(record: RunRecord) -> float | None:
    """PSNR that the candidate loses against BF16 over all clips, dB."""
    drop = over_all(record).drop
    return drop.psnr if drop else None


def fidelity_of(record: RunRecord) -> float | None:
    """PSNR of the candidate against BF16 over all clips, dB."""
    fidelity = over_all(record).fidelity
    return fidelity.psnr if fidelity else None


def means_of(section: QualitySection, name: str) -> MeanScores | None:
    """Of ``bf16``, ``candidate`` or ``fidelity``."""
    return {"bf16": section.bf16, "candidate": section.candidate, "fidelity": section.fidelity}[name]


def tags_of(record: RunRecord) -> Mapping[str, QualitySection]:
    """Quality over the clips of each tag; empty where nothing was scored."""
    return record.quality.by_tag if record.quality else {}


def curve_of(section: QualitySection, name: str, metric: str) -> list[float]:
    """``metric`` of ``name``, frame by frame; empty where it was not scored. Names as for :func:`means_of`."""
    means = means_of(section, name)
    curve = means.curve if means else None
    return [] if curve is None else {"psnr": curve.psnr, "ssim": curve.ssim}[metric]


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure with its digits, or a dash."""
    if value is None:
        return ABSENT
    value = round(value, digits) + 0.0  # no "-0.00"
    return f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """A figure of any size with four significant digits, or a dash."""
    return ABSENT if value is None else f"{value:.4g}"


def size(value: float | None) -> str:
    """A number of bytes in words, or a dash."""
    return ABSENT if value is None else bytes_text(value)


def ratio(candidate: float | None, bf16: float | None) -> float | None:
    """Candidate / BF16, where both were measured."""
    return candidate / bf16 if candidate is not None and bf16 else None


def times(value: float | None) -> str:
    """A ratio as ``0.76×``."""
    return ABSENT if value is None else f"{value:.2f}×"


def speed_ratio(record: RunRecord) -> float | None:
    """FPS of the candidate's DiT / BF16's, also where the kernel is emulated; ``None`` where one arm ran alone."""
    if len(record.arms) < len(ARMS):
        return None
    return ratio(record.arms["candidate"].speed.pipeline_fps, record.arms["bf16"].speed.pipeline_fps)


def held_bytes(arm: ArmRecord | None) -> int | None:
    """Bytes an arm needs while it runs: weights, KV window, and the room the window is dequantised into.

    ``None`` without an arm.
    """
    if arm is None:
        return None
    held = arm.memory
    peak = held.kv_window_bytes + held.kv_scratch_bytes if held.kv_peak_bytes is None else held.kv_peak_bytes
    return held.weight_bytes + peak


def emulated(record: RunRecord) -> bool:
    """Whether the candidate's speed says nothing about its format."""
    return record.candidate is not None and not record.candidate.speed_is_meaningful


VERDICTS = {
    "ship": ("pass", "May ship"),
    "do not ship": ("fail", "Do not ship"),
    "undecided": ("open", "Undecided"),
}


UNASKED = "No gate was asked for"


def verdict(record: RunRecord, folder: str | Path = "outputs/run") -> dict[str, Any]:
    """The verdict as ``kind`` (pass, fail, open, none), ``title``, ``gate``, ``sentence``, ``next`` and ``notes``.

    ``sentence`` is what the verdict rests on (may be empty), ``next`` has ``text`` and ``command``.
    """
    gates = record.gates
    if gates:
        kind, title = VERDICTS.get(gates.verdict, ("open", gates.verdict.capitalize()))
        reason = gates.reason
        return {
            "kind": kind,
            "title": title,
            "gate": ", ".join(terms(gates)),
            "sentence": f"{reason[:1].upper()}{reason[1:]}." if reason else "",
            "next": gates.next,
            "notes": list(gates.notes),
        }
    kind, title, gate, sentence, text, new = _unjudged(record)
    again = command(changed(record.overrides, *new))
    if title == UNASKED:
        again = command([f"{folder}/record.json", "--gates", "default"], "gates")
    return {
        "kind": kind,
        "title": title,
        "gate": gate,
        "sentence": sentence,
        "next": {"text": text, "command": again},
        "notes": [],
    }


def _unjudged(record: RunRecord) -> tuple[str, str, str, str, str, tuple[str, ...]]:
    """Of a run that no gate judged: kind, title, gate, sentence, what to do next and the words to run it with."""
    if record.status != COMPLETE:
        said = [incident.message.strip() for incident in record.incidents]
        why = said[-1].partition("\n")[0] if said else ""
        title = f"Run {record.status}"
        return "fail", title, "no gate was judged", why, "mend what the incidents name, then run it again", ()
    if "candidate" not in record.arms:
        gate = "BF16 alone ran: there is nothing to judge"
        return "none", "Baseline", gate, "", "run a candidate beside it", ("quant=mxfp8_all",)
    if "bf16" not in record.arms:
        gate = "it ran alone: there is no BF16 beside it to judge it against"
        return "none", "Candidate alone", gate, "", "run it again", ()
    drop, fidelity = drop_of(record), fidelity_of(record)
    found = [f"loses {number(drop)} dB PSNR against BF16"] if drop is not None else []
    found += [f"matches it to {number(fidelity, 1)} dB"] if fidelity is not None else []
    sentence = f"The candidate {' and '.join(found)}; nobody asked whether that is enough." if found else ""
    gate = "the figures speak for themselves"
    return "none", UNASKED, gate, sentence, "have it judged", ()


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def sentence(text: str) -> str:
    """A phrase of a record as a sentence of a page."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") or not text else f"{text}."


def typed(command: Sequence[str]) -> str:
    """A command as it can be typed again: each word quoted where a shell needs it, a script called by ``python``."""
    by_python = command[:1] and command[0].endswith(".py")
    return shlex.join(["python", *command] if by_python else command)


def shown(value: Any) -> str:
    """Any value of a record as a person reads it."""
    if value is None or value in ({}, []):
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown(item) for item in value)
    return str(value)
