"""Gates: may a candidate ship? Judged from run records alone, so that an old run can be judged again.

A gate is a set of thresholds. Each gives one check with an interval around its figure. The verdict follows:

* ``ship``: every criterion was measured, and its whole interval lies on the right side;
* ``do not ship``: some criterion's whole interval lies on the wrong side, or the candidate was unstable;
* ``undecided``: the rest, with what would decide it.

``conf`` says what is asked, ``reading`` takes figures out of a record that may come from anywhere, ``intervals`` and
``blocks`` hold the statistics, ``judge`` the verdict, ``advice`` what to do next, ``show`` how it reads. The rules and
their reasons: ``docs/gates.md``.
"""

from harness.report.gates.advice import advise
from harness.report.gates.conf import MEMORY_FIGURES, MIN_RESAMPLES, Against, GateError, GatesConf, Rule, validate
from harness.report.gates.intervals import mean_interval
from harness.report.gates.judge import (
    DO_NOT_SHIP,
    EXIT_CODES,
    FAIL,
    NOT_MEASURED,
    OPEN,
    PASS,
    SHIP,
    UNDECIDED,
    check_comparable,
    evaluate,
)
from harness.report.gates.reading import unsound
from harness.report.gates.show import build_table, next_lines, terms, verdict_line

__all__ = [
    "DO_NOT_SHIP",
    "EXIT_CODES",
    "FAIL",
    "MEMORY_FIGURES",
    "MIN_RESAMPLES",
    "NOT_MEASURED",
    "OPEN",
    "PASS",
    "SHIP",
    "UNDECIDED",
    "Against",
    "GateError",
    "GatesConf",
    "Rule",
    "advise",
    "build_table",
    "check_comparable",
    "evaluate",
    "mean_interval",
    "next_lines",
    "terms",
    "unsound",
    "validate",
    "verdict_line",
]
