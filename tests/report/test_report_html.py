"""Pages of single runs, read as text; test_report_html_browser.py looks at them in a browser."""

import html
import json
import re

import pytest
from report_cases import NASTY, arm, clip, quality, record, write

from harness.commands.report import main
from harness.report.gates import GatesConf, evaluate
from harness.report.page.charts import Series, column_chart, line_chart, make_axis, nice_ticks, pareto
from harness.report.page.run_page import run_page, write_run_page
from harness.report.record import RecordError


def page(run_record, folder, **options):
    return run_page(run_record, folder, **options)


def test_a_run_without_gates_says_so_and_shows_its_figures(tmp_path):
    text = page(record(), tmp_path)
    assert "No gate was asked for" in text
    assert "+0.50 dB" in text
    assert "16.0 MiB → 8.0 MiB" in text
    assert "0.50×" in text
    assert text.count('<figure class="chart lines"') == 8, "PSNR, SSIM and both fidelities, for motion and stand still"
    assert "A CPU run." in text
    assert "run.py quant=mxfp8_all" in text


def test_the_command_of_a_run_can_be_typed_again(tmp_path):
    words = ["harness/run.py", "quant=mxfp8_all", "data.paths=[my clips/a.mp4]"]
    text = html.unescape(page(record(command=words), tmp_path))
    assert "<pre class=\"command\">python harness/run.py quant=mxfp8_all 'data.paths=[my clips/a.mp4]'</pre>" in text
    installed = page(record(command=["/usr/bin/mx-world", "run"]), tmp_path)
    assert '<pre class="command">/usr/bin/mx-world run</pre>' in installed


def test_what_psnr_hides_stands_beside_the_curves(tmp_path):
    looks = {"sharpness": 0.8123, "texture": 4.5, "action_fidelity": None}
    lost = {"sharpness": 0.2, "texture": 1.5, "action_fidelity": None}
    shown = quality()
    shown["all"]["appearance"] = {"bf16": looks, "candidate": {**looks, "sharpness": 0.6123}, "drop": lost}
    text = page(record(quality=shown), tmp_path)
    assert "sharpness<small>1 = as the recording</small>" in text
    assert all(figure in text for figure in ("0.812", "0.612", "+0.200"))
    assert "action fidelity" not in text, "nothing moved, so there is no figure"


def test_nothing_in_the_page_points_outside_of_it(tmp_path):
    text = write_run_page(write(tmp_path, record(), videos=True)).read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text) == []
    assert "@import" not in text
    assert "url(" not in text


def test_gates_are_shown_with_margin_interval_and_status(tmp_path):
    run_record = record(emulated=True)
    conf = GatesConf(enabled=True, title="Gate A", max_psnr_drop=-1.0, max_ssim_drop=0.5, min_fps_ratio=0.97)
    run_record.gates = evaluate(run_record, conf)
    text = page(run_record, tmp_path)
    assert "Do not ship" in text
    assert "Gate A, against BF16" in text
    rows = dict(re.findall(r"<tr><td>([^<]*?)(?:<small.*?)?</td>.*?<span class=\"chip (\w+)\">", text))
    assert rows["PSNR drop dB"] == "fail"
    assert rows["SSIM drop"] == "pass"
    assert rows["FPS ratio (pipeline_fps)"] == "not_measured"
    assert "≤ -1" in text
    assert '<td class="n" data-label="margin">-1.35</td>' in text
    assert "-0.597 … 1.3" in text, "Student's interval of the two clips' drops, 0.35 ± 6.314 · 0.15"
    assert "PSNR drop 0.350 dB (-0.597 to 1.297), at most -1 dB allowed." in text, "why, in a sentence"
    assert "Next: " in text
    axis = text[text.index('<div class="axis"') :].partition("</div>")[0]
    left = {name: float(at) for name, at in re.findall(r'<i class="([a-z ]+)" style="left:([\d.]+)%', axis)}
    assert left["limit"] < left["range fail"] < left["point"], "threshold, interval and figure on one axis"


@pytest.mark.parametrize(
    ("thresholds", "title", "kind"),
    [({"max_psnr_drop": 2.0}, "May ship", "pass"), ({"max_psnr_drop": 1.0, "min_clips": 9}, "Undecided", "open")],
)
def test_the_verdict_of_the_gates_is_the_pages_headline(tmp_path, thresholds, title, kind):
    run_record = record()
    run_record.gates = evaluate(run_record, GatesConf(enabled=True, **thresholds))
    assert re.search(rf'class="verdict {kind}">\s*<div class="ruling"><strong>{title}<', page(run_record, tmp_path))


