"""Error of every MX Linear on real inputs, in the record of a run."""

import pytest

from harness.report.record import load_record
from harness.report.table import render
from harness.run import run

SMOKE = ("model=smoke", "model.arch.n_layers=2", "data.future_frames=2", "data.limit=1", "measure.videos=false")


@pytest.fixture
def record(composed, tmp_path):
    def run_and_load(*words):
        run(composed(*SMOKE, "measure.parts_frames=0", "overwrite=true", *words))
        return load_record(tmp_path / "run" / "record.json")

    return run_and_load


def test_every_mx_linear_has_its_error_against_float64(record):
    found = record("quant=mxfp8_all", "quant.activation=mx", "measure.numerics_rows=8")
    candidate, numerics = found.arms["candidate"], found.arms["candidate"].numerics
    assert found.arms["bf16"].numerics is None
    assert list(numerics.layers) == candidate.transform.names
    for layer in numerics.layers.values():
        assert 0 < layer.mae < layer.max
        assert 3 * layer.bf16.rel < layer.rel < 0.08
        assert layer.weight.scale_min <= layer.weight.scale_mean <= layer.weight.scale_max
        assert layer.activation.nan_blocks == 0
        assert 1 <= layer.rows <= 8
    assert {kind: counts.layers for kind, counts in numerics.categories.items()} == candidate.transform.categories
    worst = numerics.layers[numerics.worst]
    assert worst.rel == max(counts.rel_max for counts in numerics.categories.values())
    assert numerics.clip == found.clips[0].clip_id
    assert f"worst {numerics.worst}: relative" in render(found).replace("\n", " ")


def test_fewer_bits_mean_more_error_on_the_same_inputs(record):
    words = ("quant.enabled=true", "quant.scope=attn", "quant.include=['*.1.attn.out']")
    errors = [record(*words, f"quant.bits={bits}").arms["candidate"].numerics.layers for bits in (8, 4)]
    eight, four = errors
    assert set(eight) == set(four)
    for name in eight:
        assert four[name].rel > 2 * eight[name].rel
        assert four[name].bf16 == eight[name].bf16  # the same inputs, sampled from the BF16 arm


def test_it_is_not_measured_where_there_is_nothing_or_it_is_not_wanted(record):
    assert record("kv=mx_v_only").arms["candidate"].numerics is None
    assert record("quant=mxfp8_mlp", "measure.numerics_rows=0").arms["candidate"].numerics is None
