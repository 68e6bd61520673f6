import subprocess
import sys

from harness.config import ROOT
from harness.report.record import load_record


def test_a_real_multirun_runs_the_whole_grid(tmp_path):
    words = ["quant=bf16,mxfp8_all,mxfp4_mlp", "kv=bf16,mx_v_only", "data.limit=1", "data.future_frames=2"]
    words += ["model=smoke", "model.arch.n_layers=2", "measure.parts_frames=0"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "harness" / "run.py"), "-m", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "multirun").iterdir()
    records = [load_record(path) for path in sorted(sweep.glob("*/record.json"))]
    grid = [(record.choices["quant"], record.choices["kv"]) for record in records]
    assert grid == [(q, k) for q in ("bf16", "mxfp8_all", "mxfp4_mlp") for k in ("bf16", "mx_v_only")]
    assert all(record.status == "complete" for record in records)
    assert [len(record.arms) for record in records] == [1, 2, 2, 2, 2, 2]
