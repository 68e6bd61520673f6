import json
import pickle

import pytest
import torch

from harness.data.clips import ClipError
from harness.data.latents import find_latents, probe_latents, read_latents


def cache(**changes: object) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    content = {
        "vid": torch.randn(5, 4, 2, 2, generator=generator),
        "mouse": torch.randn(5, 2, generator=generator),
        "button": torch.randint(0, 2, (5, 11), generator=generator),
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_cache_is_read_in_either_layout_and_any_float(tmp_path, dtype, zipped):
    content = cache()
    content["vid"] = content["vid"].to(dtype)
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    clip = read_latents(tmp_path / "a.pt", first=1, count=3)
    assert clip.id == "a"
    assert clip.tag == "motion"
    assert torch.equal(clip.latents, content["vid"][1:4].float())
    assert torch.equal(clip.mouse, content["mouse"][1:4])
    assert torch.equal(clip.buttons.long(), content["button"][1:4])
    assert probe_latents(tmp_path / "a.pt") == ("motion", 5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_buttons_of_any_type_are_read(tmp_path, dtype):
    content = cache()
    torch.save(cache(button=content["button"].to(dtype)), tmp_path / "a.pt")
    assert torch.equal(read_latents(tmp_path / "a.pt").buttons.long(), content["button"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vid": None}, "no tensor under vid; found mouse, button"),
        ({"mouse": [1, 2]}, "no tensor under mouse"),
        ({"vid": torch.zeros(5, 4, 2)}, r"vid is torch.float32 \[5, 4, 2\]"),
        ({"vid": torch.zeros(5, 4, 2, 3)}, r"must be floating-point \[n, C, S, S\]"),
        ({"vid": torch.zeros(5, 4, 2, 2, dtype=torch.int32)}, "vid is torch.int32"),
        ({"vid": torch.zeros(6, 4, 2, 2)}, "6 frames but 5 rows of button"),
        ({"mouse": torch.zeros(5, 3)}, r"mouse has shape \[5, 3\]"),
        ({"button": torch.full((5, 11), 2)}, "button of frame 0 are .*; each must be 0 or 1"),
        ({"mouse": torch.full((5, 2), float("nan"))}, "mouse of frame 0 is NaN"),
        ({"vid": torch.full((5, 4, 2, 2), float("inf"))}, "vid of frame 0 holds NaN or infinite"),
        ({"vid": torch.zeros(0, 4, 2, 2)}, "holds no frame"),
    ],
)
def test_a_wrong_cache_is_named_with_its_key(tmp_path, changes, message):
    torch.save(cache(**changes), tmp_path / "bad.pt")
    with pytest.raises(ClipError, match=message) as error:
        read_latents(tmp_path / "bad.pt")
    assert str(tmp_path / "bad.pt") in str(error.value)


def test_nan_is_named_by_its_frame_in_the_file(tmp_path):
    vid = torch.zeros(5, 4, 2, 2)
    vid[3, 0, 0, 0] = float("nan")
    torch.save(cache(vid=vid), tmp_path / "a.pt")
    with pytest.raises(ClipError, match="vid of frame 3"):
        read_latents(tmp_path / "a.pt", first=2, count=2)


def test_a_cache_too_short_says_what_it_has(tmp_path):
    torch.save(cache(), tmp_path / "a.pt")
    with pytest.raises(ClipError, match=r"a\.pt: vid has 5 frames; frames 3 to 6 were asked for"):
        read_latents(tmp_path / "a.pt", first=3, count=4)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys, zipped):
    torch.save({**cache(), "extra": Code()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ClipError, match=r"evil\.pt: refused"):
        read_latents(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out


def test_a_bare_pickle_with_code_is_refused(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ClipError, match=r"evil\.pt"):
        read_latents(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path, keep):
    torch.save(cache(), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ClipError, match=r"a\.pt: not a readable PyTorch file"):
        read_latents(tmp_path / "a.pt")


def test_a_list_is_not_a_cache(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "a.pt")
    with pytest.raises(ClipError, match="holds a list; it must be a dict of vid, mouse, button"):
        read_latents(tmp_path / "a.pt")


def test_the_tag_is_the_sidecars_or_follows_from_the_actions(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(cache(mouse=torch.zeros(5, 2), button=torch.zeros(5, 11)), path)
    assert probe_latents(path)[0] == "stand_still"
    path.with_suffix(".json").write_text(json.dumps({"tag": "motion"}))
    assert probe_latents(path)[0] == read_latents(path).tag == "motion"
    path.with_suffix(".json").write_text(json.dumps({"tag": "asleep"}))
    with pytest.raises(ClipError, match=r"a\.json: tag is 'asleep'; give one of motion, stand_still"):
        probe_latents(path)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(ClipError, match=r'a\.json: give a JSON object with a "tag"'):
        probe_latents(path)


def test_caches_are_found_in_folders_and_by_name(tmp_path):
    for name in ("b", "a"):
        torch.save(cache(), tmp_path / f"{name}.pt")
    assert [path.stem for path in find_latents(tmp_path)] == ["a", "b"]
    assert [path.stem for path in find_latents([str(tmp_path / "b.pt")])] == ["b"]
    with pytest.raises(ClipError, match=r"c\.pt: no such file"):
        find_latents(tmp_path / "c.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipError, match=r"no \.pt files here"):
        find_latents(tmp_path / "empty")
