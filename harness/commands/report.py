"""Write a run's or a sweep's page again, from records alone; of two runs also a page that holds one beside the other.

python scripts/report.py outputs/<run>
python scripts/report.py outputs/<run A> outputs/<run B>    (comparison.html in the folder of B)
python scripts/report.py --sweep outputs/multirun/<sweep>
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.entries import command_parser
from harness.report.page.compare_page import write_compare_page
from harness.report.page.run_page import write_run_page
from harness.report.record import RecordError
from harness.report.sweep import SweepError, write_sweep_page
from harness.streams import complain, patient


@patient
def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code is 0, or 2 where there is nothing to write a page from."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="folder with a record.json, or of a sweep")
    parser.add_argument("--sweep", action="store_true", help="the folders are sweeps: rebuild their runs' pages too")
    options = parser.parse_args(arguments)
    for folder in options.folder:
        try:
            print(write_sweep_page(folder, rebuild_runs=True) if options.sweep else write_run_page(folder))
        except (RecordError, SweepError, OSError) as error:
            complain(error)
            return 2
    if len(options.folder) == 2 and not options.sweep:
        try:
            print(write_compare_page(*options.folder))
        except (RecordError, OSError) as error:
            complain(error)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
