"""A sweep's page, from folders as a multirun leaves them, and the hook that writes it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from report_cases import NASTY, quality, record, write

from harness.commands.report import main
from harness.report.page.sweep_verdict import sweep_verdict
from harness.report.sections import Memory
from harness.report.sweep import SweepError, read_sweep, write_sweep_page
from harness.report.verdict import Advice, Verdict

# A job script with the hook of conf/run.yaml, quick because it has no model: job 1 fails, job 2 kills its process.
JOB = """
import os, sys
import hydra
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from report_cases import record, write

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.what == "fail":
        raise RuntimeError("out of luck")
    if cfg.what == "kill":
        sys.exit(7)
    write(folder, record())

main()
"""


def job(sweep, number, overrides, run_record=None, error=None):
    folder = sweep / f"{number}_{overrides[0].replace('=', '_')}"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*overrides, "data.limit=1"]))
    if run_record is not None:
        write(folder, run_record)
    if error is not None:
        (folder / "error.txt").write_text(error)
    return folder


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    job(folder, 0, ["quant=bf16"], record(candidate=None))
    job(folder, 1, ["quant=mxfp8_all"], record(factor=0.5))
    job(folder, 2, ["quant=mxfp4_all"], record(candidate="mxfp4_all", emulated=True, factor=4.0))
    job(folder, 3, ["quant=oops"], error="quant: no such thing " + NASTY)
    job(folder, 4, ["quant=killed"])
    incident = {"kind": "NonFiniteError", "message": "NaN in frame 3"}
    broken = record(candidate="broken", status="failed", incidents=[incident], quality=None, clips=[])
    job(folder, 10, ["quant=broken"], broken)
    (folder / "notes").mkdir()
    return folder


def rows(text):
    return re.findall(r"<tr><td>(.*?)</tr>", text.partition("<tbody>")[2])


def test_every_run_is_listed_in_order_with_its_state_and_failures_with_their_reason(sweep):
    runs = read_sweep(sweep)
    assert [run.overrides for run in runs] == [
        [f"quant={name}"] for name in ("bf16", "mxfp8_all", "mxfp4_all", "oops", "killed", "broken")
    ], "in order of job numbers, without what all share"
    assert [bool(run.reason) for run in runs] == [False, False, False, True, True, True]
    text = write_sweep_page(sweep).read_text()
    assert [re.search(r'chip (\w+)"', row).group(1) for row in rows(text)] == ["complete"] * 3 + ["failed"] * 3
    for reason in ("no such thing", "was killed before its first clip was finished", "NaN in frame 3"):
        assert reason in text
    assert "3 failed" in text
    assert "<script>window" not in text


def test_the_fronts_join_what_nothing_beats_and_leave_emulated_speed_out(sweep):
    text = write_sweep_page(sweep).read_text()
    plots = dict(re.findall(r"<figcaption><span>(.*?)</span></figcaption>(<svg.*?</svg>)", text, re.DOTALL))
    assert list(plots) == [
        f"{quality} against {cost}" for quality in ("PSNR drop", "Fidelity to BF16") for cost in ("speed", "memory")
    ]
    dots = re.findall(r'class="(dot [^"]*)".*?data-tip="(\S*)', plots["PSNR drop against speed"])
    assert [(name, "on-front" in style, "hollow" in style) for style, name in dots] == [
        ("mxfp8_all", True, False),
        ("mxfp4_all", False, True),
        ("BF16", True, False),
    ]
    assert 'class="front"' in plots["PSNR drop against speed"]
    assert "hollow" not in plots["PSNR drop against memory"], "memory is real, whatever the kernel"


def test_runs_link_to_their_pages_once_they_have_one(sweep):
    assert "_mxfp8_all/report.html" not in write_sweep_page(sweep).read_text()
    assert main(["--sweep", str(sweep)]) == 0
    text = (sweep / "report.html").read_text()
    assert '<a href="1_quant_mxfp8_all/report.html">mxfp8_all</a>' in text
    assert (sweep / "1_quant_mxfp8_all" / "report.html").is_file()


def test_runs_of_one_name_are_told_apart_in_the_plots(tmp_path):
    for number, mode in enumerate(("floor", "rceil")):
        job(
            tmp_path / "sweep", number, ["quant=mxfp8_all", f"quant.scale_mode={mode}", "quant.late_layers=4"], record()
        )
    job(tmp_path / "sweep", 2, ["quant=mxfp8_all", "quant.scale_mode=rceil", "quant.late_layers=8"], record())
    text = write_sweep_page(tmp_path / "sweep").read_text()
    name = read_sweep(tmp_path / "sweep")[0].name
    for label in ("floor, late_layers=4", "rceil, late_layers=4", "rceil, late_layers=8"):
        assert f"{name}, {label}" in text


def test_columns_that_no_run_fills_are_left_out(tmp_path):
    job(tmp_path, 0, ["quant=a"], record(quality=quality(recording=False)))
    text = write_sweep_page(tmp_path).read_text()
    assert "fidelity dB</th>" in text
    assert "drop dB</th>" not in text
    assert "peak allocated</th>" not in text


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    with pytest.raises(SweepError, match="no runs here"):
        read_sweep(tmp_path)
    assert main(["--sweep", str(tmp_path / "missing")]) == 2
    assert "no runs here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("jobs", "failed"), [("good,good2", []), ("good,fail,good2", ["RuntimeError: out of luck"]), ("good,kill", [None])]
)
def test_a_multirun_ends_with_its_page_whatever_becomes_of_its_jobs(tmp_path, jobs, failed):
    (tmp_path / "job.py").write_text(JOB)
    cases = Path(__file__).parents[1]
    words = [f"+what={jobs}", "hydra.sweep.dir=out", "hydra.sweep.subdir=${hydra:job.num}"]
    words += ["+hydra.callbacks.sweep_page._target_=harness.report.sweep.SweepPage"]
    done = subprocess.run(
        [sys.executable, "job.py", "-m", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{cases.parent}:{cases}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode != 0) == bool(failed), done.stderr
    assert (tmp_path / "out" / "report.html").is_file(), done.stdout + done.stderr
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count('chip complete"') == jobs.count("good")
    for reason in failed:
        assert (reason or "was killed before its first clip was finished") in text


def test_other_clips_or_another_model_have_a_front_of_their_own(tmp_path):
    folder = tmp_path / "sweep"
    one, other = record(factor=0.5), record(candidate="mxfp4_all")
    other.clips = other.clips[:1]
    job(folder, 0, ["quant=mxfp8_all"], one)
    job(folder, 1, ["data.limit=1"], other)
    text = write_sweep_page(folder).read_text()
    titles = re.findall(r"<figcaption><span>(.*?)</span></figcaption>", text)
    assert any("smoke, 2 clips" in title for title in titles)
    assert any("smoke, 1 clips" in title for title in titles)
    assert all("clips ×" in title for title in titles)


def judged(name, verdict, drop, held):
    ruling = Verdict("Gate", "BF16", None, verdict, reason=f"why {name}", next=Advice(f"do {name}"))
    found = record(candidate=name)
    found.arms["candidate"].memory = Memory(held, 0, kv_peak_bytes=0)
    found.quality.all.drop.psnr = drop
    return name, f"{name}/report.html", found, ruling


def test_a_sweep_names_the_smallest_that_ships_or_what_is_nearest_to_it():
    small, large = judged("small", "ship", 0.2, 100), judged("large", "ship", 0.1, 200)
    open_, wrong = judged("open", "undecided", 0.3, 50), judged("wrong", "do not ship", 0.01, 10)
    found = sweep_verdict([large, small, open_, wrong], 5)
    assert (found["kind"], found["title"], found["next"].text) == ("pass", "small may ship", "do small")
    assert found["sentence"].startswith("Of 5 configurations 2 may ship.")
    found = sweep_verdict([open_, wrong], 2)
    assert (found["kind"], found["page"]) == ("open", "open/report.html")
    assert "1 is undecided and 1 does not ship. Nearest is open: why open." in found["sentence"]
    assert sweep_verdict([wrong], 1)["title"] == "None may ship"
    assert sweep_verdict([], 3)["kind"] == "none"
