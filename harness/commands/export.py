"""Take away what a run judged: its candidate's packed MX weights as one .safetensors file (docs/export.md).

python scripts/export.py outputs/<run> --out mxfp4_mlp.safetensors

The candidate is set up again from the run's config and must have the very weights that were judged. A run started with
export=FILE writes the same file at its end. Exit code: 0 written, 2 wrong input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.entries import command_parser
from harness.files.writing import why_unwritable
from harness.imports import import_lightning
from harness.report.record import load_record
from harness.report.table import bytes_text
from harness.streams import complain, patient


@patient
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, or its record.json")
    parser.add_argument("--out", type=Path, required=True, help="file to write (.safetensors)")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix != ".safetensors" or args.out.exists():
            raise ValueError(f"--out {args.out}: {'exists' if args.out.exists() else 'name a .safetensors file'}")
        if (why := why_unwritable(args.out)) is not None:
            raise ValueError(f"--out {args.out}: cannot be written ({why}); name another file")
        record = load_record(args.run / "record.json" if args.run.is_dir() else args.run)
        import_lightning()
        from harness.ab.judged import export_run  # here: with it comes torch, and what was typed is right

        header = export_run(record, args.out)
    except (ValueError, OSError) as error:
        complain(error)
        return 2
    verdict = header.verdict["verdict"]
    print(f"{args.out}: {header.label}, {bytes_text(args.out.stat().st_size)}, verdict of {record.run_id}: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
