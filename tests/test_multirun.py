import sys

from hydra.core.global_hydra import GlobalHydra

from harness.report.record import load_record
from harness.run import cli


def test_a_real_multirun_runs_the_whole_grid(tmp_path, monkeypatch):
    words = ["quant=bf16,mxfp8_all,mxfp4_mlp", "kv=bf16,mx_v_only", "data.limit=1", "data.future_frames=2"]
    words += ["model=smoke", "model.arch.n_layers=2", "measure.parts_frames=0"]
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", *words])
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    cli()
    (sweep,) = (tmp_path / "outputs" / "multirun").iterdir()
    records = [load_record(path) for path in sorted(sweep.glob("*/record.json"))]
    grid = [(record.choices["quant"], record.choices["kv"]) for record in records]
    assert grid == [(q, k) for q in ("bf16", "mxfp8_all", "mxfp4_mlp") for k in ("bf16", "mx_v_only")]
    assert all(record.status == "complete" for record in records)
    assert [len(record.arms) for record in records] == [1, 2, 2, 2, 2, 2]
