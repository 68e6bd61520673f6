"""Judge a finished run again, from its record alone.

python scripts/gates.py outputs/<run>/record.json --gates a
python scripts/gates.py outputs/<run>/record.json --gates b baseline=outputs/<other>/record.json 'without=[speed]'

The run's record, table and page get the new verdict in place of the old one; with --print nothing is written.
Without --gates the run's own gate is used. Exit code: 0 ship, 3 do not ship, 4 undecided, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it first, where our rooms would pass for top-level packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from harness.start import hush, require

    hush()
    require()

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from harness.config import CONF
from harness.config.problems import unknown
from harness.entries import command_parser
from harness.files.writing import write_text
from harness.report.gates import EXIT_CODES, GateError, GatesConf, build_table, evaluate, next_lines, verdict_line
from harness.report.gates.advice import changed
from harness.report.page.run_page import run_page, write_run_page
from harness.report.record import RecordError, RunRecord, load_record, save_record
from harness.report.table import render
from harness.report.verdict import Verdict
from harness.streams import complain, patient

RECORD = "record.json"
FOLDER = CONF / "gates"


def gates_conf(name: str | None, own: Any, changes: Sequence[str]) -> GatesConf:
    """The gate ``name`` of conf/gates, or the run's ``own``, with ``field=value`` changes.

    Raises:
        GateError: if there is no such gate, or a field or value is wrong.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name is not None and name not in names:
        raise GateError(f"--gates {name}: allowed are {', '.join(names)}")
    if name is None and not isinstance(own, dict):
        raise GateError("the record's own gate cannot be read; name one with --gates (" + ", ".join(names) + ")")
    chosen = OmegaConf.create(own) if name is None else OmegaConf.load(FOLDER / f"{name}.yaml")
    fields = [item.name for item in dataclasses.fields(GatesConf)]
    for change in changes:
        name, equals, _ = change.partition("=")
        if not equals:
            raise GateError(f"{change}: not of the form field=value")
        if name.partition(".")[0] not in fields:
            raise GateError(f"{name}: {unknown('field of a gate', name, fields)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(GatesConf), chosen, OmegaConf.from_dotlist(list(changes)))
        conf = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise GateError(f"gates: {str(error).splitlines()[0]}") from error
    assert isinstance(conf, GatesConf)
    if not conf.enabled:
        raise GateError("this run had no gates; name one with --gates (" + ", ".join(names) + ")")
    return conf


def asked_again(record: RunRecord, name: str | None, changes: Sequence[str]) -> list[str]:
    """The run's overrides as they would ask for this gate: what to do next is said in the words of a run."""
    words = [] if name is None else [f"gates={name}"]
    kept = [word for word in record.overrides if name is None or not word.lstrip("+").startswith("gates.")]
    return changed(kept, *words, *(f"gates.{change}" for change in changes))


def rewrite(record: RunRecord, folder: Path) -> None:
    """Put ``record`` and what is made from it, table and page, in the place of a run's own.

    Raises:
        RecordError: if the record may come from anywhere and is too broken to be shown; then nothing is written.
        OSError: naming the file that cannot be written.
    """
    try:
        table, _ = render(record), run_page(record, folder)
    except Exception as error:  # a broken record can break its table anywhere
        said = f"{type(error).__name__}: {error}"
        raise RecordError(f"{folder / RECORD}: judged, but too broken to be shown ({said}); use --print") from error
    save_record(record, folder / RECORD)
    write_text(folder / "table.txt", table)
    print(f"Written again: {write_run_page(folder)}")


def show(found: Verdict) -> None:
    """Print the verdict, what to do next, and the checks."""
    console = Console()
    for line in (verdict_line(found), *next_lines(found)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(build_table(found))
    for note in found.notes:
        console.print(note, markup=False, highlight=False)


@patient
def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = command_parser(__doc__)
    parser.add_argument("record", type=Path, help="a run's record.json")
    parser.add_argument("--gates", help="a gate of conf/gates; without it, the run's own")
    parser.add_argument("changes", nargs="*", help="fields of the gate to change, as field=value")
    parser.add_argument("--print", action="store_true", help="write nothing")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.record.name != RECORD and not args.print:
            raise GateError(f"{args.record}: a run keeps its record as {RECORD}; with --print any file can be judged")
        record = load_record(args.record)
        conf = gates_conf(args.gates, record.config.get("gates", {}), args.changes)
        baseline = None if conf.baseline is None else load_record(Path(conf.baseline))
        found = evaluate(replace(record, overrides=asked_again(record, args.gates, args.changes)), conf, baseline)
        show(found)
        if not args.print:
            rewrite(replace(record, gates=found), args.record.parent)
    except (ValueError, OSError) as error:
        complain(error)
        return 2
    return EXIT_CODES[found.verdict]


if __name__ == "__main__":
    sys.exit(main())
