"""What is generated from the code is what the documents say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import harness
from harness.cli import COMMANDS
from harness.config import ROOT
from harness.config.reference import rows, table
from harness.report.record import load_record
from harness.report.schema import record_schema


def test_every_field_of_the_config_is_documented():
    assert [path for path, _, _, text in rows() if not text] == []


def test_the_page_of_fields_is_what_the_code_says():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page.endswith(table()), "run: python -m harness fields --markdown, and put it into docs/config.md"


def problems(schema, value, definitions, path="record"):
    """A validator of the part of JSON Schema that the record's schema uses."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        found = [list(problems(option, value, definitions, path)) for option in schema["anyOf"]]
        if all(found):
            yield f"{path}: none of {len(found)} fits: {found[0][:1]}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is not one of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{path}: {value!r} is not {schema['const']}"
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    kind = schema.get("type")
    if kind == "null":
        if value is not None:
            yield f"{path}: not null"
    elif kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{path}: {value!r:.50} is no {kind}"
    elif kind == "object":
        yield from (f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value)
        for name, one in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from problems(inner, one, definitions, f"{path}.{name}")
    elif kind == "array":
        for index, one in enumerate(value):
            yield from problems(schema.get("items", {}), one, definitions, f"{path}[{index}]")


@pytest.fixture(scope="module")
def run_from_python(tmp_path_factory):
    """The lines of docs/python.md, executed as a notebook executes a cell: in one namespace."""
    import os

    folder, before = tmp_path_factory.mktemp("python"), Path.cwd()
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    lines = text.partition("```python\n")[2].partition("```")[0]
    assert len(lines.splitlines()) <= 15
    namespace = {}
    os.chdir(folder)
    try:
        exec(compile(lines, "docs/python.md", "exec"), namespace)
    finally:
        os.chdir(before)
    return namespace["result"]


def test_the_documented_lines_run_and_a_notebook_shows_table_and_page(run_from_python):
    result = run_from_python
    assert result.record.status == "complete"
    assert len(result.record.clips) == 1
    assert load_record(result.folder / "record.json").choices["quant"] == "mxfp8_all"
    shown = result._repr_html_()
    assert "mxfp8_all + mx_v_only" in shown
    assert "data:text/html;base64," in shown


def test_a_real_record_is_of_the_schema_and_a_changed_one_is_not(run_from_python):
    content = json.loads((run_from_python.folder / "record.json").read_text())
    schema = record_schema()
    assert list(problems(schema, content, schema["$defs"])) == []
    del content["status"]
    content["arms"]["bf16"]["label"] = 3
    found = list(problems(schema, content, schema["$defs"]))
    assert "record.status is missing" in found
    assert any(problem.startswith("record.arms.bf16.label") for problem in found)


def mx_world(*words, **options):
    command = [sys.executable, "-m", "harness", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT, **options)


SUB_COMMANDS = """
import contextlib, io, sys
from harness.cli import COMMANDS, main

for words in [[name, option] for name in COMMANDS for option in ("--version", "--help")]:
    sys.argv = ["mx-world", *words]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "lightning", "torchmetrics", "torchao", "matplotlib"} & set(sys.modules)
    text = said.getvalue().strip()
    print(*words, code or 0, text if "--version" in words else "told" if text else "nothing", *heavy, sep=" | ")
"""


def test_every_sub_command_has_help_and_the_products_version_without_importing_torch():
    done = subprocess.run([sys.executable, "-c", SUB_COMMANDS], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [
        f"{name} | {option} | 0 | {said}"
        for name in COMMANDS
        for option, said in (("--version", f"mx-world {harness.__version__}"), ("--help", "told"))
    ]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "quannt=mxfp8_mlp"], "did you mean quant?"),
        (["ladder", "modle=smoke"], "did you mean model?"),
        (["microbench", "--itterations", "3"], "unrecognized arguments: --itterations"),
        (["export", "nowhere", "--out", "x.safetensors"], "nowhere"),
    ],
)
def test_a_misspelt_word_is_told_before_torch_is_imported(words, told):
    code = "import atexit, sys\nfrom harness.cli import main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_an_unknown_sub_command_is_one_line():
    done = mx_world("lader")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "did you mean ladder?" in done.stderr


def test_importing_the_package_imports_neither_torch_nor_hydra():
    code = "import sys, harness; print({'torch', 'hydra', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_hooks_before_a_commit_are_the_lint_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / ".ci" / "run").read_text().partition("\nlint() {\n")[2].partition("\n}")[0]
    assert [hook["entry"] for hook in hooks] == [command.strip() for command in lint.split("&&")]
