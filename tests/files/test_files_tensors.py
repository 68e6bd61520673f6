"""Checkpoints from strangers: plain dense tensors come out, or one error that names the file; never a surprise."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from harness.files.tensors import read_pickle, read_safetensors
from harness.files.text import FileError


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


class Builds:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before torch 1.6"])
def test_plain_tensors_of_every_kind_come_out_as_they_went_in(zipped, tmp_path):
    content = {
        "ema": {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "t": torch.randn(4, 3).T},
        "step": 7,
        "lr": [1e-3, {"name": "adam"}],
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    read = read_pickle(saved(tmp_path / "a.pt", content, _use_new_zipfile_serialization=zipped))
    assert all(torch.equal(read["ema"][key], value) for key, value in content["ema"].items())
    assert (read["step"], read["lr"]) == (7, content["lr"])


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before torch 1.6"])
@pytest.mark.parametrize(
    "bad",
    [
        Builds(bytearray, 10**12),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.empty(2, device="meta"),
    ],
    ids=["a terabyte of bytes", "sparse", "quantised", "nested", "meta"],
)
def test_what_is_no_plain_tensor_is_refused(bad, zipped, tmp_path):
    path = saved(tmp_path / "a.pt", {"model": {"w": bad}}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileError, match=r"a\.pt: (refused: .*it asks for|.* is |not a readable)"):
        read_pickle(path)


def test_a_tensor_that_repeats_few_bytes_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(FileError, match=r"w says 1000000000000 elements .* holds 4 bytes"):
        read_pickle(path)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive again, each member's bytes through ``change(name, bytes)``."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in members.items():
            new.writestr(name, change(name, data))
    return path


def test_an_archive_that_inflates_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(4 * 2**20)})
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(FileError, match="is compressed"):
        read_pickle(path)


def test_a_storage_smaller_than_the_pickle_says_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(1000)})
    rewritten(path, lambda name, data: data[:16] if "/data/" in name else data)
    with pytest.raises(FileError, match=r"a\.pt"):
        read_pickle(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02}q\x00", b"\x80\x04K\x01"]
)
def test_damaged_files_end_in_one_error(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FileError, match=r"a\.pt"):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("cut", [10, 200, 600, 1200])
def test_a_file_cut_anywhere_ends_in_one_error(cut, tmp_path):
    path = saved(tmp_path / "a.pt", {"w": torch.randn(300)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FileError, match=r"a\.pt"):
        read_pickle(path)


def test_deep_nesting_is_refused(tmp_path):
    deep = []
    for _ in range(60):
        deep = [deep]
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(1), "deep": deep})
    with pytest.raises(FileError, match="nested too deeply"):
        read_pickle(path)


def test_a_pickle_by_itself_is_refused_and_a_folder_is_told(tmp_path):
    buffer = io.BytesIO()
    pickle.dump(Builds(print, "ran"), buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(FileError, match="refused"):
        read_pickle(tmp_path / "a.pt")
    with pytest.raises(FileError, match="is a folder"):
        read_pickle(tmp_path)


def test_safetensors_whose_header_lies_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(8)}, path)
    good = path.read_bytes()
    assert torch.equal(read_safetensors(path)["w"], torch.zeros(8))
    for bad in (good[:-4], good.replace(b"[8]", b"[9]"), b"\xff" * 16, good.replace(b'"F32"', b'"F99"')):
        path.write_bytes(bad)
        with pytest.raises(FileError, match=r"a\.safetensors: not a readable"):
            read_safetensors(path)


def header_of(*names):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = "{" + ",".join(f"{json.dumps(name)}:{entry}" for name in names) + "}"
    return len(text).to_bytes(8, "little") + text.encode() + b"1234"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a", "a"), "'a' is given twice"),
        (("a\x1b[31mred",), r"'a\\x1b\[31mred' is no name of a tensor"),
        (("k" * 501,), "is no name of a tensor: at most 500 printable characters"),
    ],
)
def test_names_that_can_be_read_two_ways_or_not_be_shown_are_refused(tmp_path, names, told):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_of("k" * 500))
    assert list(read_safetensors(path)) == ["k" * 500]
    path.write_bytes(header_of(*names))
    with pytest.raises(FileError, match=told) as raised:
        read_safetensors(path)
    assert len(str(raised.value)) < 300 + len(str(path))
    assert str(raised.value).isprintable()


def test_a_safetensors_header_of_a_hundred_megabytes_is_not_parsed(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(90_000_100)
    with pytest.raises(FileError, match="its header claims 90000000 bytes"):
        read_safetensors(path)
