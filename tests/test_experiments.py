"""Every named config of every group, and every experiment, runs on a tiny model or says why it cannot."""

import importlib.util
import itertools
import sys

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

from harness.config import ROOT, plan_run
from harness.report.record import load_record
from harness.run import cli, run

pytestmark = pytest.mark.usefixtures("no_flags")
GROUPS = {path.name: sorted(option.stem for option in path.glob("*.yaml")) for path in (ROOT / "conf").iterdir()}
TINY = ("model=smoke", "model.arch.n_heads=1", "model.arch.d_model=32", "model.window=4", "data.future_frames=2")
TINY += ("data.limit=1", "measure.videos=false", "measure.parts_frames=0")
LAYERS = "model.arch.n_layers=2"  # where no config names more of them

NEEDS = {
    ("attention", "fused"): "attention=fused",
    ("trainer", "gpu"): "no CUDA GPU is visible",
    ("trainer", "ddp"): "no CUDA GPU is visible",
}
"""Options that a machine without GPU refuses, and what they say."""


@pytest.fixture
def record(composed, tmp_path):
    def run_and_load(*words):
        run(composed(*TINY, *words))
        return load_record(tmp_path / "run" / "record.json")

    return run_and_load


def formats():
    """Each quant and each kv option at least once, in as few runs as that takes."""
    quants, caches = GROUPS["quant"], GROUPS["kv"]
    for turn in range(max(len(quants), len(caches))):
        yield quants[turn % len(quants)], caches[turn % len(caches)]


@pytest.mark.parametrize(("quant", "kv"), formats())
def test_every_format_runs(record, quant, kv):
    found = record(f"quant={quant}", f"kv={kv}", "measure.numerics_rows=4")
    assert found.status == "complete"
    assert found.choices["quant"] == quant
    assert len(found.arms) == (1 if (quant, kv) == ("bf16", "bf16") else 2)
    if quant != "bf16":
        assert found.arms["candidate"].transform.count > 0
    if (quant, kv) != ("bf16", "bf16"):
        assert 15 < found.quality.all.fidelity.psnr <= 100


@pytest.mark.parametrize("option", GROUPS["gates"])
def test_every_gate_judges_or_asks_for_what_it_compares_with(record, tmp_path, option):
    words = (LAYERS, "quant=mxfp8_mlp", "kv=mx_v_only", f"gates={option}")
    rules = yaml.safe_load((ROOT / "conf" / "gates" / f"{option}.yaml").read_text())
    if rules.get("against") == "record":
        with pytest.raises(ValueError, match=r"gates\.baseline"):
            record(*words)
        record(LAYERS, "quant=mxfp8_mlp")
        kept = (tmp_path / "run").rename(tmp_path / "kept") / "record.json"
        words += (f"gates.baseline={kept}",)
    found = record(*words)
    assert (found.gates is None) == (option == "none")
    if found.gates:
        assert found.gates.verdict in ("ship", "do not ship", "undecided")


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in ("attention", "compile", "sampler", "logger", "trainer") for option in GROUPS[group]],
)
def test_every_other_option_runs_or_says_why_not(record, composed, group, option, monkeypatch, tmp_path):
    if (group, option) == ("trainer", "ddp_cpu"):
        pytest.skip("starts processes: see test_ddp.py")
    if group == "logger" and option != "csv":
        pytest.skip("see test_loggers_get_a_line_per_clip")
    if (group, option) == ("attention", "fused") and importlib.util.find_spec("triton"):
        pytest.skip("Triton is here, in its interpreter without a GPU: see test_rollout_fused.py")
    words = [LAYERS, "kv=mx_v_only", f"{group}={option}"]
    if group == "compile":
        words.append("compile.backend=eager")  # Inductor itself: tests/rollout
    if (group, option) == ("trainer", "ddp") and torch.cuda.device_count() == 1:
        with pytest.raises(ValueError, match="torch sees 1 GPUs here"):
            plan_run(composed(*TINY, *words))
        return
    if (group, option) in NEEDS and not torch.cuda.is_available():
        with pytest.raises(ValueError, match=NEEDS[group, option]):
            plan_run(composed(*TINY, *words))
        return
    assert record(*words).status == "complete"


BIG = ("decoder.arch.ch_0=8", "decoder.arch.ch_max=128", "model.arch.n_layers=2", "model.arch.n_heads=1")
BIG += ("model.arch.d_model=32", "model.window=2", "data.future_frames=1", "data.limit=1", "measure.parts_frames=0")


@pytest.mark.parametrize("option", GROUPS["model"])
def test_every_model_runs_narrowed_where_it_is_large(composed, tmp_path, option):
    """With the decoder of its name."""
    words = ["quant=mxfp8_mlp", "kv=mx_v_only", "measure.videos=false", "measure.numerics_rows=0"]
    if option == "doom":
        words += ["sampler.window=2", "data.limit=1", "data.future_frames=1", "measure.parts_frames=0"]
    else:
        words += (*TINY[1:], LAYERS) if option == "smoke" else BIG
        words.append(f"model={option}")
    run(composed(*words))
    found = load_record(tmp_path / "run" / "record.json")
    assert (found.status, found.choices["decoder"]) == ("complete", option)
    assert found.data.source == ("clips" if option == "doom" else "synthetic")


