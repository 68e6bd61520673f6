"""JSON and YAML from strangers: bounded in memory and time, and never read two ways."""

import time

import pytest

from harness.files.text import MAX_YAML_BYTES, FileError, read_json, read_yaml

MULTIPLYING = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 40)
)
DOUBLING = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, 200))

YAML_REFUSED = {
    "anchors that multiply": (MULTIPLYING, "more than 100000 values"),
    "anchors that double": (DOUBLING, "more than 100000 values"),
    "self-reference": ("a: &a [*a]\n", "stands within its own anchor"),
    "self-reference of the root": ("&r {model: *r}\n", "stands within its own anchor"),
    "an alias without an anchor": ("a: *b\n", "stands within its own anchor or has none"),
    "20,000 brackets": ("a: " + "[" * 20_000, "nested deeper"),
    "20,000 braces": ("a: " + "{" * 20_000, "nested deeper"),
    "2,000 indents": ("".join(" " * n + "a:\n" for n in range(200)), "nested deeper"),
    "a key given twice": ("model:\n  d_model: 3\n  d_model: 4\n", "'d_model' is given twice"),
    "a python object": ("a: !!python/object/apply:os.system [ls]\n", "not a readable YAML"),
    "a number of 10,000 digits": ("a: " + "9" * 10_000 + "\n", "not a readable YAML"),
    "an environment variable": ("a: ${oc.env:HOME}\n", "an interpolation must be a whole value"),
    "texts that double": ("a: xx\nb: ${a}${a}\n", "an interpolation must be a whole value"),
    "interpolations in a circle": ("a: ${b}\nb: ${a}\n", "lead to one another"),
    "an interpolated section": ("a: {b: 1}\nc: ${a}\n", "names a section"),
    "no such key": ("a: ${model.x}\n", "no such key"),
    "too large": ("# " + "x" * MAX_YAML_BYTES, "has at most 1"),
    "two documents": ("a: 1\n---\nb: 2\n", "not a readable YAML"),
    "a NUL": ("a: \0\n", "not a readable YAML"),
    "a date that is none": ("a: 2024-99-99\n", "not a readable YAML"),
}


@pytest.mark.parametrize("case", YAML_REFUSED)
def test_yaml_that_would_do_harm_is_refused_in_no_time(case, tmp_path):
    text, message = YAML_REFUSED[case]
    path = tmp_path / "model.yml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(FileError, match=message) as error:
        read_yaml(path)
    assert time.process_time() - began < 5
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 700


def test_yaml_keeps_anchors_merges_numbers_and_interpolations_of_values(tmp_path):
    path = tmp_path / "model.yml"
    path.write_text(
        "base: &b {n: 2, lr: 1e-4}\nmodel:\n  <<: *b\n  n: 3\n  twice: ${model.n}\n  list: ${sizes}\nsizes: [1, 2]\n"
    )
    assert read_yaml(path)["model"] == {"n": 3, "lr": 1e-4, "twice": 3, "list": [1, 2]}


JSON_REFUSED = {
    "100,000 brackets": ("[" * 100_000, "nested too deeply"),
    "100,000 objects": ('{"a":' * 100_000, "nested too deeply"),
    "a key given twice": ('{"frames": 1, "frames": 2}', "'frames' is given twice"),
    "NaN": ('{"a": NaN}', "NaN is no JSON number"),
    "an infinite number": ('{"a": 1e999}', "out of range"),
    "a number of 5,000 digits": ('{"a": ' + "9" * 5_000 + "}", "does not fit into 64 bits"),
    "a number beyond 64 bits": ('{"a": 36893488147419103232}', "does not fit into 64 bits"),
    "an end too early": ('{"a": ', "not readable JSON"),
    "lists without end": ("[" + "[]," * 2**22 + "1]", "more than 4194304 lists"),
    "values without end": ("[" + "1," * 2**24 + "1]", "16777216 values"),
    "no UTF-8": ("\udcff", "not readable as UTF-8"),
}


@pytest.mark.parametrize("case", JSON_REFUSED)
def test_json_that_would_do_harm_is_refused(case, tmp_path):
    text, message = JSON_REFUSED[case]
    path = tmp_path / "clip.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FileError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 400


def test_a_folder_a_missing_and_a_large_file_are_told_apart(tmp_path):
    with pytest.raises(FileError, match="is a folder; give a clip's JSON"):
        read_json(tmp_path, "a clip's JSON")
    with pytest.raises(FileError, match="no such file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "large.json").write_text("[" + "1," * 600 + "1]")
    with pytest.raises(FileError, match="has at most"):
        read_json(tmp_path / "large.json", limit=1000)
    with pytest.raises(FileError, match="not a regular file"):
        read_json(type(tmp_path)("/dev/zero"))
