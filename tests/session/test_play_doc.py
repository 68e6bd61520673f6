"""The examples of docs/play.md and README.md run as they are printed."""

import re

import pytest

from harness.config import ROOT

EXAMPLES = {
    "docs/play.md": "torch.Size([128, 128, 3]) bf16 33",
    "README.md": "torch.Size([128, 128, 3]) bf16",
}
"""What each prints."""


def example(page):
    return re.search(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S).group(1)


@pytest.mark.parametrize("page", EXAMPLES)
def test_an_example_is_short(page):
    assert len(example(page).strip().splitlines()) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES)
def test_an_example_runs(page, capsys):
    exec(compile(example(page), page, "exec"), {})
    assert capsys.readouterr().out.strip() == EXAMPLES[page]
