"""A page or table of which one part cannot be drawn has all others, and says what is missing and why."""

import dataclasses
import itertools
import json
import math
import re

import pytest
from report_cases import record, write

from harness.report.codec import read
from harness.report.page.compare_page import compare_page
from harness.report.page.run_page import NAV, run_page, write_run_page
from harness.report.record import RunRecord
from harness.report.sections import Memory
from harness.report.sweep import Run, sweep_page
from harness.report.table import render

BROKEN = (None, math.nan, math.inf, -math.inf, [], "", {})
KV_ROW = {
    "layer": 0,
    "tensor": "v",
    "format": "e4m3",
    "elements": 100,
    "saturated": 1,
    "saturated_share": 0.01,
    "nonfinite": 0,
    "log2_scale_min": -9.0,
    "log2_scale_mean": -8.0,
    "log2_scale_max": -7.0,
    "over_time": {
        "saturated_share": [0.01, 0.02],
        "log2_scale_min": [-9.0, -9.0],
        "log2_scale_mean": [-8.0, -8.1],
        "log2_scale_max": [-7.0, -7.0],
    },
}
ERROR = {"rel": 0.02, "mae": 0.01, "max": 0.1, "sqnr_db": 30.0}
USED = {"saturated": 0, "saturated_fraction": 0.0, "scale_min": 1.0, "scale_mean": 1.0, "scale_max": 1.0}
LINEAR = {"category": "mlp", "rows": 8, "in_features": 64, "out_features": 64, "bf16": ERROR, **ERROR}


def full():
    """A record with every section."""
    content = json.loads(json.dumps(dataclasses.asdict(record())))  # no two sections share a list
    candidate = content["arms"]["candidate"]
    error = LINEAR | {"weight": USED | {"nan_blocks": 0, "clipped": 0}}
    means = {"mlp": {"layers": 1, "rel_mean": 0.02, "rel_max": 0.02}}
    candidate["numerics"] = {"method": "sampled", "layers": {"blocks.0.mlp.fc1": error}, "categories": means}
    candidate["numerics"] |= {"clip": "walk", "worst": "blocks.0.mlp.fc1"}
    candidate["kv_stats"] = {"frames": [3, 4], "layers": [KV_ROW], "nonfinite": []}
    return read(RunRecord, content)


def leaves(value, path=()):
    if dataclasses.is_dataclass(value):
        value = vars(value)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, one in inner for leaf in leaves(one, (*path, key))]
    return [path, *found] if path else found


def put(content, path, value):
    *way, last = path
    for key in way:
        content = getattr(content, key) if dataclasses.is_dataclass(content) else content[key]
    if dataclasses.is_dataclass(content):
        object.__setattr__(content, last, value)  # frozen or not
    else:
        content[last] = value


def undrawn(page):
    return re.findall(r'<p class="warn undrawn">([^<]*)', page)


def test_a_whole_page_has_nothing_undrawn(tmp_path):
    page = run_page(full(), tmp_path)
    assert undrawn(page) == []
    assert page.count("<figure") == 13


def test_whatever_a_record_holds_in_one_place_its_page_has_the_other_parts(tmp_path):
    """None, NaN, infinities and empty things in the place of every value, of whatever type that is."""
    values = itertools.cycle(BROKEN)
    lost = {}
    for path in leaves(full()):
        content = full()
        put(content, path, next(values))
        if path[0] == "arms" and len(path) < 3:
            continue  # the arms are what a run is about
        page = run_page(content, tmp_path)
        assert all(f'id="{section}"' in page for section in NAV), path
        lost[path] = undrawn(page)
    assert len(lost) > 300
    small = {path: one for path, one in lost.items() if len(path) > 2}
    assert max(map(len, small.values())) <= 4, {path: one for path, one in small.items() if len(one) > 4}


@pytest.mark.parametrize(
    ("path", "value", "said", "still"),
    [
        (("arms", "candidate", "kv_stats", "layers"), [{}], "AttributeError: ", "Relative error of each Linear"),
        (("quality", "by_tag", "motion", "bf16", "curve", "psnr"), [math.nan] * 3, "", "SSIM against the recording"),
        (("config",), {"a": object()}, "RepresenterError", "Relative error of each Linear"),
        (("data", "future_frames"), {}, "", "Relative error of each Linear"),
    ],
)
def test_what_cannot_be_drawn_says_why_in_its_place(tmp_path, path, value, said, still):
    content = full()
    put(content, path, value)
    page = run_page(content, tmp_path)
    assert said in " ".join(undrawn(page))
    assert still in page


def test_a_curve_without_a_finite_figure_says_so_and_nan_within_one_is_a_gap(tmp_path):
    content = full()
    quality = content.quality.by_tag["motion"]
    quality.fidelity.curve.psnr = [math.nan] * 8
    content.clips = content.clips[:1]
    quality.bf16.curve.psnr[2] = math.nan
    page = run_page(content, tmp_path)
    assert undrawn(page) == [
        "Fidelity: PSNR of candidate against BF16 could not be drawn: ValueError: none of its figures is a finite "
        "number."
    ]
    line = re.search(r'<path class="line s-bf16" d="([^"]*)"', page)[1]
    assert line.count("M") == 2, "the pen is lifted at the gap"
    assert "nan" not in line


def test_one_clip_and_no_clip_are_drawn(tmp_path):
    for count in (0, 1):
        content = full()
        content.clips = content.clips[:count]
        if not count:
            content.quality = content.drift = None
        assert undrawn(run_page(content, tmp_path)) == []


def test_a_video_that_cannot_be_shown_leaves_the_others(tmp_path):
    folder = write(tmp_path, record(), videos=True)
    (folder / "videos" / "walk.mp4").unlink()
    page = write_run_page(folder).read_text()
    assert "Not found: videos/walk.mp4" in page
    assert page.count("<video") == page.count('<figure class="player"') >= 1


def test_two_runs_are_compared_as_far_as_they_can_be(tmp_path):
    content = full()
    content.config = None
    page = compare_page((full(), tmp_path), (content, tmp_path), tmp_path)
    assert len(undrawn(page)) == 1
    assert "PSNR drop, dB" in page


def test_a_sweep_with_one_broken_record_shows_the_others(tmp_path):
    content = full()
    content.arms["candidate"].memory = Memory("many", 1, kv_peak_bytes=1)
    runs = [Run(tmp_path / "0_good", [], full(), ""), Run(tmp_path / "1_bad", [], content, "")]
    page = sweep_page("sweep", runs)
    assert any(text.startswith("Not in the table: 1_bad (TypeError") for text in undrawn(page))
    assert "<td>mxfp8_all" in page


def test_a_table_says_which_of_its_parts_is_missing():
    broken = record()
    speed = broken.arms["candidate"].speed
    speed.dit_ms = dataclasses.replace(speed.dit_ms, median="fast")
    text = render(broken)
    assert "speed could not be shown: ValueError" in text
    assert "PSNR dB" in text
    assert "weights" in text


def test_text_of_a_record_is_no_markup_of_the_table():
    odd = record()
    odd.data.summary = "[/b] four [red]clips"
    odd.arms["candidate"].label = "[/x]"
    text = render(odd)
    assert "[/b] four [red]clips" in text
    assert "[/x]" in text