def test_an_emulated_kernels_speed_is_never_a_headline(tmp_path):
    text = page(record(emulated=True), tmp_path)
    tile = re.search(r"<span>Speed</span><b>(.*?)</b><small>(.*?)</small>", text)
    assert tile.group(1) == "not measured"
    assert "its speed says nothing about MX" in tile.group(2)
    assert 'bar s-cand hatched"' in text
    native = page(record(), tmp_path)
    assert 'bar s-cand hatched"' not in native
    assert "says nothing about MX" not in native


def test_a_lone_baseline_has_nothing_to_judge(tmp_path):
    text = page(record(candidate=None), tmp_path)
    assert "BF16 alone ran" in text
    assert "PSNR drop" not in text
    assert text.count('<figure class="chart lines"') == 4


def test_a_failed_run_names_its_error_and_keeps_what_it_has(tmp_path):
    incident = {"kind": "NonFiniteError", "message": "arm candidate: clip walk has NaN in frame 3"}
    text = page(record(status="failed", incidents=[incident]), tmp_path)
    assert "Run failed" in text
    assert "clip walk has NaN in frame 3" in text
    assert '<figure class="chart lines"' in text
    bare = page(record(status="failed", incidents=[incident], clips=[], quality=None), tmp_path)
    assert "none was finished" in bare
    assert "<figure" not in bare


def test_fidelity_alone_is_shown_where_there_is_no_recording(tmp_path):
    text = page(record(quality=quality(recording=False)), tmp_path)
    assert "Fidelity: PSNR of candidate against BF16" in text
    assert "against the recording" not in text


def test_text_from_a_record_is_never_markup(tmp_path):
    nasty = record(
        candidate=NASTY,
        clips=[clip(NASTY, "motion")],
        incidents=[{"kind": NASTY, "message": NASTY}],
        notes=[NASTY],
        overrides=[NASTY],
        config={NASTY: NASTY},
        run_id=NASTY,
    )
    text = page(nasty, tmp_path)
    assert "<script>window" not in text
    assert text.count("<script>") == 1, "the page's own"
    assert "&lt;script&gt;window.hacked" in text


def test_videos_travel_inside_the_page_while_they_are_small_and_are_linked_beyond(tmp_path):
    folder = write(tmp_path, record(), videos=True)
    inside = page(record(), folder)
    assert inside.count('data-src="data:video/mp4;base64,') == 2
    linked = page(record(), folder, embed_limit=100)
    assert 'src="videos/walk.mp4"' in linked
    assert "too large to travel inside this page" in linked
    assert "base64" not in linked


def test_a_video_that_is_missing_or_lies_outside_the_run_is_not_shown(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    outside = {**clip("walk", "motion"), "video": "../secret.mp4"}
    text = page(record(clips=[outside, clip("gone", "motion")]), tmp_path / "run")
    assert "<video" not in text
    assert "Not found: ../secret.mp4, videos/gone.mp4" in text


def test_errors_of_linears_and_kv_statistics_are_shown_where_the_record_has_them(tmp_path):
    assert "did not sample" in page(record(), tmp_path)
    layers = [
        {"layer": layer, "tensor": "v", "format": "e4m3", "saturated_share": 0.001, "log2_scale_min": -9.0}
        | {"log2_scale_mean": -8.0, "log2_scale_max": None, "elements": 1000, "saturated": 1, "nonfinite": 0}
        | {"over_time": {f"log2_scale_{what}": [None, None] for what in ("min", "mean", "max")}}
        for layer in (0, 2)
    ]
    for one in layers:
        one["over_time"]["saturated_share"] = [0.001, 0.0]
    candidate = arm("mx_v_only") | {"kv_stats": {"frames": [6, 7], "layers": layers, "nonfinite": []}}
    text = page(record(arms={"bf16": arm("BF16"), "candidate": candidate}), tmp_path)
    assert "Saturated elements, share by layer" in text
    assert "layer 2 V" in text
    error = {"mae": 0.001, "rel": 0.02, "max": 0.1, "sqnr_db": 34.0}
    used = {"saturated": 0, "saturated_fraction": 0.0, "scale_min": 1.0, "scale_mean": 1.0, "scale_max": 1.0}
    used |= {"nan_blocks": 0, "clipped": 0}
    errors = {**error, "category": "mlp", "rows": 64, "in_features": 64, "out_features": 64, "weight": used}
    errors["bf16"] = {**error, "rel": 0.002}
    numerics = {
        "method": "64 rows, against float64",
        "layers": {"blocks.0.mlp.fc1": errors, "blocks.0.mlp.fc2": {**errors, "rel": None}},
        "categories": {"mlp": {"layers": 2, "rel_mean": None, "rel_max": None}},
        "clip": "walk",
        "worst": "blocks.0.mlp.fc1",
    }
    text = page(record(arms={"bf16": arm("BF16"), "candidate": arm("mxfp8_all") | {"numerics": numerics}}), tmp_path)
    assert "64 rows, against float64" in text
    assert text.count('class="column c-mlp"') == 1, "an error that is not finite has no column"
    assert "Relative error of each Linear" in text
    assert "blocks.0.mlp.fc1" in text
    assert "did not sample" not in text


def test_the_command_rebuilds_a_page_and_says_what_it_lacks(tmp_path, capsys):
    write(tmp_path / "run", record())
    assert main([str(tmp_path / "run")]) == 0
    assert "No gate was asked for" in (tmp_path / "run" / "report.html").read_text()
    assert main([str(tmp_path)]) == 2
    assert "record.json: no such file" in capsys.readouterr().err
    with pytest.raises(RecordError):
        write_run_page(tmp_path)


def test_ticks_are_round_and_within():
    assert nice_ticks(0, 31, 8) == [0, 5, 10, 15, 20, 25, 30]
    assert nice_ticks(0.97, 1.0, 4) == [0.97, 0.98, 0.99, 1.0]
    flat = make_axis([3.0, 3.0], 0, 100)
    assert flat.low < 3 < flat.high


def test_a_gap_in_a_line_stays_a_gap():
    chart = str(line_chart("t", [Series("a", [1.0, None, 2.0, 3.0], "s-fid")], "dB"))
    path = re.search(r'class="line s-fid" d="([^"]*)"', chart).group(1)
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_the_front_holds_what_nothing_beats():
    assert pareto([(1, 5), (2, 4), (2, 5), (3, 1), (0, 0)]) == [False, False, True, True, False]
    assert pareto([(1, 1), (1, 1)]) == [True, True]


def test_columns_start_at_zero_unless_they_differ_by_magnitudes():
    def heights(*values):
        chart = str(column_chart("t", ["x"] * len(values), {"rel": values}, "rel", ["c-mlp"] * len(values)))
        return [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]*)"', chart)]

    small, large = heights(0.01, 0.1)
    assert large == pytest.approx(10 * small, rel=0.02)
    small, middle, large = heights(1e-5, 1e-3, 1e-1)
    assert large - middle == pytest.approx(middle - small, abs=0.2)
    assert min(small, middle) > 0


