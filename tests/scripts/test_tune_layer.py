"""What needs no GPU: it says that it needs one."""

import pytest
import torch

from scripts import tune_layer


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        tune_layer.main([])
    assert ended.value.code == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err


def test_formats_of_every_width_are_known():
    assert tune_layer.FORMAT_OF_BITS.keys() == {4, 8, 16}
    assert {name for name in tune_layer.FORMAT_OF_BITS.values() if name} <= tune_layer.FORMATS.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_finds_what_is_no_slower(tmp_path, capsys):
    out = tmp_path / "found.json"
    words = ["--bits", "4", "--layers", "2", "--most", "6", "--seconds", "20", "--json", str(out)]
    assert tune_layer.main(words) == 0
    assert "REFUSED" not in capsys.readouterr().out
    assert out.is_file()
