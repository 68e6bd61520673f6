"""Reads figures out of a record and words them: what both pages, a run's and a sweep's, have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report.codec import read
from harness.report.gates import terms
from harness.report.gates.advice import changed, command
from harness.report.table import bytes_text
from harness.report.verdict import Verdict

ABSENT = "–"
ARMS = (("bf16", "bf16"), ("candidate", "cand"))
"""Arms and their CSS class."""
EMULATED = "emulated kernel: its speed says nothing about MX"

Record = Mapping[str, Any]


def pick(section: Any, path: str) -> Any:
    """The value at a dotted ``path``; ``None`` where a step of it is missing."""
    for key in path.split("."):
        if not isinstance(section, Mapping) or key not in section:
            return None
        section = section[key]
    return section


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


def speed_ratio(record: Record) -> float | None:
    """FPS of the candidate's DiT / BF16's, also where the kernel is emulated."""
    return ratio(pick(record, "arms.candidate.speed.pipeline_fps"), pick(record, "arms.bf16.speed.pipeline_fps"))


def held_bytes(arm: Any) -> float | None:
    """Bytes an arm needs while it runs: weights, KV window, and the room the window is dequantised into.

    ``None`` without an arm or a figure.
    """
    weights, window, peak = (
        pick(arm, f"memory.{name}") for name in ("weight_bytes", "kv_window_bytes", "kv_peak_bytes")
    )
    if peak is None and window is not None:
        peak = window + (pick(arm, "memory.kv_scratch_bytes") or 0)
    return None if weights is None or peak is None else weights + peak


def emulated(record: Record) -> bool:
    """Whether the candidate's speed says nothing about its format."""
    return pick(record, "arms.candidate.speed_is_meaningful") is False


VERDICTS = {
    "ship": ("pass", "May ship"),
    "do not ship": ("fail", "Do not ship"),
    "undecided": ("open", "Undecided"),
}


UNASKED = "No gate was asked for"


def verdict(record: Record, folder: str | Path = "outputs/run") -> dict[str, Any]:
    """The verdict as ``kind`` (pass, fail, open, none), ``title``, ``gate``, ``sentence``, ``next`` and ``notes``.

    ``sentence`` is what the verdict rests on (may be empty), ``next`` has ``text`` and ``command``.
    """
    gates = record.get("gates")
    if gates:
        kind, title = VERDICTS.get(gates["verdict"], ("open", str(gates["verdict"]).capitalize()))
        reason = str(gates.get("reason") or "")
        return {
            "kind": kind,
            "title": title,
            "gate": ", ".join(terms(read(Verdict, gates))),
            "sentence": f"{reason[:1].upper()}{reason[1:]}." if reason else "",
            "next": gates.get("next"),
            "notes": list(gates.get("notes", [])),
        }
    kind, title, gate, sentence, text, new = _unjudged(record)
    again = command(changed(record["overrides"], *new))
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


def _unjudged(record: Record) -> tuple[str, str, str, str, str, tuple[str, ...]]:
    """Of a run that no gate judged: kind, title, gate, sentence, what to do next and the words to run it with."""
    if record["status"] != "complete":
        said = [str(incident.get("message") or "").strip() for incident in record["incidents"]]
        why = said[-1].partition("\n")[0] if said else ""
        title = f"Run {record['status']}"
        return "fail", title, "no gate was judged", why, "mend what the incidents name, then run it again", ()
    if "candidate" not in record["arms"]:
        gate = "BF16 alone ran: there is nothing to judge"
        return "none", "Baseline", gate, "", "run a candidate beside it", ("quant=mxfp8_all",)
    if "bf16" not in record["arms"]:
        gate = "it ran alone: there is no BF16 beside it to judge it against"
        return "none", "Candidate alone", gate, "", "run it again", ()
    drop, fidelity = pick(record, "quality.all.drop.psnr"), pick(record, "quality.all.fidelity.psnr")
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
