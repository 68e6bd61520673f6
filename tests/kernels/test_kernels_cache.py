import os

import pytest

from harness.kernels import cache


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("MX_HARNESS_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path / "cache"


def test_a_kernel_is_found_again_by_what_it_was_made_from():
    key = cache.key_of(["source", "-DA=1", "13.0"])
    assert cache.read_cubin(key) is None
    cache.write_cubin(key, b"code")
    assert cache.read_cubin(key) == b"code"
    others = (["source", "-DA=1", "13.1"], ["source", "-DA=2", "13.0"], ["source-DA=1", "13.0"])
    assert not any(cache.read_cubin(cache.key_of(parts)) for parts in others)


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 100])
def test_a_damaged_file_is_no_kernel(damage, place):
    cache.write_cubin("key", b"code")
    (place / "cubin" / "key").write_bytes(damage)
    assert cache.read_cubin("key") is None


def test_a_file_too_large_for_a_kernel_is_not_read(place, monkeypatch):
    cache.write_cubin("key", b"code" * 100)
    monkeypatch.setattr(cache, "LARGEST_CUBIN", 64)
    assert cache.read_cubin("key") is None


def test_what_was_used_longest_ago_goes_first(place, monkeypatch):
    for age, key in enumerate(("new", "middle", "old")):
        cache.write_cubin(key, b"x" * 100)
        os.utime(place / "cubin" / key, (1000 - age, 1000 - age))
    assert cache.read_cubin("old") is not None  # and so it is used now
    monkeypatch.setattr(cache, "CUBIN_BYTES", 3 * 140)
    cache.write_cubin("newest", b"x" * 100)
    assert sorted(path.name for path in (place / "cubin").iterdir()) == ["new", "newest", "old"]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(place):
    place.write_text("a file in its place")
    cache.write_cubin("key", b"code")
    assert cache.read_cubin("key") is None
    cache.place_compilers()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_compilers_keep_their_results_by_version_unless_told_where(place, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    cache.place_compilers()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    inductor = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert inductor.startswith(str(place))
    assert f"torch-{cache.version('torch')}" in inductor