@pytest.mark.parametrize("option", sorted(set(GROUPS["data"]) - {"doom", "clips"}))
def test_every_data_option_runs(record, tmp_path, option):
    """Recorded clips (`data=doom`, `data=clips`) run with the demo, and with a tiny one in tests/test_module.py."""
    words = [LAYERS, "kv=mx_v_only", f"data={option}"]
    if option == "owl_cache":
        actions = {"mouse": torch.zeros(6, 2), "button": torch.zeros(6, 11)}
        torch.save({"vid": torch.randn(6, 16, 4, 4), **actions}, tmp_path / "clip.pt")
        words.append(f"data.paths=[{tmp_path / 'clip.pt'}]")
    found = record(*words)
    assert (found.status, found.data.source, len(found.clips)) == ("complete", option, 1)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_both_arms_run_under_the_same_compilation(record, compile):
    """Formats are in place before anything is compiled, and cost neither breaks nor retraces."""
    backend = ["compile.backend=eager"] if compile == "on" else []
    words = ("model.arch.n_layers=1", "quant=mxfp4_attn_late8", "kv=mx_v_only", f"compile={compile}", *backend)
    found = record(*words, "data.limit=2", "measure.numerics_rows=0")
    bf16, candidate = (found.arms[name].compile for name in ("bf16", "candidate"))
    for name in ("enabled", "mode", "cuda_graph"):
        assert getattr(bf16, name) == getattr(candidate, name)
    for arm in (bf16, candidate):
        assert arm.enabled == (compile == "on") == (arm.graphs > 0)
        assert (arm.graph_breaks, arm.recompiles_after_warmup) == (0, 0)
        assert arm.cold_start_s > 0
    assert found.quality.all.fidelity.psnr < 80  # two models, not one


@pytest.mark.parametrize(
    ("words", "count", "path"),
    [
        (["quant=mxfp8_all", "quant.late_layers=1"], 8, "W8A16 E4M3"),
        (["quant=mxfp8_mlp", "quant.include=['*.0.attn.out']"], 5, "W8A16 E4M3"),
        (["quant=mxfp8_mlp", "quant.exclude=['*.blocks.0.*']"], 2, "W8A16 E4M3"),
        (["quant=mxfp4_mlp", "quant.include=['*.1.mlp.fc2']"], 4, "W4A16 E2M1"),
        (["quant=mxfp8_attn", "quant.scale_mode=floor", "quant.activation=mx"], 4, "W8A8 E4M3"),
        (["quant=mxfp8_attn", "quant.element_8bit=e5m2", "quant.kernel=emulated"], 4, "W8A16 E5M2"),
        (["quant=mxfp8_mlp", "quant.scope=modulation", "quant.scale_mode=even"], 8, "even scales"),
    ],
)
def test_fields_of_a_format_follow_the_command_line(record, words, count, path):
    candidate = record(LAYERS, *words).arms["candidate"]
    assert candidate.transform.count == count
    assert path in candidate.numeric_path.linears


def experiments():
    """Experiments of one run, and those that sweep."""
    for name in GROUPS["experiment"]:
        content = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
        yield name, content.get("hydra", {}).get("sweeper", {}).get("params")


@pytest.mark.parametrize("name", [name for name, swept in experiments() if not swept])
def test_every_experiment_of_one_run_composes_with_a_gate(composed, name):
    """They run in tests/test_guard.py, on recorded clips."""
    cfg = composed(*TINY, f"experiment={name}")
    if cfg.gates.against == "record":
        cfg.gates.baseline = "somewhere/record.json"
    conf = plan_run(cfg).conf
    assert conf.gates.enabled
    assert not conf.is_baseline


@pytest.mark.parametrize(("name", "swept"), [(name, swept) for name, swept in experiments() if swept])
def test_every_experiment_that_sweeps_names_configs_that_exist_and_runs(monkeypatch, tmp_path, name, swept):
    """Two jobs of its grid; each of its configs by itself runs above."""
    grid = {group: [value.strip() for value in str(values).split(",")] for group, values in swept.items()}
    for group, values in grid.items():
        assert set(values) <= set(GROUPS[group])
        assert len(set(values)) == len(values)
    part = [f"{group}={','.join(values[:2])}" for group, values in grid.items()]
    words = [*TINY, f"experiment={name}", *part, f"hydra.sweep.dir={tmp_path / 'sweep'}", "measure.numerics_rows=0"]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    cli()
    records = [load_record(path) for path in (tmp_path / "sweep").glob("*/record.json")]
    jobs = set(itertools.product(*(values[:2] for values in grid.values())))
    assert len(records) == len(jobs)
    assert {tuple(record.choices[group] for group in grid) for record in records} == jobs
    assert all(record.status == "complete" and record.gates for record in records)
