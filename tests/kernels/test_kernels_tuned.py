"""Measured launch shapes as data: every entry says where it was found, and a GPU's own win over another's."""

import re

import pytest

from harness.kernels import tuned
from harness.kernels.cuda.shapes import CudaConfig, CudaShape, Role, choose, fits, suits

CUDA = "harness.kernels.cuda"
H100 = "NVIDIA H100 80GB HBM3"


def test_every_file_says_gpu_date_and_commit_and_its_shapes_fit():
    files = tuned.read(CUDA)
    assert H100 in {file["gpu"] for file in files}
    for file in files:
        assert file["fields"] == list(CudaConfig.__dataclass_fields__)
        for run in file["runs"]:
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])
            assert re.fullmatch(r"[0-9a-f]{7,}", run["commit"])
            for shape in run["shapes"]:
                product, config = CudaShape(shape["m"], shape["n"], shape["k"], shape["bits"]), shape["config"]
                assert fits(CudaConfig(*config), product), shape
                role = Role(shape.get("role", Role.plain))
                assert suits(CudaConfig(*config), product, role), shape
                if run is file["runs"][-1] and file["gpu"] == H100:
                    assert choose(product, H100, role) == CudaConfig(*config)


@pytest.fixture
def files(monkeypatch):
    def use(*found):
        monkeypatch.setattr(tuned, "read", lambda package: found)
        tuned.shapes.cache_clear()

    yield use
    tuned.shapes.cache_clear()


def test_a_gpus_own_shapes_win_over_those_of_its_kind_and_later_runs_over_earlier(files):
    def file(gpu, *runs, capability=90):
        return {"gpu": gpu, "capability": capability, "runs": [{"shapes": list(run)} for run in runs]}

    files(file("A", ["old"], ["new"]), file("B", ["other"]), file("C", ["ampere"], capability=80))
    assert tuned.shapes(CUDA, "A", 90) == ("old", "new")
    assert tuned.shapes(CUDA, "H200", 90) == ("old", "new", "other")
    assert tuned.shapes(CUDA, None, 80) == ("ampere",)
    assert tuned.shapes(CUDA, "C", 90) == ("old", "new", "other")


def test_a_package_without_measurements_has_none():
    assert tuned.read("harness.kernels.triton") == ()


@pytest.mark.parametrize("role", [Role.norm, Role.residual])
def test_a_role_that_nobody_measured_has_a_shape_that_fits(role, monkeypatch):
    for bits in (4, 8, 16):
        for n, k, rows in ((4608, 1536, 64), (2560, 10240, 49), (48, 96, 3)):
            product = CudaShape(rows, n, k, bits)
            assert suits(choose(product, H100, role), product, role)
            assert suits(choose(product, "a GPU without a file", role), product, role)
            with monkeypatch.context() as nothing:
                nothing.setattr("harness.kernels.cuda.shapes.tuned", lambda *args: {})
                assert suits(choose(product, H100, role), product, role)
