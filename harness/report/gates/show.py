"""A verdict for a person: one sentence, the next command, and the table of its checks."""

from __future__ import annotations

from rich.table import Table

from harness.report.verdict import Verdict


def terms(gates: Verdict) -> list[str]:
    """What was asked: the gate, what it left out, what the candidate was held against, and by which rule."""
    parts = [gates.title] if gates.title else []
    if gates.left_out:
        parts.append(f"without {', '.join(gates.left_out)}")
    parts.append(f"against {gates.against}")
    if gates.rule == "point":
        parts.append("by point estimates")
    return parts


def verdict_line(gates: Verdict) -> str:
    """The verdict and why, in a sentence."""
    reason = f", because {gates.reason}" if gates.reason else ""
    return f"Verdict ({', '.join(terms(gates))}): {gates.verdict.upper()}{reason}."


def next_lines(gates: Verdict) -> list[str]:
    """What to do next, and the command for it; empty where the verdict has none."""
    advice = gates.next
    if advice is None:
        return []
    return [f"Next: {advice.text}", *([f"  {advice.command}"] if advice.command else [])]


def build_table(gates: Verdict) -> Table:
    """The checks for a person."""
    table = Table(title=f"Gate: {gates.title or 'unnamed'}, against {gates.against}", title_justify="left")
    for heading in ("criterion", "figure", "threshold", "margin", "interval", "status"):
        table.add_column(heading, justify="left" if heading in ("criterion", "status") else "right")
    for check in gates.checks:
        value, margin, interval = check.value, check.margin, check.interval
        table.add_row(
            check.figure,
            "-" if value is None else f"{value:.4g}",
            f"{check.relation} {check.threshold:g}",
            "-" if margin is None else f"{margin:+.3g}",
            "" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
            check.status.replace("_", " "),
        )
    return table
