"""Messages are checked before anything acts on them; frames are packed and unpacked; queues never grow."""

import contextlib
import io
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from harness.live.inputs import Inputs
from harness.live.outbox import NOTICES, Outbox, PackedFrame
from harness.live.pictures import PSNR_CAP, compress, difference, psnr
from harness.live.protocol import LARGEST_MESSAGE, MESSAGES, ProtocolError, pack_frame, parse, unpack_frame

NAMES = ("W", "A", "S", "D", "LMB")
INPUT = {"type": "input", "seq": 3, "t": 12.5, "buttons": 5, "mouse": [1.5, -2]}


def test_a_message_is_its_type_and_its_fields():
    message = parse(json.dumps(INPUT))
    assert (message.type, message["buttons"], message["mouse"]) == ("input", 5, [1.5, -2])
    assert parse('{"type": "reset", "clip": null, "start": 0, "seed": null}')["clip"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "no JSON object with a type"),
        ("{", "no JSON"),
        ("[" * 900, "no JSON"),
        ('{"type": 3}', "with a type"),
        ('{"type": "fly"}', "type 'fly': known are hello"),
        (json.dumps({**INPUT, "buttons": -1}), "buttons is -1"),
        (json.dumps({**INPUT, "buttons": True}), "buttons is True"),
        (json.dumps({**INPUT, "mouse": [1]}), "mouse is [1]"),
        (json.dumps({**INPUT, "mouse": [1, 1e9]}), "mouse is [1, 1000000000.0]"),
        (json.dumps({**INPUT, "t": float("nan")}), "NaN is no JSON number"),
        (json.dumps({**INPUT, "evil": 1}), "'evil' is unknown"),
        ('{"type": "input"}', "seq is missing"),
        ('{"type": "limit", "fps": 0}', "fps is 0"),
        ('{"type": "arm", "arm": "fp2"}', "arm is 'fp2'"),
        ('{"type": "reset", "clip": "", "start": 0, "seed": null}', "clip is ''"),
        (json.dumps({"type": "hello", "protocol": "x" * LARGEST_MESSAGE}), "more than 2048 bytes"),
    ],
)
def test_what_cannot_be_is_said(text, said):
    with pytest.raises(ProtocolError) as error:
        parse(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 700


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_json_breaks_the_parser(content):
    for message in (content, {**INPUT, "seq": content}, {**INPUT, "mouse": content}, {"type": content}):
        with contextlib.suppress(ProtocolError):
            assert parse(json.dumps(message)).type in MESSAGES


def test_a_frame_is_unpacked_as_it_was_packed():
    pictures = [b"one", b"another"]
    panes = [{"name": "bf16", "bytes": 3}, {"name": "candidate", "bytes": 7}]
    header, unpacked = unpack_frame(pack_frame({"serial": 4, "panes": panes}, pictures))
    assert (header["serial"], unpacked) == (4, pictures)
    with pytest.raises(ProtocolError, match="version 9"):
        unpack_frame(b"\x09\x01\x00\x00{}")
    with pytest.raises(ProtocolError, match="too short"):
        unpack_frame(b"\x01")


def test_the_newest_input_wins_taps_are_kept_and_mouse_movements_add_up():
    inputs = Inputs(NAMES)
    inputs.put(1, 10.0, 0b00001, [1.0, 0.0])
    inputs.put(2, 11.0, 0b10000, [0.5, 2.0])
    taken = inputs.take()
    assert (set(taken.action.buttons), taken.action.mouse, taken.seq, taken.t) == ({"W", "LMB"}, (1.5, 2.0), 2, 11.0)
    taken = inputs.take()
    assert (taken.action.buttons, taken.action.mouse) == (("LMB",), (0.0, 0.0)), "W was let go, LMB is still held"
    inputs.put(1, 5.0, 0b00010, [0.0, 0.0])
    assert inputs.take().seq == 2, "an older message does not take over"
    inputs.clear()
    assert inputs.take().action.buttons == ()


def test_a_button_beyond_the_models_is_ignored():
    inputs = Inputs(NAMES)
    inputs.put(1, 1.0, 0xFFFFFFFF, [0.0, 0.0])
    assert inputs.take().action.buttons == NAMES


def test_a_browser_that_does_not_draw_gets_no_more_and_the_newest_frame_waits():
    outbox = Outbox(in_flight=2, wake=lambda: None)
    for serial in range(1, 3):
        outbox.put_frame(PackedFrame(serial, b"%d" % serial))
        assert outbox.take() == b"%d" % serial
    for serial in range(3, 100):
        outbox.put_frame(PackedFrame(serial, b"%d" % serial))
        assert outbox.take() is None
    assert outbox.dropped == 96
    assert outbox.waiting_s() > 0
    outbox.drawn(1)
    assert outbox.take() == b"99"
    outbox.drawn(99)
    assert outbox.waiting_s() == 0
    outbox.put_frame(PackedFrame(98, b"98"))
    assert outbox.take() is None, "encoded later than the one after it: never shown"


def test_words_wait_newest_only_and_never_pile_up():
    outbox = Outbox(in_flight=1, wake=lambda: None)
    for i in range(1000):
        outbox.put_state("state", n=i)
        outbox.put_notice("info", str(i))
    taken = []
    while (data := outbox.take()) is not None:
        taken.append(json.loads(data))
    assert taken[0] == {"type": "state", "n": 999}
    assert [notice["text"] for notice in taken[1:]] == [str(i) for i in range(1000 - NOTICES, 1000)]


def test_an_outbox_is_woken_from_any_thread():
    woken = threading.Event()
    outbox = Outbox(in_flight=1, wake=woken.set)
    threading.Thread(target=lambda: outbox.put_frame(PackedFrame(1, b"x"))).start()
    assert woken.wait(5)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_pictures_survive_their_codec(codec):
    y, x = np.mgrid[0:32, 0:48]
    picture = torch.from_numpy(np.stack([x * 5, y * 7, x + y], 2).astype(np.uint8))
    fine, coarse = (compress(picture, codec, quality) for quality in (95, 20))
    assert len(coarse) < len(fine)
    decoded = torch.from_numpy(np.asarray(Image.open(io.BytesIO(fine)).convert("RGB")).copy())
    assert psnr(decoded, picture) > 33


def test_difference_and_psnr_of_pictures():
    one = torch.full((4, 4, 3), 100, dtype=torch.uint8)
    other = one.clone()
    assert psnr(one, other) == PSNR_CAP
    assert not difference(one, other).any()
    other[0, 0] = torch.tensor([103, 90, 200], dtype=torch.uint8)
    assert difference(one, other)[0, 0].tolist() == [24, 80, 255]
    assert psnr(one, one + 5) == pytest.approx(20 * np.log10(255 / 5))
