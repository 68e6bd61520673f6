"""The section of a record that holds a verdict, as types; :mod:`harness.report.gates` fills it in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Check:
    """One criterion of a gate.

    ``status``: ``pass``, ``fail``, ``undecided`` or ``not_measured``. ``margin`` is how far ``value`` is on the right
    side of ``threshold`` (negative: on the wrong one), ``interval`` as in :mod:`harness.report.gates.intervals`,
    ``note`` what a person should know about the status, ``needs_clips`` how many clips would decide what is undecided.
    """

    criterion: str
    figure: str
    value: float | None
    relation: str
    threshold: float
    margin: float | None
    status: str
    interval: tuple[float, float] | None = None
    note: str = ""
    needs_clips: int | None = None


MANY_CLIPS = 1000
"""Beyond so many an estimate of clips says only that the figure lies at the threshold."""


def clips_in_words(needed: int) -> str:
    """How many clips would decide a check, as a person is told."""
    return f"about {needed} clips" if needed <= MANY_CLIPS else f"more than {MANY_CLIPS} clips"


@dataclass(frozen=True)
class Advice:
    """What to do next: a sentence, and a command where one says it (else empty)."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a gate found.

    ``verdict``: ``ship``, ``do not ship`` or ``undecided``; ``reason``: why, as the rest of its sentence. ``against``:
    what the candidate was held against, in words; ``baseline``: the record's file, ``None`` for the run's own BF16.
    ``left_out``, ``not_asked``: criteria by name.
    """

    title: str
    against: str
    baseline: str | None
    verdict: str
    rule: str = "interval"
    confidence: float = 0.95
    reason: str = ""
    checks: list[Check] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    next: Advice | None = None

    def check(self, criterion: str) -> Check | None:
        """The check of this criterion; ``None`` where it was not asked for."""
        return next((check for check in self.checks if check.criterion == criterion), None)
