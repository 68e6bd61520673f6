"""docs/record.md names every field of a record, and no field that does not exist."""

import dataclasses
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from harness.report.gates import GatesConf, evaluate
from harness.report.record import RunRecord, load_record
from harness.report.sections import ArmRecord
from harness.run import run

DOC = Path(__file__).parents[2] / "docs" / "record.md"


def documented():
    rows = re.findall(r"^\| (`.*?`) \|", DOC.read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def paths(value, path=""):
    """Dotted paths of all leaves; ``[]`` for the entries of a list, ``<arm>`` for either arm."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            name = "<arm>" if path == "arms" else str(key)
            yield from paths(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from paths(inner, f"{path}[]")
    else:
        yield path


def is_documented(path, names):
    """An empty section counts as documented by its fields."""
    return any(fnmatchcase(path, re.sub(r"\[\]", "[[]]", name)) for name in names) or any(
        name.startswith((f"{path}.", f"{path}[]")) for name in names
    )


@pytest.fixture(scope="module")
def names():
    return documented()


def test_every_field_of_a_real_record_is_documented(names, composed, game, overrides, tmp_path):
    run(composed(*overrides(game), "quant=mxfp8_all", "kv=mx_v_only"))
    record = load_record(tmp_path / "run" / "record.json")
    record.gates = evaluate(record, GatesConf(enabled=True, max_psnr_drop=0.5))
    missing = {path for path in paths(dataclasses.asdict(record)) if not is_documented(path, names)}
    assert not missing


def test_every_documented_field_exists(names):
    fields = {field.name for field in dataclasses.fields(RunRecord)}
    arm = {field.name for field in dataclasses.fields(ArmRecord)}
    tops = {re.split(r"[.\[]", name)[0] for name in names}
    assert tops == fields
    assert {name.split(".")[2].split("[")[0] for name in names if name.startswith("arms.<arm>.")} == arm
