"""Recorded clips: a video file and its actions, side by side in one folder.

A clip is ``<clip_id>.mp4`` and ``<clip_id>.json``:

* the video is H.264 in yuv420p at a constant frame rate, so any player, browser or library opens it, and a folder of
  clips can be watched without this package. Small frames are stored enlarged (``pixel_scale``, a whole factor):
  yuv420p halves the resolution of colour, and enlarged pixels keep theirs (about 5 dB at 128×128). The reader averages
  them back.
* the JSON holds everything else: one action a frame, button names, fps, scenario, seed, tag and a version. Text that
  any language reads and a person can check; it runs no code, and needs no library that the video does not.

``actions[i]`` is what is held while frame i is produced: frame i is the result of action i.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.data.conf import BUTTON_NAMES, Tag
from harness.data.yuv import BT601, BT709, rgb_to_yuv420, yuv420_to_rgb
from harness.files.text import FileError, read_json
from harness.files.writing import replacing

FORMAT = "mx-world-harness clip"
VERSION = 1
TAGS = tuple(tag.value for tag in Tag)
STILL_MOUSE = 0.05
"""Largest mouse movement on either axis, in the clip's own unit, of a clip that counts as standing still."""
SMALL_SIDE = 256
"""Frames whose sides are at most this many pixels are stored enlarged by 2."""


MAX_SIDE = 8192
"""Pixels of a stored picture along a side, at most: H.264's own bound (level 6.2) is 8192 at 16:9."""
MAX_FRAMES = 10**6
EDGE = 128
"""Pixels along a side that FFmpeg allocates beside a picture, at most."""
MAX_BUTTONS = 256
MAX_TEXT = 200
"""Characters of a name in a clip's JSON."""


MATRICES = {1: BT709, 2: BT601, 5: BT601, 6: BT601}
"""By the code that H.264 gives a video's YUV matrix; 2 is "not said", and BT.601 is usual at these sizes."""
LIMITED = (0, 1)
"""Codes of limited range: not said, or said."""
CODE_BT601 = 6


class ClipError(ValueError):
    """A clip that cannot be used; the message names the file, what is wrong and what is needed."""


@dataclass(frozen=True)
class ClipInfo:
    """What a clip's JSON says.

    Attributes:
        id: name of its files without the suffix.
        path: its JSON file.
        frames: number of frames n. height: of a frame, in pixels. width: likewise.
        fps: frames a second.
        tag: ``motion`` or ``stand_still``.
        scenario: where it was recorded. seed: of the recording; None if there was none.
        button_names: of the columns of ``buttons``.
        buttons: uint8 ``[n, len(button_names)]``, 0 or 1. mouse: float32 ``[n, 2]``, (dx, dy) per frame.
        pixel_scale: stored pixels per pixel along a side.
        video_sha256: of the video file; None if the JSON has none.
    """

    id: str
    path: Path
    frames: int
    height: int
    width: int
    fps: float
    tag: str
    scenario: str
    seed: int | None
    button_names: tuple[str, ...]
    buttons: Tensor
    mouse: Tensor
    pixel_scale: int
    video_sha256: str | None = None


@dataclass(frozen=True)
class Clip:
    """A clip in memory: RGB ``frames`` uint8 ``[n,3,h,w]``; ``buttons`` uint8 ``[n,K]``; ``mouse`` float32 ``[n,2]``.

    The other fields are those of :class:`ClipInfo`.
    """

    id: str
    frames: Tensor
    buttons: Tensor
    mouse: Tensor
    fps: float
    tag: str
    scenario: str
    seed: int | None = None
    button_names: tuple[str, ...] = BUTTON_NAMES


def derive_tag(buttons: Tensor, mouse: Tensor) -> str:
    """``stand_still`` if no button is ever held and the mouse stays within ``STILL_MOUSE``; else ``motion``."""
    still = not bool(buttons.any()) and float(mouse.abs().max()) <= STILL_MOUSE
    return "stand_still" if still else "motion"


