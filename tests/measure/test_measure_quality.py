import pytest
import torch

from harness.measure.quality import PSNR_CAP, score_frames


def test_psnr_is_that_of_the_definition_per_frame():
    reference = torch.rand(20, 3, 16, 16)
    frames = reference.clone()
    frames[1] += 0.1
    frames[2] += 0.01
    scores = score_frames(frames, reference)
    assert scores.psnr[0] == PSNR_CAP
    assert scores.psnr[1] == pytest.approx(20, abs=1e-3)
    assert scores.psnr[2] == pytest.approx(40, abs=1e-2)
    assert scores.ssim[0] == pytest.approx(1)
    assert scores.ssim[1] < scores.ssim[2] < 1
    assert len(scores.psnr) == len(scores.ssim) == 20


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        score_frames(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_scores_of_a_cpu():
    frames, reference = torch.rand(20, 3, 96, 128), torch.rand(20, 3, 96, 128)
    here, there = (score_frames(frames, reference, torch.device(name)) for name in ("cpu", "cuda"))
    assert there.psnr == pytest.approx(here.psnr, abs=1e-4)
    assert there.ssim == pytest.approx(here.ssim, abs=1e-5)
