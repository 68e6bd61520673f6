"""Messages about many clips."""

from harness.data.datamodule import _folded


def test_clips_with_the_same_trouble_are_one_line_with_a_count():
    alike = [(f"clips/{number}.mp4", f"clips/{number}.mp4: has 8 frames, needs 88") for number in range(3000)]
    lines = _folded([*alike, ("clips/x.mp4", "clips/x.mp4: damaged")])
    assert lines == [
        "clips/0.mp4: has 8 frames, needs 88 (3000 clips alike, this the first)",
        "clips/x.mp4: damaged",
    ]