def check_actions(origin: str | Path, frames: int, buttons: Tensor, mouse: Tensor) -> None:
    """Check one action a frame: ``buttons [frames, K]`` of 0 and 1, finite ``mouse [frames, 2]``.

    Raises:
        ClipError: naming ``origin`` and the first thing that is wrong.
    """
    if frames < 1:
        raise ClipError(f"{origin}: holds no frame")
    for name, value in (("buttons", buttons), ("mouse", mouse)):
        if value.ndim != 2 or (name == "mouse" and value.shape[1] != 2):
            wanted = "[n, 2] (dx, dy)" if name == "mouse" else "[n, buttons]"
            raise ClipError(f"{origin}: {name} has shape {list(value.shape)}; it must be {wanted}")
        if len(value) != frames:
            raise ClipError(f"{origin}: {frames} frames but {len(value)} rows of {name}; give one action a frame")
        bad = ~torch.isfinite(value.float()).all(1)
        if bad.any():
            raise ClipError(f"{origin}: {name} of frame {int(bad.nonzero()[0])} is NaN or infinite")
    other = ((buttons != 0) & (buttons != 1)).any(1)
    if other.any():
        frame = int(other.nonzero()[0])
        raise ClipError(f"{origin}: buttons of frame {frame} are {buttons[frame].tolist()}; each must be 0 or 1")


def write_clip(folder: str | Path, clip: Clip, crf: int = 24) -> Path:
    """Write ``<folder>/<clip.id>.mp4`` and ``.json``, each complete or not at all; returns the video's path.

    ``crf`` is x264's constant rate factor: lower is better and larger.

    Raises:
        ClipError: the clip's own fields do not fit together, or frames with odd sides (yuv420p has none).
        OSError: the folder cannot be written.
    """
    _check_clip(clip)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    height, width = clip.frames.shape[2:]
    scale = 2 if max(height, width) <= SMALL_SIDE else 1
    if height * scale % 2 or width * scale % 2:
        raise ClipError(f"clip {clip.id}: frames of {height}×{width}; yuv420p needs even sides")
    video = folder / f"{clip.id}.mp4"
    with replacing(video) as part:
        _encode(part, clip, scale, crf)
    with replacing(video.with_suffix(".json")) as part:
        part.write_text(_dump(clip, scale, _sha256(video)), encoding="utf-8")
    return video


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_clip(clip: Clip) -> None:
    if clip.frames.ndim != 4 or clip.frames.shape[1] != 3 or clip.frames.dtype != torch.uint8:
        raise ClipError(
            f"clip {clip.id}: frames are {clip.frames.dtype} {list(clip.frames.shape)}; give uint8 [n, 3, h, w]"
        )
    check_actions(f"clip {clip.id}", len(clip.frames), clip.buttons, clip.mouse)
    if clip.buttons.shape[1] != len(clip.button_names):
        raise ClipError(f"clip {clip.id}: {clip.buttons.shape[1]} buttons but {len(clip.button_names)} names")
    if clip.tag not in TAGS:
        raise ClipError(f"clip {clip.id}: tag {clip.tag!r}; give one of {', '.join(TAGS)}")
    if not clip.fps > 0:
        raise ClipError(f"clip {clip.id}: {clip.fps} fps; give a rate above 0")


