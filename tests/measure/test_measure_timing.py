import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.measure.figures import summarise
from harness.measure.timing import Clock, FrameTimer, PartTimer, samples_ms

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A time that passes when a test says so: on a busy machine the real one passes as it likes."""
    made = SimpleNamespace(seconds=1000.0, perf_counter=lambda: made.seconds)

    def passes(ms):
        made.seconds += ms / 1e3

    made.passes = passes
    monkeypatch.setattr("harness.measure.timing.time", made)
    return made


def test_a_cpus_clock_is_the_machines():
    clock = Clock(CPU)
    start = clock.now()
    time.sleep(0.003)
    assert clock.elapsed_ms(start, clock.now()) >= 3


def test_percentiles_are_interpolated():
    stats = summarise(list(range(11)))
    assert (stats.median, stats.p10, stats.p90, stats.mean, stats.n) == (5, 1, 9, 5, 11)


def test_no_times_no_summary():
    assert summarise([]) is None


def test_frame_spans_add_up_to_the_total(clock):
    timer = FrameTimer(CPU, ("dit", "decoder"))
    for ms in (4, 1):
        timer.start()
        clock.passes(ms)
        timer.lap()
        clock.passes(2)
        timer.lap()
        clock.passes(50)  # between frames
    assert timer.take() == [
        pytest.approx({"dit": 4, "decoder": 2, "total": 6}),
        pytest.approx({"dit": 1, "decoder": 2, "total": 3}),
    ]
    assert timer.take() == []


class Outer(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock, self.inner = clock, Inner(clock)

    def forward(self, x):
        self.clock.passes(3)
        x = self.inner(x)
        self.clock.passes(1)
        return x


class Inner(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self, x):
        self.clock.passes(6)
        return x


class Store:
    def __init__(self, clock):
        self.clock = clock

    def put(self, x):
        self.clock.passes(2)
        return x


def test_nested_parts_are_counted_once_and_everything_is_put_back(clock):
    outer, store = Outer(clock), Store(clock)
    timer = PartTimer(CPU)
    modules = [("outer", outer), ("inner", outer.inner)]
    with timer.installed(modules=modules, methods=[("put", store, "put")]):
        for _ in range(2):
            outer(torch.zeros(1))
            clock.passes(20)  # of no part
            store.put(1)
        parts = timer.frame()
    assert parts == pytest.approx({"outer": 8, "inner": 12, "put": 4})
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
def test_each_call_is_timed_once_and_warm_up_not_at_all(clock, wait):
    calls = []

    def run():
        calls.append(None)
        clock.passes(10 * len(calls))

    times = samples_ms(run, CPU, count=3, warmup=2, wait=wait)
    assert len(calls) == 5
    assert times == pytest.approx([30, 40, 50])
