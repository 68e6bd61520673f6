"""A frame's inputs copied by one launch."""

import threading

import pytest
import torch

from harness.kernels.cuda import nvrtc
from harness.kernels.cuda.inputs import InputCopies

REASON = nvrtc.unavailable() if torch.cuda.is_available() else "needs a CUDA GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SHAPES = [(2, 128, 8, 8), (2, 2), (2, 11)]


def normal(shapes=SHAPES, **how):
    return [torch.randn(*shape, device="cuda", **how) for shape in shapes]


def nans(shapes=SHAPES):
    return [torch.full(shape, torch.nan, device="cuda") for shape in shapes]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_number_arrives_time_after_time(count):
    buffers = nans(SHAPES[:count])
    copies = InputCopies(buffers)
    for _ in range(3):
        given = normal(SHAPES[:count])
        assert copies(given)
        assert all(torch.equal(x, y) for x, y in zip(given, buffers, strict=True))


def test_on_the_stream_that_is_current():
    buffers, given, side = nans(), normal(), torch.cuda.Stream()
    copies = InputCopies(buffers)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a copy on another stream would be there long before
        given[0].add_(1)
        assert copies(given)
    side.synchronize()
    assert torch.equal(buffers[0], given[0])


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.cpu(),
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
)
def test_what_it_cannot_take_is_left_to_others(other):
    buffers, (noise, *controls) = nans(), normal()
    assert not InputCopies(buffers)([other(noise), *controls])
    torch.cuda.synchronize()
    assert all(buffer.isnan().all() for buffer in buffers)


def test_a_thread_that_has_not_used_the_gpu():
    buffers, given = nans(), normal()
    copies, done = InputCopies(buffers), []

    def work():
        done.append(copies(given) or (torch._foreach_copy_(buffers, given), copies(given))[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert done == [True]
    assert all(torch.equal(x, y) for x, y in zip(given, buffers, strict=True))
