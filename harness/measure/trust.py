"""Can the times of a run be trusted? Judged from its record: what both arms share has to cost both the same.

The decoder is one and the same in both arms, so its time is a control: whatever makes it differ between the arms (a
neighbour on the machine, a clock that changed) has also moved the times that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from harness.measure.figures import Stats

CONTROL = 0.03
"""Share by which the decoder's median may differ between the arms: as much as gate A allows the frame itself."""
TAIL = 1.5
"""p90 over median from which frames were disturbed: a frame does the same work every time."""
SPANS = (("dit_ms", "DiT"), ("decoder_ms", "decoder"))
ADVICE = "run again with nothing else on the machine"


class Times(Protocol):
    """An arm's times of a frame's parts, as a record's ``speed`` section has them; ``None`` where none were taken."""

    dit_ms: Stats | None
    decoder_ms: Stats | None


def distrust(arms: Mapping[str, Times]) -> list[str]:
    """What speaks against the times of a run, a sentence each; empty if nothing does.

    Args:
        arms: the ``speed`` of ``bf16`` and ``candidate``; figures that are no times are not judged.
    """
    found = [*_control(arms), *_tails(arms)]
    return [f"Timing cannot be trusted: {text}; {ADVICE}." for text in found]


def _figure(arms: Mapping[str, Times], arm: str, span: str, figure: str) -> float | None:
    stats: Stats | None = getattr(arms[arm], span) if arm in arms else None
    value = None if stats is None else float(getattr(stats, figure))
    return value if value is not None and 0 < value < float("inf") else None


def _control(arms: Mapping[str, Times]) -> list[str]:
    bf16, candidate = (_figure(arms, name, "decoder_ms", "median") for name in ("bf16", "candidate"))
    if bf16 is None or candidate is None:
        return []
    ratio = candidate / bf16
    if 1 / (1 + CONTROL) <= ratio <= 1 + CONTROL:
        return []
    return [f"the decoder, the same in both arms, took {ratio:.2f} times as long in the candidate's"]


def _tails(arms: Mapping[str, Times]) -> list[str]:
    texts = []
    for arm, name in (("bf16", "BF16"), ("candidate", "the candidate")):
        for span, part in SPANS:
            median, p90 = _figure(arms, arm, span, "median"), _figure(arms, arm, span, "p90")
            if median is not None and p90 is not None and p90 > TAIL * median:
                times = f"{p90 / median:.1f} times as long as its median"
                texts.append(f"one frame in ten took {name}'s {part} over {times}")
    return texts
