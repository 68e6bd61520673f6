import io
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random

import av
import pytest
import torch

from harness.data.clips import Clip, ClipError, derive_tag, find_clips, probe_clip, read_clip, write_clip


def play(frames: int = 6, height: int = 32, width: int = 48, clip_id: str = "play") -> Clip:
    """A coloured square that moves over a gradient."""
    pictures = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    pictures[:, 2] = torch.arange(width) * 4
    for i in range(frames):
        pictures[i, 0, 8:16, 4 + 2 * i : 12 + 2 * i] = 220
    buttons = torch.zeros(frames, 11, dtype=torch.uint8)
    buttons[::2, 0] = 1
    mouse = torch.stack((torch.arange(frames) * 0.5, torch.full((frames,), -0.125)), 1)
    return Clip(clip_id, pictures, buttons, mouse, fps=17.5, tag="motion", scenario="drawn", seed=3)


def change_json(path: Path, **changes: object) -> Path:
    sidecar = path.with_suffix(".json")
    content = json.loads(sidecar.read_text())
    content.update(changes)
    sidecar.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def test_a_clip_comes_back_as_it_was_written(tmp_path):
    clip = play()
    back = read_clip(write_clip(tmp_path, clip, crf=12))
    assert back.frames.dtype == torch.uint8
    assert psnr(back.frames, clip.frames) > 38
    assert torch.equal(back.buttons, clip.buttons)
    assert torch.equal(back.mouse, clip.mouse)
    same = ("id", "fps", "tag", "scenario", "seed", "button_names")
    assert [getattr(back, name) for name in same] == [getattr(clip, name) for name in same]


def test_colour_keeps_its_resolution_although_the_video_is_yuv420p(tmp_path):
    clip = play(frames=2)
    stripes = clip.frames.clone()
    stripes[:] = torch.tensor([200, 40, 40], dtype=torch.uint8).view(1, 3, 1, 1)
    stripes[..., ::2] = torch.tensor([40, 40, 200], dtype=torch.uint8).view(1, 3, 1, 1)
    video = write_clip(tmp_path, replace(clip, frames=stripes), crf=12)
    with av.open(str(video)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert psnr(read_clip(video).frames, stripes) > 35


def test_storing_does_not_change_the_brightness(tmp_path):
    pictures = torch.randint(40, 200, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    clip = replace(play(frames=2), frames=pictures)
    stored = read_clip(write_clip(tmp_path, clip, crf=1)).frames
    assert abs(float(stored.float().mean() - pictures.float().mean())) < 0.15


def test_part_of_a_clip_is_that_part(tmp_path):
    video = write_clip(tmp_path, play())
    whole, part = read_clip(video), read_clip(video, first=2, count=3)
    for name in ("frames", "buttons", "mouse"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:5])


def test_the_same_clip_gives_the_same_files(tmp_path):
    first, second = (write_clip(tmp_path / name, play()) for name in "ab")
    for suffix in (".mp4", ".json"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_a_clip_too_short_says_what_it_has(tmp_path):
    video = write_clip(tmp_path, play(frames=6))
    with pytest.raises(ClipError, match=r"play\.json: has 6 frames; frames 2 to 8 were asked for"):
        read_clip(video, first=2, count=7)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_a_truncated_video_is_named(tmp_path, keep):
    video = write_clip(tmp_path, play())
    video.write_bytes(video.read_bytes()[: int(video.stat().st_size * keep)])
    with pytest.raises(ClipError, match=r"play\.mp4: damaged"):
        read_clip(video)
    change_json(video, video_sha256=...)
    with pytest.raises(ClipError, match=r"play\.mp4"):
        read_clip(video)


def test_one_flipped_bit_in_the_video_is_noticed(tmp_path):
    video = write_clip(tmp_path, play())
    data = bytearray(video.read_bytes())
    data[-20] ^= 1
    video.write_bytes(data)
    with pytest.raises(ClipError, match=r"play\.mp4: damaged: its SHA-256"):
        read_clip(video)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a clip"),
        ({"version": 99}, "version 99; this reads version 1"),
        ({"fps": ...}, "fps is missing"),
        ({"fps": 0}, "fps is 0, which must be above 0"),
        ({"tag": "running"}, "tag must be one of motion, stand_still"),
        ({"frames": 7}, "7 frames but 6 rows of buttons"),
        ({"frames": "6"}, "frames is '6'"),
        ({"actions": [{"buttons": [0] * 10, "mouse": [0, 0]}] * 6}, "buttons of frame 0 must be 11 numbers"),
        ({"actions": [{"buttons": [0] * 11, "mouse": [0, 0, 0]}] * 6}, "mouse of frame 0 must be 2 numbers"),
        ({"actions": [{"buttons": [0] * 10 + [0.5], "mouse": [0, 0]}] * 6}, "each must be 0 or 1"),
        ({"actions": [{"buttons": [0] * 11, "mouse": [float("nan"), 0]}] * 6}, "NaN is no JSON number"),
        ({"actions": [{"buttons": [0] * 11, "mouse": [float("inf"), 0]}] * 6}, "Infinity is no JSON number"),
    ],
)
def test_a_wrong_json_is_named_with_what_is_wrong(tmp_path, changes, message):
    video = change_json(write_clip(tmp_path, play()), **changes)
    with pytest.raises(ClipError, match=message) as error:
        probe_clip(video)
    assert str(video.with_suffix(".json")) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 16}, "pictures of 64×96, but play.json says 16×48"),
        ({"fps": 30.0}, "17.5 frames a second, but play.json says 30"),
    ],
)
def test_a_video_that_is_not_what_its_json_says_is_named(tmp_path, changes, message):
    video = change_json(write_clip(tmp_path, play()), **changes)
    with pytest.raises(ClipError, match=message):
        read_clip(video)


