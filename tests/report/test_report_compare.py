"""The page of two runs."""

import html
import json
import re

from report_cases import NASTY, clip, record, write

from harness.commands.report import main
from harness.report.page.compare_page import compare_page
from harness.report.page.run_page import run_page
from harness.report.table import render


def compared(folder, first, second):
    return compare_page((first, folder / "a"), (second, folder / "b"), folder / "b")


def test_the_command_puts_two_runs_side_by_side(tmp_path, capsys):
    slow = record(candidate="mxfp4_mlp", factor=4.0, config={"seed": 1, "data": {"paths": ["clips"]}})
    write(tmp_path / "a", record(), videos=True)
    write(tmp_path / "b", slow, videos=True)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "b" / "comparison.html")
    text = (tmp_path / "b" / "comparison.html").read_text()
    rows = dict(re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", html.unescape(text)))
    assert re.findall(r">([^<]+)<", rows["Frames/s over BF16's, DiT"]) == ["0.50", "0.25", "-0.25"]
    assert re.findall(r">([^<]+)<", rows["Weights"]) == ["8.0 MiB", "4.0 MiB", "0.50×"]
    assert "<code>seed</code></td><td>0</td><td>1</td>" in text
    assert text.count('<figure class="chart lines"') == 8
    panels = json.loads(html.unescape(re.search(r'data-panels="([^"]*)"', text).group(1)))
    last = [(panel["label"], panel["video"], panel["column"], panel["columns"]) for panel in panels[-2:]]
    assert last == [("mxfp8_all (A)", 0, 2, 3), ("mxfp4_mlp (B)", 1, 2, 3)], "the swipe starts between the candidates"
    assert "Not alike" not in text


def test_what_makes_a_comparison_unfair_is_said(tmp_path):
    other = record(clips=[clip("walk", "motion")], environment={"gpu": None, "cpu": "another CPU", "packages": {}})
    text = compared(tmp_path, record(), other)
    assert "environment.cpu: a CPU against another CPU." in text
    assert "Clips: 1 in both runs, of 2 and 1." in text


def test_an_emulated_speed_is_no_figure_of_a_comparison(tmp_path):
    text = compared(tmp_path, record(emulated=True), record(emulated=True))
    assert "Frames/s over" not in text


def test_an_emulated_time_is_marked_and_its_difference_left_out(tmp_path):
    text = compared(tmp_path, record(), record(emulated=True))
    rows = dict(re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", html.unescape(text)))
    first, second, change = re.findall(r">([^<]+)<", rows["DiT, ms a frame, median"])
    assert (first.endswith("*"), second.endswith("*"), change) == (False, True, "–")
    assert "* emulated kernel: its speed says nothing about MX." in text
    assert "emulated kernel" not in compared(tmp_path, record(), record())


def test_runs_of_one_arm_failed_runs_and_hostile_text_compare(tmp_path):
    bare = record(status="failed", clips=[], quality=None, incidents=[{"kind": NASTY, "message": NASTY}])
    for first, second in ((bare, record(candidate=None)), (record(candidate=None), record(candidate=NASTY))):
        text = compared(tmp_path, first, second)
        assert text.count("<script>") == 1, "the page's own"
        assert "No clip has a video in both runs" in text


def test_runs_that_are_missing_are_one_line(tmp_path, capsys):
    write(tmp_path / "a", record())
    assert main([str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_incidents_that_say_the_same_are_one_line_of_the_table():
    same = [{"kind": "clip", "message": "cannot be read"}] * 2000
    text = render(record(incidents=[*same, {"kind": "clip", "message": "is empty"}]))
    assert text.count("cannot be read") == 1
    assert "Incident: clip: cannot be read (2000 times)" in text
    assert "Incident: clip: is empty\n" in text


def test_incidents_that_say_the_same_are_one_line_of_the_page(tmp_path):
    same = [{"kind": "clip", "message": "is cut off"}] * 1200
    text = run_page(record(incidents=[*same, {"kind": "clip", "message": "is empty"}]), tmp_path)
    assert text.count("is cut off") == 1
    assert "1200 times" in text
