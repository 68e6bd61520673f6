"""The example of docs/play.md runs as it is printed."""

import re

import pytest

from harness.config import ROOT

DOC = ROOT / "docs" / "play.md"


def example():
    return re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S).group(1)


def test_the_example_is_short():
    assert len(example().strip().splitlines()) <= 15


@pytest.mark.slow
def test_the_example_runs(capsys):
    exec(compile(example(), str(DOC), "exec"), {})
    assert capsys.readouterr().out.strip() == "torch.Size([128, 128, 3]) bf16 33"
