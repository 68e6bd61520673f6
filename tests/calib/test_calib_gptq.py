"""GPTQ on MX blocks: what it must lose less of than rounding to nearest, and what it must never do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.calib import gptq as gptq_room
from harness.calib.gptq import Grid, Rounded, damped, gptq, inverse
from harness.formats.mx import BLOCK, E2M1, E4M3, E5M2, ElementFormat, MXBlocks, decode, encode, encode_with_scales

FORMATS = pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda fmt: fmt.name)


def correlated_inputs(rows: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator).square()
    return torch.randn(rows, inputs, generator=generator) @ mixing


def a_weight(outputs: int = 96, inputs: int = 128) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) * 0.05


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def rounded(weight: Tensor, x: Tensor, fmt: ElementFormat, damping: float = 0.01, sweeps: int = 0) -> Rounded:
    hessian = damped(second_moment(x), damping)
    return gptq(weight, hessian, inverse(hessian), fmt, sweeps)


def values(result: Rounded, fmt: ElementFormat) -> Tensor:
    return decode(result.blocks, fmt, torch.float32)


def output_error(weight: Tensor, got: Tensor, x: Tensor) -> float:
    return float((x @ (weight - got).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_is_rounded_as_the_formats_encode_it(fmt: ElementFormat, dtype: torch.dtype) -> None:
    spread = torch.logspace(-6, 6, 320) * torch.randn(320, generator=torch.Generator().manual_seed(2)).sign()
    x = spread.view(-1, BLOCK)
    ones = torch.full((len(x), 1), 127, dtype=torch.uint8)
    expected = decode(MXBlocks(encode_with_scales(x, ones, fmt), ones), fmt, torch.float32)
    assert torch.equal(Grid(fmt, dtype, x.device).round(x.to(dtype)).float(), expected)


@FORMATS
def test_outputs_of_inputs_never_seen_lose_a_third_less_than_by_rounding_to_nearest(fmt: ElementFormat) -> None:
    weight, seen, unseen = a_weight(), *correlated_inputs(6000, 128).chunk(2)
    nearest = decode(encode(weight, fmt), fmt, torch.float32)
    got = values(rounded(weight, seen, fmt, sweeps=4), fmt)
    assert output_error(weight, got, unseen) < 0.67 * output_error(weight, nearest, unseen)


@FORMATS
def test_sweeps_lower_the_loss_and_never_raise_it(fmt: ElementFormat) -> None:
    weight, x = a_weight(), correlated_inputs(3000, 128)
    plain, swept, more = (rounded(weight, x, fmt, sweeps=sweeps).loss for sweeps in (0, 2, 4))
    assert swept.sum() < 0.9 * plain.sum()
    assert (more <= swept * (1 + 1e-6)).all()


def test_the_loss_is_that_of_the_blocks_handed_back() -> None:
    weight, x = a_weight(), correlated_inputs(3000, 128)
    result = rounded(weight, x, E2M1, sweeps=1)
    difference = (weight - values(result, E2M1)).double()
    expected = ((difference @ damped(second_moment(x), 0.01)) * difference).sum(-1).float()
    torch.testing.assert_close(result.loss, expected, rtol=1e-3, atol=0)


def test_inputs_that_know_nothing_of_each_other_leave_nothing_to_make_up_for() -> None:
    weight = a_weight()
    hessian = torch.eye(weight.shape[1], dtype=torch.float64)
    got = decode(gptq(weight, hessian, hessian, E2M1, sweeps=3).blocks, E2M1, torch.float32)
    candidates = [encode(weight, E2M1, mode) for mode in ("rceil", "floor")]
    errors = [(decode(blocks, E2M1, torch.float32) - weight).square() for blocks in candidates]
    best = torch.minimum(*(error.unflatten(-1, (-1, BLOCK)).sum(-1) for error in errors))
    found = (got - weight).square().unflatten(-1, (-1, BLOCK)).sum(-1)
    assert (found <= best * (1 + 1e-6)).all()
    assert torch.equal(got == weight.sign() * got.abs(), torch.ones_like(got, dtype=torch.bool))


def test_rows_in_chunks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = a_weight(), correlated_inputs(3000, 128)
    whole = rounded(weight, x, E2M1, sweeps=1)
    monkeypatch.setattr(gptq_room, "CHUNK_ELEMENTS", 128 * 40)
    chunked = rounded(weight, x, E2M1, sweeps=1)
    for one, other in zip(whole.blocks, chunked.blocks, strict=True):
        assert torch.equal(one, other)


def test_an_input_that_was_always_zero_does_no_harm() -> None:
    weight, x = a_weight(), correlated_inputs(3000, 128)
    x[:, 5:40] = 0
    got = values(rounded(weight, x, E2M1, damping=0.0), E2M1)
    assert got.isfinite().all()
    assert output_error(weight, got, x) < 0.1
    assert values(rounded(weight, torch.zeros(10, 128), E2M1), E2M1).isfinite().all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight, x = a_weight(), correlated_inputs(3000, 128)
    weight[3] = 0
    result = rounded(weight, x, E2M1, sweeps=2)
    assert not values(result, E2M1)[3].any()
    assert values(result, E2M1).isfinite().all()


def test_statistics_that_cannot_be_inverted_say_what_to_do() -> None:
    x = correlated_inputs(20, 128)
    with pytest.raises(ValueError, match="raise calib.damping"):
        inverse(damped(second_moment(x), 0.0))
    with pytest.raises(ValueError, match="raise calib.damping"):
        inverse(torch.full((32, 32), torch.nan, dtype=torch.float64))
