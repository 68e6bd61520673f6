"""The microbenchmark on a CPU: what it times, what it checks first, and what it says when time runs out."""

import json

import pytest
import torch
from torch import nn

from harness.bench import inputs, linears, measuring, micro, rings
from harness.mx.linears.base import MXLinear
from harness.mx.weights import nearest
from harness.rollout.conf import AttentionKind

QUICK = ["--device", "cpu", "--model", "smoke", "--iterations", "1", "--warmup", "0"]


@pytest.fixture
def bench(monkeypatch):
    made = measuring.Bench(torch.device("cpu"), iterations=3, warmup=0, deadline=float("inf"), bandwidth=10.0)
    return made


def test_a_run_times_every_part_and_writes_every_figure(tmp_path, capsys, monkeypatch):
    # flex compiles for long; fused is refused on a CPU, and Triton's interpreter cannot multiply its BF16
    monkeypatch.setattr(rings, "AttentionKind", [AttentionKind.sdpa])
    out = tmp_path / "figures.json"
    assert micro.main([*QUICK, "--formats", "W8A16", "W4A8", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    assert {row["part"] for row in found["rows"]} == {"linear", "attention", "kv"}
    linears = [row for row in found["rows"] if row["part"] == "linear"]
    assert {row["variant"] for row in linears} == {"torch BF16", "W8A16 emulated", "W4A8 emulated"}
    assert all(row["us"] > 0 and row["of_bf16"] > 0 and row["floor_us"] > 0 for row in linears)
    assert all(row["error"] < 1e-2 for row in linears if row["variant"] != "torch BF16")
    attention = [row for row in found["rows"] if row["part"] == "attention" and row["variant"] == "sdpa"]
    assert [row["name"] for row in attention] == ["ring bf16", "ring mx_v_only", "ring mx_kv", "ring mxfp4_kv"]
    assert all(row["us"] > 0 and row["error"] == 0 for row in attention)
    assert "modulation, all layers" in capsys.readouterr().out


def test_products_are_those_of_a_frame():
    arch, window = inputs.read_model("dit_v4")
    assert window == 60
    shapes = {p.name: (p.m, p.k, p.n) for p in linears.products(arch, batch=4)}
    assert shapes["attn.qkv"] == (256, 1536, 4608)
    assert shapes["mlp.fc2"] == (256, 6144, 1536)
    assert shapes["adaln1.fc"] == (8, 1536, 3072)
    assert shapes["modulation, all layers"] == (8, 1536, 16 * 6 * 1536)


def test_a_model_may_be_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {channels: 8, n_layers: 2, n_heads: 2, d_model: 64, sample_size: 4, tokens_per_frame: 16}")
    assert inputs.read_model(str(file))[0].d_model == 64


def test_when_time_is_over_the_rest_is_said_to_be_missing(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert micro.main([*QUICK, "--seconds", "0", "--json", str(out)]) == 0
    assert not json.loads(out.read_text())["complete"]
    assert "was not measured" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(bench, monkeypatch):
    class Wrong(MXLinear):
        def forward(self, x):
            return 1.1 * super().forward(x)

    def wrong_ways(linear, fmt, device, everything):
        yield "wrong", Wrong(nearest(linear, fmt))

    monkeypatch.setattr(linears, "variants", wrong_ways)
    linears.bench_product(bench, linears.Product("p", 4, 64, 64), ["W4A16"], None, False)
    plain, wrong = bench.rows
    assert plain.us is not None
    assert wrong.us is None
    assert "WRONG" in wrong.note


def test_the_floor_counts_weight_input_and_output(bench):
    linear = nn.Linear(64, 32, bias=False).bfloat16().requires_grad_(False)
    row = measuring.Row("linear", "p", "", "", 32)
    linears.time_linear(bench, row, linear, linear.weight.nbytes, torch.zeros(8, 64).bfloat16(), None)
    assert row.floor_us == pytest.approx((64 * 32 + 8 * 64 + 8 * 32) * 2 / 10.0 / 1e3)
    assert row.of_bf16 == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "cuda"], "use --device cpu"), (["--iterations", "0"], "at least 1"), (["--formats", "W3"], "W8A16")],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        micro.main(arguments)
    assert message in capsys.readouterr().err