def test_a_video_of_another_pixel_format_is_named(tmp_path):
    video = change_json(write_clip(tmp_path, play()), video_sha256=...)
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(35, 2))
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv444p"
        container.mux(stream.encode(av.VideoFrame(96, 64, "yuv444p")))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match=r"play\.mp4: pixel format yuv444p.*a clip is yuv420p"):
        read_clip(video)


def unsigned(path: Path) -> bytes:
    """A clip's video, whose checksum its JSON no longer has."""
    return change_json(path, video_sha256=...).read_bytes()


def stream(height: int, width: int, frames: int, pixels: str = "yuv420p") -> list[bytes]:
    """Pictures as H.264 that carries its own header, one access unit each."""
    rate, held = Fraction(35, 2), io.BytesIO()
    with av.open(held, "w", format="h264") as container:
        made = container.add_stream("libx264", rate=rate)
        made.height, made.width, made.pix_fmt = height, width, pixels
        made.options = {"preset": "ultrafast", "x264-params": "repeat-headers=1:keyint=1:slices=1"}
        for i in range(frames):
            frame = av.VideoFrame(width, height, pixels)
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(made.encode(frame))
        container.mux(made.encode())
    units, unit = [], b""
    for nal in re.split(b"\0\0\0?\1", held.getvalue())[1:]:
        unit += len(nal).to_bytes(4, "big") + nal
        if nal[0] & 31 in (1, 5):
            units, unit = [*units, unit], b""
    return units


def write_units(like: Path, units: list[bytes], path: Path) -> None:
    """An MP4 with the header of ``like`` and these pictures."""
    with av.open(str(like)) as template, av.open(str(path), "w", format="mp4") as container:
        made = container.add_stream_from_template(template.streams.video[0])
        for i, unit in enumerate(units):
            packet = av.Packet(unit)
            packet.stream, packet.pts, packet.dts, packet.duration = made, i * 1024, i * 1024, 1024
            packet.time_base, packet.is_keyframe = Fraction(1, 17920), True
            container.mux(packet)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((64, 64, 3), "a picture of 64×64 among 64×96"),
        ((96, 128, 3), "a picture of 96×128 among 64×96"),
        ((64, 96, 3, "yuv422p"), "a picture of pixel format yuv422p"),
        ((4096, 4096, 3), "not a readable video: Invalid data"),  # which FFmpeg itself is told not to allocate
    ],
)
def test_a_picture_unlike_the_first_is_named_and_a_huge_one_never_decoded(tmp_path, second, message):
    video = change_json(write_clip(tmp_path, play()), video_sha256=...)
    write_units(write_clip(tmp_path / "like", play()), stream(64, 96, 3) + stream(*second), video)
    with pytest.raises(ClipError, match=rf"play\.mp4: {message}"):
        read_clip(video)


