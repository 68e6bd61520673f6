"""Judge a finished run again, from its record alone.

python scripts/gates.py outputs/<run>/record.json --gates a
python scripts/gates.py outputs/<run>/record.json --gates b baseline=outputs/<other>/record.json max_psnr_drop=0.2

The run's record, table and page get the new verdict in place of the old one; with --print nothing is written.
Without --gates the run's own gate is used. Exit code: 0 ship, 3 do not ship, 4 undecided, 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from harness.report.gates import EXIT_CODES, GateError, GatesConf, build_table, evaluate
from harness.report.page.run_page import write_run_page
from harness.report.record import RunRecord, load_record, save_record, write_atomically
from harness.report.table import render

RECORD = "record.json"
FOLDER = ROOT / "conf" / "gates"


def gates_conf(name: str | None, own: dict, changes: Sequence[str]) -> GatesConf:
    """The gate ``name`` of conf/gates, or the run's ``own``, with ``field=value`` changes.

    Raises:
        GateError: if there is no such gate, or a field or value is wrong.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name is not None and name not in names:
        raise GateError(f"--gates {name}: allowed are {', '.join(names)}")
    chosen = OmegaConf.create(own) if name is None else OmegaConf.load(FOLDER / f"{name}.yaml")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(GatesConf), chosen, OmegaConf.from_dotlist(list(changes)))
        conf = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise GateError(f"gates: {error}") from error
    assert isinstance(conf, GatesConf)
    if not conf.enabled:
        raise GateError("this run had no gates; name one with --gates (" + ", ".join(names) + ")")
    return conf


def rewrite(record: RunRecord, folder: Path) -> None:
    """Put ``record`` and what is made from it, table and page, in the place of a run's own."""
    save_record(record, folder / RECORD)
    write_atomically(folder / "table.txt", render(record))
    print(f"Written again: {write_run_page(folder)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        baseline = None if conf.baseline is None else asdict(load_record(Path(conf.baseline)))
        found = evaluate(asdict(record), conf, baseline)
        if not args.print:
            rewrite(replace(record, gates=found), args.record.parent)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(build_table(found))
    for note in found["notes"]:
        console.print(note, markup=False, highlight=False)
    return EXIT_CODES[found["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
