"""The Hadamard basis of ``kv.hadamard``."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(size: int, device: torch.device | str) -> Tensor:
    """Orthonormal float32 ``[size, size]``, Sylvester's: entry i, j is negative if i & j has an odd number of ones.

    It is symmetric, so it is its own inverse. ``size`` is a power of two.
    """
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5
