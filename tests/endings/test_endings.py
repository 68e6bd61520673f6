"""A cell of each kind of docs/endings.md: real processes, hit at one point, gone on with, and compared to the bit.

What is hit is a process of its own. What goes on with it, and the run that it is compared with, are the same code with
the same words in the test's own process, where nothing has to be imported anew.
"""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from harness import run as run_module
from harness.ladder.climb import Ladder
from harness.ladder.state import locked

sys.path.insert(0, str(Path(__file__).parent))

import cells

CELLS = [
    ("plain", "SIGTERM", "middle"),
    ("plain", "SIGKILL", "record"),
    ("plain", "reader left", "middle"),
    ("sweep", "SIGINT", "middle"),
]


def here(command):
    """Exit code and standard error of ``python harness/run.py …``, run in this process."""
    said, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", command[1:])
        GlobalHydra.instance().clear()
        try:
            run_module.cli()
        except SystemExit as end:
            code = end.code or 0
    return code, said.getvalue()


def climbed(command):
    """The ladder of ``python scripts/ladder.py --out FOLDER …``, its runs in this process too."""

    def launch(words, folder):
        folder.mkdir(parents=True, exist_ok=True)
        return here([sys.executable, "harness/run.py", *words, f"hydra.run.dir={folder}"])[0]

    folder, words = Path(command[3]), command[4:]
    with locked(folder):
        ladder = Ladder(folder, words, "mx_kv_e4m3", launch)
        ladder.climb()
    return len(ladder.failed), str(ladder.failed)


def start(way):
    return climbed if way == "ladder" else here


@pytest.fixture(scope="module")
def undisturbed():
    found = {}

    def of(way):
        if way not in found:
            found[way] = cells.undisturbed(way, start(way))
        return found[way]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind", "point"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_what_is_finished_stays_and_the_rest_is_made_up_for_to_the_bit(undisturbed, way, kind, point):
    cell = cells.measure(way, kind, point, undisturbed(way), start(way))
    assert cell.wrong == [], cell
    assert cell.kept >= (2 if kind in cells.CODES else cells.CLIPS)


@pytest.mark.slow
def test_a_killed_ladder_takes_its_run_along_and_goes_on_within_it(undisturbed):
    cell = cells.measure("ladder", "SIGKILL", "middle", undisturbed("ladder"), climbed)
    assert cell.wrong == [], cell
    assert cell.kept == 2
