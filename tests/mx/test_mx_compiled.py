"""Encoding within compiled code, on the CPU: the bits of eager code."""

import pytest
import torch

from harness.formats.mx import E4M3, FORMATS, decode, encode, stored_values
from harness.formats.scales import ScaleMode
from harness.kv.codecs import Int8Codec

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_the_numbers_of_a_format_never_become_symbols():
    """Inductor computes with symbols in 64 bits, where the bits of a float32 no longer fit."""
    numbers = []

    def look(graph, example_inputs):
        numbers.extend(node for node in graph.graph.find_nodes(op="placeholder") if "Sym" in str(node.type))
        return graph

    def both_ways(x, fmt, mode):
        return decode(encode(x, fmt, mode), fmt)

    compiled, x = torch.compile(both_ways, backend=look, fullgraph=True), torch.randn(4, 64).bfloat16()
    with torch._dynamo.config.patch(recompile_limit=len(FORMATS) * len(ScaleMode)):
        for mode in ScaleMode:
            for fmt in FORMATS.values():
                torch.testing.assert_close(compiled(x, fmt, mode), both_ways(x, fmt, mode), rtol=0, atol=0)
    assert not numbers


def test_rounding_by_bits_is_that_of_bf16(monkeypatch):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-40, 38, 4096)
    ties = torch.arange(0x3F800000, 0x3F900000, 0x8000, dtype=torch.int32).view(torch.float32)
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat((values, ties, nan, torch.tensor([0.0, -0.0, 3.4e38, torch.inf, -torch.inf])))

    class Unrounded:
        """BF16 as a fused kernel holds it: said to be BF16, in fact float32."""

        dtype = torch.bfloat16

        def to(self, dtype):
            return x

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(stored_values(Unrounded()), x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_what_is_quantised_is_bf16_where_encoding_is_fused_with_what_made_it():
    """A product of two BF16 values, exact in float32, which a fused kernel need not round."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 64, generator=generator).bfloat16() for _ in range(2))

    def made_and_encoded(x, y):
        return encode(x * y, E4M3), Int8Codec().encode(x * y)

    # no pool of compiling processes, which would outlive the test
    compiled = torch.compile(made_and_encoded, fullgraph=True, options={"compile_threads": 1})
    for got, want in zip(compiled(x, y), made_and_encoded(x, y), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