def test_every_clip_is_a_faint_line_of_every_quality_chart(tmp_path):
    text = page(record(clips=[clip(name, "motion") for name in ("a", "b", "c")]), tmp_path)
    motion = text[text.index("<h3>Motion") : text.index("<h3>Stand still")]
    for style, charts in (("s-bf16", 2), ("s-cand", 2), ("s-fid", 2)):
        for name in ("a", "b", "c"):
            assert motion.count(f'class="line {style} faint" data-clip="{name}"') == charts
    many = page(record(clips=[clip(f"c{number}", "motion") for number in range(1001)]), tmp_path)
    assert 0 < many.count('class="line s-fid faint"') <= 2 * 100, "a page stays small"


def test_columns_are_labelled_by_the_layer_in_their_names():
    names = [f"blocks.{layer}.{linear}" for layer in (0, 1, 12) for linear in ("attn.q", "mlp.fc1")] + ["head2"]
    chart = str(column_chart("t", names, {"rel": [0.1] * 7}, "rel", ["c-mlp"] * 7))
    assert re.findall(r'text-anchor="middle">([^<]*)<', chart) == ["0", "1", "12"]
    assert chart.count('class="layer"') == 3


@pytest.mark.parametrize(("arms", "recording"), [(("candidate",), True), (("bf16",), True), (("candidate",), False)])
def test_the_stage_knows_what_is_in_a_video_of_fewer_arms(tmp_path, arms, recording):
    run_record = record()
    run_record.arms = {name: found for name, found in run_record.arms.items() if name in arms}
    for found in run_record.clips:
        found.scores = {name: scores for name, scores in found.scores.items() if recording and name in arms}
    folder = write(tmp_path, run_record, videos=True)
    text = page(run_record, folder)
    panels = json.loads(html.unescape(re.search(r'data-panels="([^"]*)"', text).group(1)))
    names = ["recording"] * recording + [run_record.arms[name].label for name in arms]
    assert [panel["label"] for panel in panels] == names
    assert {panel["columns"] for panel in panels} == {len(names)}


@pytest.mark.parametrize(
    ("changes", "sentence", "command"),
    [
        ({}, "loses 0.50 dB PSNR against BF16 and matches it to 41.5 dB", "record.json --gates default"),
        ({"candidate": None, "overrides": ["model=doom"]}, "BF16 alone ran", "run.py model=doom quant=mxfp8_all"),
        ({"status": "failed", "incidents": [{"kind": "Boom", "message": "it broke"}]}, "it broke", "quant=mxfp8_all"),
    ],
)
def test_a_run_that_no_gate_judged_says_what_it_found_and_what_to_do(tmp_path, changes, sentence, command):
    top = page(record(**changes), tmp_path).partition('<div class="tiles">')[0]
    assert sentence in top
    assert re.search(rf'<pre class="command">[^<]*{re.escape(command)}</pre>', top)
