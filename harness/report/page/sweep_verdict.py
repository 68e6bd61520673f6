"""What a sweep says in a sentence: the configuration to take, or what stands between the nearest one and that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from harness.report.gates import DO_NOT_SHIP, SHIP, UNDECIDED
from harness.report.page.figures import Record, held_bytes, number, pick, ratio, size, times

Judged = tuple[str, str | None, Record]
"""A run's name, the link to its page, and its record, which has a verdict."""


def sweep_verdict(runs: Sequence[Judged], count: int) -> dict[str, Any]:
    """The verdict over ``count`` configurations, of which ``runs`` were judged.

    Returns:
        ``kind`` (pass, open, fail, none), ``title``, ``sentence``, ``next`` (``text``, ``command``; may be None), and
        ``name`` and ``page`` (the link to it) of the run it is about.
    """
    if not runs:
        text = "name a gate, or leave gates= out: a run with a candidate is judged by the default one"
        return _found("none", "No verdict", f"None of {count} configurations was judged.", {"text": text})
    said = Counter(record["gates"]["verdict"] for *_, record in runs)
    ships = [run for run in runs if run[2]["gates"]["verdict"] == SHIP]
    if ships:
        name, page, record = min(ships, key=lambda run: _held(run[2]))
        share = times(ratio(_held(record), held_bytes(record["arms"].get("bf16"))))
        drop = f", and drops {number(pick(record, 'quality.all.drop.psnr'), 3, sign=True)} dB"
        sentence = (
            f"Of {count} configurations {len(ships)} may ship. This one takes the least memory: "
            f"{size(_held(record))} of weights and KV window, {share} of BF16's{drop}."
        )
        return _found("pass", f"{name} may ship", sentence, record["gates"].get("next"), page, name)
    undecided = [run for run in runs if run[2]["gates"]["verdict"] == UNDECIDED]
    name, page, record = min(undecided or runs, key=lambda run: _drop(run[2]))
    told = [f"{n} {words[n > 1]}" for verdict, words in WORDS.items() if (n := said[verdict])]
    sentence = f"Of {count} configurations {' and '.join(told)}. Nearest is {name}: {record['gates']['reason']}."
    kind, title = ("open", "None may ship yet") if undecided else ("fail", "None may ship")
    return _found(kind, title, sentence, record["gates"].get("next"), page, name)


WORDS = {UNDECIDED: ("is undecided", "are undecided"), DO_NOT_SHIP: ("does not ship", "do not ship")}


def _found(
    kind: str,
    title: str,
    sentence: str,
    advice: Mapping[str, str] | None,
    page: str | None = None,
    name: str = "",
) -> dict[str, Any]:
    return {"kind": kind, "title": title, "sentence": sentence, "next": advice, "page": page, "name": name}


def _held(record: Record) -> float:
    found = held_bytes(record["arms"].get("candidate"))
    return float("inf") if found is None else found


def _drop(record: Record) -> float:
    drop = pick(record, "quality.all.drop.psnr")
    return float("inf") if drop is None else drop
