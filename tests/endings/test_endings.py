"""A cell of each kind of docs/endings.md: real processes, hit at one point, gone on with, and compared to the bit."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cells

CELLS = [
    ("plain", "SIGTERM", "middle"),
    ("plain", "SIGKILL", "record"),
    ("plain", "reader left", "middle"),
    ("ddp", "SIGHUP", "middle"),
    ("sweep", "SIGINT", "middle"),
]


@pytest.fixture(scope="module")
def undisturbed():
    found = {}

    def of(way):
        if way not in found:
            found[way] = cells.undisturbed(way)
        return found[way]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind", "point"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_what_is_finished_stays_and_the_rest_is_made_up_for_to_the_bit(undisturbed, way, kind, point):
    cell = cells.measure(way, kind, point, undisturbed(way))
    assert cell.wrong == [], cell
    assert cell.kept >= (2 if kind in cells.CODES else cells.CLIPS)


@pytest.mark.slow
def test_a_killed_ladder_takes_its_run_along_and_goes_on_within_it(undisturbed):
    cell = cells.measure("ladder", "SIGKILL", "middle", undisturbed("ladder"))
    assert cell.wrong == [], cell
    assert cell.kept == 2
