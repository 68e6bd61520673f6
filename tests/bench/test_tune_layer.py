"""What needs no GPU: that it says so, and what it would time."""

import json
from types import SimpleNamespace

import pytest
import torch

from harness.bench import tune_cuda, tune_layer
from harness.kernels.cuda.linear import PackedBF16Linear
from harness.kv import KVStorage
from harness.models.gamerft import GameRFTConfig, GameRFTCore


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        tune_layer.main([])
    assert ended.value.code == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err


def test_many_rows_have_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tune_layer.main(["--batch", "5"]) == 2
    assert "--batch 5: 320 rows; of more than 256 weights are unpacked" in capsys.readouterr().err
    packed = PackedBF16Linear.from_linear(torch.nn.Linear(64, 64).bfloat16())
    note = tune_cuda.tune(None, packed, torch.zeros(257, 64).bfloat16())
    assert note == "nothing to tune: of 257 rows the weight is unpacked for a library's product"


def test_formats_of_every_width_are_known():
    assert tune_layer.FORMAT_OF_BITS.keys() == {4, 8, 16}
    assert {name for name in tune_layer.FORMAT_OF_BITS.values() if name} <= tune_layer.FORMATS.keys()


@pytest.mark.parametrize("bits", tune_layer.FORMAT_OF_BITS)
def test_layers_have_every_linear_in_the_kernels_form_and_full_rings(bits):
    cfg = GameRFTConfig(n_layers=3, n_heads=2, d_model=64, channels=8, sample_size=4, tokens_per_frame=16, n_frames=64)
    core = GameRFTCore(cfg).requires_grad_(False).bfloat16()
    layers = tune_layer.Layers(core, 5, bits, 1, KVStorage.bf16)
    for name in tune_layer.NAMES:
        found = layers.linears(name)
        assert [linear.shape(16).bits for linear in found] == [bits] * 3
    assert all(block.mlp.fc1.silu for block in layers.blocks)
    assert layers.x.shape == (1, 16, 64)


def test_both_ways_of_attention_take_turns(capsys):
    attend, order = SimpleNamespace(join=None), []

    def time():
        order.append(attend.join)
        return 30.0 if attend.join else 40.0

    figures = tune_layer.compare("a model", SimpleNamespace(attend=attend, time=time))
    assert order == [True, False] * tune_layer.ROUNDS
    assert figures == {"one launch": [30.0] * 3, "two launches": [40.0] * 3}
    assert "in one launch 30.00, 30.00, 30.00; in two 40.00" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_compares_one_launch_with_two(tmp_path):
    out = tmp_path / "compared.json"
    assert tune_layer.main(["--bits", "4", "--layers", "2", "--kv", "mx", "--compare", "--json", str(out)]) == 0
    (figures,) = json.loads(out.read_text())
    assert all(us > 0 for way in ("one launch", "two launches") for us in figures[way])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_finds_what_is_no_slower(tmp_path, capsys):
    out = tmp_path / "found.json"
    words = ["--bits", "4", "--layers", "2", "--most", "6", "--seconds", "20", "--json", str(out)]
    assert tune_layer.main(words) == 0
    assert "REFUSED" not in capsys.readouterr().out
    assert out.is_file()
