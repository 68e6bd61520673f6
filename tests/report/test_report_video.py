import av
import numpy as np
import pytest

from harness.data.yuv import yuv420_to_rgb
from harness.report.video import CAPTION_HEIGHT, GAP, Panel, compose_frame, write_comparison


def panel(caption, value, frames=3, size=(31, 33)):
    return Panel(caption, np.full((frames, *size, 3), value, dtype=np.uint8), [f"{i} dB" for i in range(frames)])


def test_video_is_h264_yuv420p_with_even_sides_and_all_frames(tmp_path):
    path = tmp_path / "videos" / "clip.mp4"
    write_comparison(path, [panel("recording", 10), panel("BF16", 120), panel("candidate", 250)], fps=17.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = [yuv420_to_rgb(frame.to_ndarray()) for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 6
        assert float(stream.average_rate) == 17.5
    assert len(pictures) == 3
    height, width, _ = pictures[0].shape
    assert height % 2 == width % 2 == 0
    scale = 400 // 31
    for index, value in enumerate((10, 120, 250)):
        x = index * (33 * scale + GAP) + 100
        area = pictures[1][CAPTION_HEIGHT + 100 : CAPTION_HEIGHT + 200, x : x + 100]
        assert abs(area.mean() - value) < 0.6, "the codec's own rounding, no shift in brightness"
    assert list(tmp_path.joinpath("videos").iterdir()) == [path]


def test_captions_are_drawn_and_never_wider_than_their_panel():
    short = compose_frame([panel("BF16", 0, size=(128, 128))], 0)
    long = compose_frame([panel("x" * 500, 0, size=(128, 128))], 0)
    assert short.shape == long.shape
    assert short[:CAPTION_HEIGHT].max() > 200


def test_panels_that_do_not_match_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="same number of frames"):
        write_comparison(tmp_path / "a.mp4", [panel("a", 0), panel("b", 0, frames=2)], fps=10)
    assert not list(tmp_path.iterdir())
