"""What a sweep says in a sentence: the configuration to take, or what stands between the nearest one and that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from harness.report.gates import DO_NOT_SHIP, SHIP, UNDECIDED
from harness.report.page.figures import drop_of, held_bytes, number, ratio, size, times
from harness.report.record import RunRecord
from harness.report.verdict import Advice, Verdict

Judged = tuple[str, str | None, RunRecord, Verdict]
"""A run's name, the link to its page, its record and the verdict in it."""


def sweep_verdict(runs: Sequence[Judged], count: int) -> dict[str, Any]:
    """The verdict over ``count`` configurations, of which ``runs`` were judged.

    Returns:
        ``kind`` (pass, open, fail, none), ``title``, ``sentence``, ``next`` (``text``, ``command``; may be None), and
        ``name`` and ``page`` (the link to it) of the run it is about.
    """
    if not runs:
        text = "name a gate, or leave gates= out: a run with a candidate is judged by the default one"
        return _found("none", "No verdict", f"None of {count} configurations was judged.", Advice(text))
    said = Counter(found.verdict for *_, found in runs)
    ships = [run for run in runs if run[3].verdict == SHIP]
    if ships:
        name, page, record, ruling = min(ships, key=lambda run: _held(run[2]))
        share = times(ratio(_held(record), held_bytes(record.arms.get("bf16"))))
        drop = f", and drops {number(drop_of(record), 3, sign=True)} dB"
        sentence = (
            f"Of {count} configurations {len(ships)} may ship. This one takes the least memory: "
            f"{size(_held(record))} of weights and KV window, {share} of BF16's{drop}."
        )
        return _found("pass", f"{name} may ship", sentence, ruling.next, page, name)
    undecided = [run for run in runs if run[3].verdict == UNDECIDED]
    name, page, _, ruling = min(undecided or runs, key=lambda run: _drop(run[2]))
    told = [f"{n} {words[n > 1]}" for verdict, words in WORDS.items() if (n := said[verdict])]
    sentence = f"Of {count} configurations {' and '.join(told)}. Nearest is {name}: {ruling.reason}."
    kind, title = ("open", "None may ship yet") if undecided else ("fail", "None may ship")
    return _found(kind, title, sentence, ruling.next, page, name)


WORDS = {UNDECIDED: ("is undecided", "are undecided"), DO_NOT_SHIP: ("does not ship", "do not ship")}


def _found(
    kind: str,
    title: str,
    sentence: str,
    advice: Advice | None,
    page: str | None = None,
    name: str = "",
) -> dict[str, Any]:
    return {"kind": kind, "title": title, "sentence": sentence, "next": advice, "page": page, "name": name}


def _held(record: RunRecord) -> float:
    found = held_bytes(record.candidate)
    return float("inf") if found is None else found


def _drop(record: RunRecord) -> float:
    drop = drop_of(record)
    return float("inf") if drop is None else drop
