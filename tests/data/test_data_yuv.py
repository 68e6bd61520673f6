import av
import numpy as np
import pytest

from harness.data.yuv import BT601, BT709, rgb_to_yuv420, yuv420_to_rgb


@pytest.mark.parametrize(
    ("rgb", "matrix", "yuv"),
    [
        ((0, 0, 0), BT601, (16, 128, 128)),
        ((255, 255, 255), BT601, (235, 128, 128)),
        ((255, 0, 0), BT601, (81, 90, 240)),
        ((0, 255, 0), BT601, (145, 54, 34)),
        ((0, 0, 255), BT601, (41, 240, 110)),
        ((255, 0, 0), BT709, (63, 102, 240)),
        ((0, 255, 0), BT709, (173, 42, 26)),
    ],
)
def test_colours_have_the_standards_codes(rgb, matrix, yuv):
    planes = rgb_to_yuv420(np.full((2, 2, 3), rgb, np.uint8), matrix)
    assert planes.ravel().tolist() == [yuv[0]] * 4 + [yuv[1], yuv[2]]


@pytest.mark.parametrize("matrix", [BT601, BT709])
def test_enlarged_pixels_survive_but_for_rounding(matrix):
    rgb = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    back = yuv420_to_rgb(rgb_to_yuv420(rgb, matrix), matrix)
    error = back - rgb
    assert abs(error.mean()) < 0.05
    assert np.sqrt((error**2).mean()) < 0.8


def test_other_players_see_the_same_picture():
    """The library's own conversion, less exact, agrees on a smooth picture within a few levels."""
    y, x = np.mgrid[0:64, 0:64]
    rgb = np.stack((4 * x, 4 * y, 255 - 2 * (x + y)), 2).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb_to_yuv420(rgb), format="yuv420p")
    assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - rgb).max() <= 8
