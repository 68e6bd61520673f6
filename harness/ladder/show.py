"""The climb for a person: what to run, first; then every trial, and why each was not taken."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from harness.ladder.climb import Ladder, recommendation
from harness.ladder.rungs import BASELINE
from harness.ladder.state import Result
from harness.report.gates import DO_NOT_SHIP, SHIP, UNDECIDED
from harness.report.table import bytes_text
from harness.report.verdict import clips_in_words


def show(ladder: Ladder, best: Result, console: Console) -> None:
    """The recommendation, the climb as a table, and why each step was not taken."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(headline(ladder, best))
    for what, command in takeaways(best, ladder.common):
        say(f"{what}:\n  {command}")
    console.print(_table(ladder.results, best))
    say("drop: against BF16; judged: what the gate compares, on top of what the step stands on (D: against BF16)")
    if ladder.asking:
        say("Speed was not asked: a CPU's says nothing about MX. Run the ladder on the GPU it is for (trainer=gpu).")
    for result in ladder.results:
        if result.verdict != SHIP:
            what = "Rejected" if result.verdict == DO_NOT_SHIP else "Undecided"
            say(f"{what}, step {result.step} {result.name}: {result.reason}.")
    for failure in ladder.failed:
        say(f"Failed, step {failure.step} {failure.name}: {failure.reason}.")


def headline(ladder: Ladder, best: Result) -> str:
    """The outcome in a sentence."""
    baseline = ladder.results[0]
    if best.step == BASELINE.step:
        text = "Nothing beyond BF16 is proven to ship"
    else:
        drop = "" if best.drop is None else f", {best.drop:+.2f} dB against BF16"
        sizes = f"{bytes_text(best.bytes)} instead of {bytes_text(baseline.bytes)}"
        text = f"Recommended: {' '.join([*best.quant, *best.kv])}, {sizes} of weights and cache{drop}"
    needs = [result.needs_clips for result in ladder.results if result.verdict == UNDECIDED and result.needs_clips]
    if needs:
        text += f"; {clips_in_words(max(needs))} would decide what is undecided"
    if ladder.failed:
        names = ", ".join(failure.name for failure in ladder.failed)
        text += f"; NOT EVERYTHING RAN: {names} failed, start the ladder again to retry"
    return f"{text}."


def takeaways(best: Result, common: Sequence[str]) -> list[tuple[str, str]]:
    """What to do with the outcome: what a command is for, and the command."""
    return [("Run it", recommendation(best, common))]


def _table(results: Sequence[Result], best: Result) -> Table:
    table = Table(title="Ladder (* = recommended: of what ships, the fewest bytes)", title_justify="left")
    for heading in ("step", "configuration", "gate", "stands on", "verdict"):
        table.add_column(heading, overflow="fold")
    for heading in ("drop dB", "judged dB", "interval", "speed", "weights + KV"):
        table.add_column(heading, justify="right")
    calibrated = any(result.calibration for result in results)
    if calibrated:
        table.add_column("calibration: gained, cost", overflow="fold")
    for result in results:
        table.add_row(
            str(result.step),
            result.name + (" *" if result is best else ""),
            "" if result.gate == "none" else result.gate.upper(),
            result.stands_on,
            "measured" if result.gate == "none" else result.verdict,
            "" if result.drop is None else f"{result.drop:+.2f}",
            "" if result.added is None else f"{result.added:+.2f}",
            "" if result.interval is None else f"{result.interval[0]:.2f} … {result.interval[1]:.2f}",
            result.speed,
            bytes_text(result.bytes),
            *([gained(result, results)] if calibrated else []),
        )
    return table


def gained(result: Result, results: Sequence[Result]) -> str:
    """What calibration of a trial's weights gained over nearest rounding, where that was tried, and what it cost."""
    made = result.calibration
    if made is None:
        return ""
    cost = f"{made.seconds:.0f} s{' (kept)' if made.found else ''}, peak {bytes_text(made.peak_bytes)}"
    words = [word for word in result.quant if not word.startswith("calib")]
    nearest = next((r for r in results if (r.quant, r.kv, r.step) == (words, result.kv, result.step)), None)
    if nearest is None or nearest.drop is None or result.drop is None:
        return cost
    text = f"{nearest.drop - result.drop:+.2f} dB of drop"
    if nearest.fidelity is not None and result.fidelity is not None:
        text += f", {result.fidelity - nearest.fidelity:+.1f} dB of fidelity"
    return f"{text}; {cost}"