@pytest.mark.parametrize(
    "text",
    [
        b"ffconcat version 1.0\nfile other.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_is_no_clip_and_what_it_names_is_not_opened(tmp_path, text):
    write_clip(tmp_path, play(clip_id="other"))
    video = change_json(write_clip(tmp_path, play()), video_sha256=...)
    video.write_bytes(text)
    with pytest.raises(ClipError, match=r"play\.mp4: not a readable video"):
        read_clip(video)


@pytest.mark.parametrize(
    ("box", "other"), [(b"stsd", b"free"), (b"avc1", b"xxxx"), (b"vide\0", b"soun\0"), (b"trak", b"free")]
)
def test_a_header_that_does_not_say_what_is_encoded_is_named(tmp_path, box, other):
    video = write_clip(tmp_path, play())
    content = unsigned(video)
    assert box in content
    video.write_bytes(content[::-1].replace(box[::-1], other[::-1], 1)[::-1])
    with pytest.raises(ClipError, match=r"play\.mp4: (says nothing that is known|has 0 video streams|not a readable)"):
        read_clip(video)


def test_text_in_a_video_that_is_no_utf8_does_not_matter(tmp_path):
    video = write_clip(tmp_path, play())
    content = unsigned(video)
    video.write_bytes(content.replace(b"isomiso2", b"isom\xff\xfe\xfd2", 1))
    assert torch.equal(read_clip(video).buttons, play().buttons)


def test_whatever_byte_is_altered_a_clip_is_read_whole_or_named(tmp_path):
    """Without its checksum, so that a decoder sees the damage: a picture may then differ, nothing else may."""
    video = write_clip(tmp_path, play())
    content, random = unsigned(video), Random(0)
    for number in range(400):
        altered = bytearray(content)
        at = random.randrange(len(content) if number % 2 else 1400)
        altered[at : at + 4] = random.choice([bytes([altered[at] ^ 1 << random.randrange(8)]), b"\xff" * 4, b"\0" * 4])
        video.write_bytes(altered)
        try:
            found = tuple(read_clip(video).frames.shape)
        except ClipError as error:
            found = str(tmp_path) in str(error) and str(error).isprintable()
        assert found in ((6, 3, 32, 48), True), at


def test_a_version_is_quoted_in_brief_as_it_stands_in_no_terminal(tmp_path):
    video = change_json(write_clip(tmp_path, play()), version="\x1b[31m" + "9" * 1000)
    with pytest.raises(ClipError, match=r"version '\\x1b\[31m9+; this reads version 1") as error:
        probe_clip(video)
    assert len(str(error.value)) < 300


def test_fewer_pictures_than_actions_is_named(tmp_path):
    video = write_clip(tmp_path, play(frames=6))
    write_clip(tmp_path / "other", play(frames=5))
    (tmp_path / "other" / "play.mp4").replace(video)
    change_json(video, video_sha256=...)
    with pytest.raises(ClipError, match=r"play\.mp4: 5 frames could be decoded, but play\.json says 6"):
        read_clip(video)


def test_text_instead_of_json_is_named(tmp_path):
    video = write_clip(tmp_path, play())
    video.with_suffix(".json").write_text("not json")
    with pytest.raises(ClipError, match=r"play\.json: not readable JSON"):
        probe_clip(video)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": torch.zeros(6, 3, 8, 8)}, "float32"),
        ({"mouse": torch.zeros(5, 2)}, "6 frames but 5 rows of mouse"),
        ({"buttons": torch.zeros(6, 10)}, "10 buttons but 11 names"),
        ({"tag": "still"}, "tag 'still'"),
        ({"fps": 0.0}, "0.0 fps"),
    ],
)
def test_a_clip_that_does_not_fit_together_is_not_written(tmp_path, changes, message):
    with pytest.raises(ClipError, match=message):
        write_clip(tmp_path, replace(play(), **changes))
    assert not list(tmp_path.iterdir())


def test_clips_are_found_in_folders_and_by_either_file(tmp_path):
    a = write_clip(tmp_path / "folder", play(clip_id="a"))
    b = write_clip(tmp_path, play(clip_id="b"))
    found = [a.with_suffix(".json"), b.with_suffix(".json")]
    assert find_clips([tmp_path / "folder", b]) == found
    assert find_clips([b.with_suffix(".json"), str(tmp_path / "folder"), b]) == found


def test_half_a_clip_an_empty_folder_and_a_missing_path_are_named(tmp_path):
    with pytest.raises(ClipError, match="no clips here"):
        find_clips(tmp_path)
    with pytest.raises(ClipError, match="nowhere: no such folder"):
        find_clips(tmp_path / "nowhere")
    write_clip(tmp_path, play()).unlink()
    with pytest.raises(ClipError, match=r"play\.mp4: missing"):
        find_clips(tmp_path)


def test_two_clips_of_one_id_are_an_error(tmp_path):
    for folder in "ab":
        write_clip(tmp_path / folder, play())
    with pytest.raises(ClipError, match="two clips of one id"):
        find_clips([tmp_path / "a", tmp_path / "b"])


def test_standing_still_is_no_button_and_hardly_any_mouse():
    buttons, mouse = torch.zeros(4, 11), torch.full((4, 2), 0.01)
    assert derive_tag(buttons, mouse) == "stand_still"
    assert derive_tag(buttons, mouse + torch.tensor([0.0, 0.5])) == "motion"
    buttons[3, 9] = 1
    assert derive_tag(buttons, mouse) == "motion"