def _encode(path: Path, clip: Clip, scale: int, crf: int) -> None:
    # Without the bit rate box: its peak rate is now and then another for the same stream.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "write_btrt": "0"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1001))
        stream.height, stream.width = (side * scale for side in clip.frames.shape[2:])
        stream.pix_fmt = "yuv420p"
        # Without mb-tree, whose AVX-512 code gives small pictures now and then another stream for the same input.
        stream.options = {"crf": str(crf), "preset": "veryslow", "x264-params": "mbtree=0"}
        stream.codec_context.colorspace = CODE_BT601
        stream.codec_context.thread_count = 1  # the same clip gives the same file, whatever the machine's cores
        for frame in clip.frames.permute(0, 2, 3, 1).numpy():
            planes = rgb_to_yuv420(frame.repeat(scale, 0).repeat(scale, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())


def _dump(clip: Clip, scale: int, sha256: str) -> str:
    """The JSON, with one line per action."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "id": clip.id,
        "scenario": clip.scenario,
        "seed": clip.seed,
        "tag": clip.tag,
        "fps": clip.fps,
        "frames": len(clip.frames),
        "height": clip.frames.shape[2],
        "width": clip.frames.shape[3],
        "pixel_scale": scale,
        "video_sha256": sha256,
        "button_names": list(clip.button_names),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = zip(clip.buttons.tolist(), clip.mouse.double().tolist(), strict=True)
    actions = [json.dumps({"buttons": held, "mouse": [round(m, 6) for m in moved]}) for held, moved in rows]
    return "{\n" + ",\n".join(lines) + ',\n "actions": [\n  ' + ",\n  ".join(actions) + "\n ]\n}\n"


def find_clips(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The JSON files of all clips in folders, or named by either of their files; sorted by clip id.

    Raises:
        ClipError: a path that does not exist, a folder without clips, a clip with one of its two files missing, or
            two clips of one id.
    """
    found: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for sidecar in _sidecars(Path(path)):
            if sidecar.resolve() != found.setdefault(sidecar.stem, sidecar).resolve():
                raise ClipError(f"{sidecar} and {found[sidecar.stem]}: two clips of one id; rename one")
    return [found[key] for key in sorted(found)]


def _sidecars(path: Path) -> Iterator[Path]:
    if path.is_dir():
        stems = sorted({p.with_suffix("") for p in path.iterdir() if p.suffix in (".mp4", ".json")})
        if not stems:
            raise ClipError(f"{path}: no clips here; a clip is <id>.mp4 with <id>.json")
    elif path.suffix in (".mp4", ".json"):
        stems = [path.with_suffix("")]
    else:
        raise ClipError(f"{path}: no such folder; give a folder of clips, or a clip's .mp4 or .json")
    for stem in stems:
        for suffix in (".mp4", ".json"):
            if not Path(f"{stem}{suffix}").is_file():
                raise ClipError(f"{stem}{suffix}: missing; a clip is <id>.mp4 with its actions in <id>.json")
        yield Path(f"{stem}.json")


def probe_clip(path: str | Path) -> ClipInfo:
    """Read and check a clip's JSON (``path``: that, or its video beside it); the video stays closed.

    Raises:
        ClipError: not such a JSON, a field missing or of the wrong type, or actions that do not fit.
    """
    path = Path(path).with_suffix(".json")
    try:
        content = read_json(path, "a clip's JSON")
    except FileError as error:
        raise ClipError(str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ClipError(f'{path}: not a clip; its "format" must be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ClipError(f"{path}: version {content.get('version')!r:.60}; this reads version {VERSION}")
    _check_fields(path, content)
    info = ClipInfo(
        id=path.stem,
        path=path,
        button_names=tuple(content["button_names"]),
        video_sha256=content.get("video_sha256"),
        buttons=_action_rows(path, content["actions"], "buttons", len(content["button_names"])),
        mouse=_action_rows(path, content["actions"], "mouse", 2),
        **{key: content[key] for key in ("frames", "height", "width", "fps", "tag", "scenario", "seed", "pixel_scale")},
    )
    check_actions(path, info.frames, info.buttons, info.mouse)
    return ClipInfo(**{**vars(info), "buttons": info.buttons.to(torch.uint8)})


def _check_fields(path: Path, content: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        **dict.fromkeys(("frames", "height", "width", "pixel_scale"), int),
        **{"fps": (int, float), "tag": str, "scenario": str, "seed": (int, type(None))},
        **{"button_names": list, "actions": list},
    }
    problems = [f"{key} is missing" for key in fields if key not in content]
    problems += [
        f"{key} is {content[key]!r:.60}"
        for key, kind in fields.items()
        if key in content and (not isinstance(content[key], kind) or isinstance(content[key], bool))
    ]
    problems += [
        f"{key} is {content[key]}, which must be above 0"
        for key in ("frames", "height", "width", "pixel_scale", "fps")
        if isinstance(content.get(key), int | float) and not 0 < content[key] < float("inf")
    ]
    problems += [
        f"{key} is {content[key]}; at most {most}"
        for key, most in (("frames", MAX_FRAMES), ("height", MAX_SIDE), ("width", MAX_SIDE), ("pixel_scale", 16))
        if isinstance(content.get(key), int) and content[key] > most
    ]
    if isinstance(names := content.get("button_names"), list):
        if len(names) > MAX_BUTTONS or not all(isinstance(name, str) and len(name) <= MAX_TEXT for name in names):
            problems.append(f"button_names must be at most {MAX_BUTTONS} texts of at most {MAX_TEXT} characters")
        elif len(set(names)) < len(names):
            problems.append("button_names holds a name twice")
    if isinstance(content.get("scenario"), str) and len(content["scenario"]) > MAX_TEXT:
        problems.append(f"scenario has more than {MAX_TEXT} characters")
    if not isinstance(content.get("video_sha256"), str | None):
        problems.append("video_sha256 must be a text")
    if content.get("id", path.stem) != path.stem:
        problems.append(f"id is {content['id']!r:.60}, but the file is {path.name}; rename one")
    if content.get("tag") not in TAGS:
        problems.append(f"tag must be one of {', '.join(TAGS)}")
    if problems:
        raise ClipError(f"{path}: " + "; ".join(problems))


def _action_rows(path: Path, actions: list[Any], name: str, width: int) -> Tensor:
    for frame, action in enumerate(actions):
        row = action.get(name) if isinstance(action, dict) else None
        if not isinstance(row, list) or len(row) != width or not all(type(value) in (int, float) for value in row):
            raise ClipError(f"{path}: {name} of frame {frame} must be {width} numbers, given {row!r:.80}")
    return torch.tensor([action[name] for action in actions], dtype=torch.float32).view(len(actions), width)


def read_clip(path: str | Path, first: int = 0, count: int | None = None) -> Clip:
    """Read frames ``first`` to ``first + count`` (None: to the end) and their actions.

    The whole video is decoded, so that a file damaged anywhere is noticed.

    Raises:
        ClipError: naming the file, if the clip is corrupt, inconsistent or shorter than asked for.
    """
    info = probe_clip(path)
    stop = info.frames if count is None else first + count
    if not 0 <= first < stop <= info.frames:
        raise ClipError(f"{info.path}: has {info.frames} frames; frames {first} to {stop - 1} were asked for")
    video = info.path.with_suffix(".mp4")
    _check_sum(video, info)
    kept: list[NDArray[np.uint8]] = []  # grows with the pictures that are there, not with what the JSON says
    number = 0
    for number, picture in enumerate(_decode(video, info), start=1):
        if number > info.frames:
            raise ClipError(f"{video}: holds more than the {info.frames} frames that {info.path.name} says")
        if first < number <= stop:
            kept.append(_shrink(picture, info.pixel_scale))
    if number != info.frames:
        raise ClipError(f"{video}: {number} frames could be decoded, but {info.path.name} says {info.frames}")
    return Clip(
        id=info.id,
        frames=torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2).contiguous(),
        buttons=info.buttons[first:stop],
        mouse=info.mouse[first:stop],
        fps=info.fps,
        tag=info.tag,
        scenario=info.scenario,
        seed=info.seed,
        button_names=info.button_names,
    )


def _check_sum(video: Path, info: ClipInfo) -> None:
    """Decoders conceal much damage, so the JSON carries the video's checksum."""
    try:
        same = info.video_sha256 is None or _sha256(video) == info.video_sha256
    except OSError as error:
        raise ClipError(f"{video}: not a readable video: {error}") from error
    if not same:
        raise ClipError(
            f"{video}: damaged: its SHA-256 is not the one in {info.path.name}; copy it again "
            "(or, if you re-encoded it on purpose, delete video_sha256 from the JSON)"
        )


_TOLERANT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Titles that are no UTF-8 do not matter; from PyAV 19 on they never do."""


def _decode(video: Path, info: ClipInfo) -> Iterable[NDArray[np.float32]]:
    """The stored pictures, RGB ``[h, w, 3]`` each, about 0 to 255."""
    # A larger picture than the JSON says is none that FFmpeg allocates. The file is read as an MP4 and nothing else:
    # FFmpeg would take text for a playlist, and open what that names.
    height, width = info.height * info.pixel_scale, info.width * info.pixel_scale
    most = {"max_pixels": str((height + EDGE) * (width + EDGE))}
    try:
        with av.open(f"file:{video}", format="mp4", **_TOLERANT) as container:
            if len(container.streams.video) != 1:
                raise ClipError(f"{video}: has {len(container.streams.video)} video streams; a clip has one")
            stream = container.streams.video[0]
            _check_stream(video, stream, info)
            # A damaged picture is an error, not a guess.
            stream.codec_context.options = {"err_detect": "explode", **most}
            times: list[int] = []
            for frame in container.decode(stream):
                _check_picture(video, frame, stream, (height, width), times)
                planes = frame.to_ndarray().astype(np.uint8, copy=False)
                yield yuv420_to_rgb(planes, MATRICES[frame.colorspace])
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{video}: not a readable video: {error.strerror or error}") from error


def _check_stream(video: Path, stream: av.VideoStream, info: ClipInfo) -> None:
    """Does the video's header say what the JSON says?"""
    if stream.codec_context is None:
        raise ClipError(f"{video}: says nothing that is known of how it is encoded; a clip is H.264: re-encode it")
    if (stream.height, stream.width) != (info.height * info.pixel_scale, info.width * info.pixel_scale):
        raise ClipError(
            f"{video}: pictures of {stream.height}×{stream.width}, but {info.path.name} says {info.height}×"
            f"{info.width} at pixel_scale {info.pixel_scale}"
        )
    aspect = stream.sample_aspect_ratio
    if aspect not in (None, 0, 1):
        raise ClipError(f"{video}: pixels are to be shown {aspect} as wide as high; a clip has square ones: rescale it")
    if stream.codec_context.name != "h264":
        raise ClipError(f"{video}: is {stream.codec_context.name}; a clip is H.264: re-encode it")
    rate = float(stream.average_rate or 0)
    if abs(rate - info.fps) > 0.01 * info.fps:
        raise ClipError(f"{video}: {rate:g} frames a second, but {info.path.name} says {info.fps:g}")
    codec = stream.codec_context
    if codec.pix_fmt != "yuv420p" or codec.color_range not in LIMITED or codec.colorspace not in MATRICES:
        raise ClipError(
            f"{video}: pixel format {codec.pix_fmt}, range {codec.color_range}, matrix {codec.colorspace}; "
            "a clip is yuv420p of limited range (1) with matrix BT.601 (5, 6) or BT.709 (1): re-encode it so"
        )


def _check_picture(
    video: Path, frame: av.VideoFrame, stream: av.VideoStream, size: tuple[int, int], times: list[int]
) -> None:
    """Is the picture what the header promised, and does it come when a constant rate has it?

    ``size``: height and width; the stream's own are those of the newest picture. ``times``: presentation times of the
    pictures before it, at most two; kept here.
    """
    if (frame.height, frame.width) != size:
        raise ClipError(f"{video}: a picture of {frame.height}×{frame.width} among {size[0]}×{size[1]}")
    if frame.format.name != "yuv420p":
        raise ClipError(f"{video}: a picture of pixel format {frame.format.name}; all must be yuv420p: re-encode it so")
    if frame.interlaced_frame:
        raise ClipError(f"{video}: is interlaced; a clip is progressive: re-encode it (ffmpeg -vf yadif)")
    if getattr(frame, "rotation", 0):
        raise ClipError(f"{video}: is to be shown turned by {frame.rotation}°; turn the pictures themselves")
    if frame.colorspace not in MATRICES:
        raise ClipError(f"{video}: a picture with matrix {frame.colorspace}; BT.601 (5, 6) or BT.709 (1) are read")
    if frame.pts is None:
        raise ClipError(f"{video}: a picture without a time; a clip has a constant frame rate")
    times.append(frame.pts)
    if len(times) == 3:
        first, second = times[1] - times[0], times[2] - times[1]
        # A rate that the container's clock does not divide puts pictures up to one tick early or late.
        if first <= 0 or abs(second - first) > 2:
            raise ClipError(
                f"{video}: its frame rate varies (pictures {first} and {second} ticks apart); a clip has a constant "
                f"one, action by action: re-encode it (ffmpeg -vf fps={float(stream.average_rate or 0):g})"
            )
        del times[0]


def _shrink(picture: NDArray[np.float32], scale: int) -> NDArray[np.uint8]:
    """Average blocks of ``scale × scale`` stored pixels and round."""
    total = sum(picture[i::scale, j::scale] for i in range(scale) for j in range(scale))
    return np.rint(total / scale**2).clip(0, 255).astype(np.uint8)
