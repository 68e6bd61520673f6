"""A verdict for a person: one sentence, the next command, and the table of its checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def terms(gates: Mapping[str, Any]) -> list[str]:
    """What was asked: the gate, what it left out, what the candidate was held against, and by which rule."""
    parts = [gates["title"]] if gates["title"] else []
    if gates.get("left_out"):
        parts.append(f"without {', '.join(gates['left_out'])}")
    parts.append(f"against {gates['against']}")
    if gates.get("rule") == "point":
        parts.append("by point estimates")
    return parts


def verdict_line(gates: Mapping[str, Any]) -> str:
    """The verdict and why, in a sentence."""
    reason = f", because {gates['reason']}" if gates.get("reason") else ""
    return f"Verdict ({', '.join(terms(gates))}): {gates['verdict'].upper()}{reason}."


def next_lines(gates: Mapping[str, Any]) -> list[str]:
    """What to do next, and the command for it; empty where the verdict has none."""
    advice = gates.get("next")
    if not advice:
        return []
    return [f"Next: {advice['text']}", *([f"  {advice['command']}"] if advice.get("command") else [])]


def build_table(gates: Mapping[str, Any]) -> Table:
    """The checks for a person."""
    table = Table(title=f"Gate: {gates['title'] or 'unnamed'}, against {gates['against']}", title_justify="left")
    for heading in ("criterion", "figure", "threshold", "margin", "interval", "status"):
        table.add_column(heading, justify="left" if heading in ("criterion", "status") else "right")
    for check in gates["checks"]:
        value, margin, interval = check["value"], check["margin"], check["interval"]
        table.add_row(
            check["figure"],
            "-" if value is None else f"{value:.4g}",
            f"{check['relation']} {check['threshold']:g}",
            "-" if margin is None else f"{margin:+.3g}",
            "" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
            check["status"].replace("_", " "),
        )
    return table
