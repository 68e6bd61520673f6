"""Every field of the config for a reader: ``mx-world fields``, and the table of docs/config.md."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Any

from omegaconf import MISSING

from harness.config.fields import Field, fields_of, wants
from harness.config.problems import nearest
from harness.config.schema import RunConf
from harness.streams import complain, patient

DOCUMENTED = re.compile(r"(?:^|\s)``?(\w+)``?: |(?:^|(?<=[.;:\n]) *)(\w+): ")
"""Where a docstring begins to speak of a field: its name and a colon, at the start of a line or of a sentence."""


def meaning(field: Field) -> str:
    """What the docstring of the dataclass says of ``field``; empty if it says nothing."""
    text = inspect.cleandoc(inspect.getdoc(field.owner) or "")
    names = set(getattr(field.owner, "__dataclass_fields__", {}))
    starts = [(m.start(), m.end(), m[1] or m[2]) for m in DOCUMENTED.finditer(text) if (m[1] or m[2]) in names]
    for index, (_, end, name) in enumerate(starts):
        if name == field.name:
            until = starts[index + 1][0] if index + 1 < len(starts) else len(text)
            return " ".join(text[end:until].split()).strip()
    told = re.search(rf"[^.]*`+{field.name}`+[^.]*\.", text)
    return " ".join(told[0].split()) if told else _of_section(field)


def _of_section(field: Field) -> str:
    """The first line of the docstring of a section, or of an enumeration."""
    kind = field.section or field.kind
    own = isinstance(kind, type) and kind.__module__.startswith("harness")
    return (inspect.getdoc(kind) or "").partition("\n")[0] if own else ""


def default(field: Field) -> str:
    """The schema's default as YAML writes it."""
    value: Any = field.default
    if value is MISSING:
        return "set by the group"
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Path, what it takes, default and meaning of each field that is no section."""
    for field in fields_of(RunConf):
        if field.section is None and field.name != "_target_":
            yield field.path, wants(field.hint), default(field), meaning(field)


def table() -> str:
    """The fields as Markdown, a table for each section."""
    lines, before = [], None
    for path, takes, value, text in rows():
        section = path.rpartition(".")[0]
        if section != before:
            title = f"`{section}`" if section else "Top level"
            lines += ["", f"## {title}", "", "| field | takes | default | meaning |", "|---|---|---|---|"]
            before = section
        cells = [f"`{path}`", takes, f"`{value}`", text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


@patient
def main() -> int:
    """``mx-world fields [NAME …]``: all fields, or those whose path has one of the names. Exit code 2 for none."""
    names = [word for word in sys.argv[1:] if word != "--markdown"]
    if {"-h", "--help"} & set(names):
        print(main.__doc__)
        return 0
    if "--markdown" in sys.argv:
        sys.stdout.write(table())
        return 0
    found = [row for row in rows() if not names or any(name in row[0] for name in names)]
    for path, takes, value, text in found:
        print(f"{path}\n    {takes}; default {value}\n    {text}")
    if not found:
        like = nearest(names[0], [row[0] for row in rows()])
        complain(f"{names[0]}: no such field" + (f"; did you mean {like}?" if like else ""))
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
