import time

import pytest
import torch
from torch import nn

from harness.measure.figures import summarise
from harness.measure.timing import FrameTimer, PartTimer, samples_ms

CPU = torch.device("cpu")


def test_percentiles_are_interpolated():
    stats = summarise(list(range(11)))
    assert (stats.median, stats.p10, stats.p90, stats.mean, stats.n) == (5, 1, 9, 5, 11)


def test_no_times_no_summary():
    assert summarise([]) is None


def test_frame_spans_add_up_to_the_total():
    timer = FrameTimer(CPU, ("dit", "decoder"))
    for pause in (0.004, 0.001):
        timer.start()
        time.sleep(pause)
        timer.lap()
        time.sleep(0.002)
        timer.lap()
    rows = timer.take()
    assert len(rows) == 2
    assert timer.take() == []
    assert rows[0]["dit"] >= 4
    assert rows[0]["decoder"] >= 2
    for row in rows:
        assert row["total"] == pytest.approx(row["dit"] + row["decoder"])


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        time.sleep(0.003)
        return self.inner(x)


class Inner(nn.Module):
    def forward(self, x):
        time.sleep(0.006)
        return x


class Store:
    def put(self, x):
        time.sleep(0.002)
        return x


def test_nested_parts_are_counted_once_and_everything_is_put_back():
    outer, store = Outer(), Store()
    timer = PartTimer(CPU)
    modules = [("outer", outer), ("inner", outer.inner)]
    with timer.installed(modules=modules, methods=[("put", store, "put")]):
        outer(torch.zeros(1))
        store.put(1)
        parts = timer.frame()
    assert 3 <= parts["outer"] < parts["inner"]
    assert parts["inner"] >= 6
    assert parts["put"] >= 2
    outer(torch.zeros(1))
    store.put(1)
    assert timer.frame() == {}
    assert "put" not in vars(store)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_frames_are_timed_by_the_device():
    device = torch.device("cuda")
    timer = FrameTimer(device, ("work",))
    x = torch.randn(4096, 4096, device=device)
    timer.start()
    for _ in range(8):
        x = x @ x
    timer.lap()
    assert timer.take()[0]["work"] > 0.5


@pytest.mark.parametrize("wait", [False, True])
def test_each_call_is_timed_once_and_warm_up_not_at_all(wait):
    calls = []

    def run():
        calls.append(time.perf_counter())
        time.sleep(0.01 if len(calls) > 2 else 0.1)

    times = samples_ms(run, torch.device("cpu"), count=3, warmup=2, wait=wait)
    assert len(calls) == 5
    assert len(times) == 3
    assert all(10 <= ms < 90 for ms in times)
