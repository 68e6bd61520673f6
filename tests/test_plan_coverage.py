"""docs/plan_coverage.md names only what exists, and leaves no format, cache, gate or experiment out."""

import ast
import re
from functools import cache

import pytest
from omegaconf import OmegaConf

from harness.config import ROOT, RunConf
from harness.config.flags import FLAGS

TEXT = (ROOT / "docs" / "plan_coverage.md").read_text()
CODE = [word for span in re.findall(r"`([^`]+)`", TEXT) for word in span.split()]
GROUPS = {path.name: {option.stem for option in path.glob("*.yaml")} for path in (ROOT / "conf").iterdir()}
NO_FIELDS = {"torch.compile", "incidents.log", "frames.csv"}
SECTIONS = {name.partition(".")[0] for name in vars(RunConf())}


@cache
def functions(path):
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", sorted({word for word in CODE if "::" in word}))
def test_tests_exist(name):
    path, test = name.split("::")
    assert (ROOT / path).is_file()
    assert test in functions(path)


@pytest.mark.parametrize("word", sorted({word for word in CODE if re.match(r"(scripts|harness|tests)/[^:]+$", word)}))
def test_files_exist(word):
    assert (ROOT / word).is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link).is_file()


def options():
    """(group, option) of every word such as ``kv=bf16`` or ``compile=off,on``."""
    for word in CODE:
        group, _, values = word.partition("=")
        if group in GROUPS:
            yield from ((group, value) for value in values.split(",") if value)


def test_configs_exist():
    found = set(options())
    assert len(found) > 40
    assert {(group, option) for group, option in found if option not in GROUPS[group]} == set()


@pytest.mark.parametrize("group", ["quant", "kv", "gates", "experiment", "attention"])
def test_every_option_is_some_requirements(group):
    assert GROUPS[group] <= {option for named, option in options() if named == group}


def test_fields_exist():
    schema = OmegaConf.structured(RunConf)
    record = (ROOT / "docs" / "record.md").read_text()
    fields = {word.partition("=")[0] for word in CODE if re.match(r"[a-z_]+\.[a-z_.]+(=|$)", word)}
    fields = {field for field in fields if f"`{field}`" not in record and field not in NO_FIELDS}
    assert len(fields) > 25
    for field in sorted(fields):
        section, _, name = field.rpartition(".")
        assert section.partition(".")[0] in SECTIONS, field
        assert name in OmegaConf.select(schema, section), field


def test_fields_of_the_record_are_documented():
    record = (ROOT / "docs" / "record.md").read_text()
    named = {
        word
        for word in CODE
        if word.startswith(("arms.<arm>.", "environment.", "quality.", "incidents[", "fallbacks["))
    }
    assert len(named) > 20
    assert {word for word in named if f"`{word}`" not in record} == set()


def test_flags_exist():
    named = {word for word in CODE if word.startswith("OWL_")}
    assert len(named) >= 9
    assert named <= set(FLAGS)


def test_every_row_names_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and not line.startswith(("|---", "| the plan"))]
    assert len(rows) > 60
    assert [row for row in rows if "::test_" not in row.split("|")[-2]] == []
