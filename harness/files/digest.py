"""One SHA-256 of all that decides a result: tensors, settings, the code that computes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]


class Digest:
    """Takes in tensors by their bytes, settings by their values, code by its text; order and names count."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def tensors(self, named: Mapping[str, Tensor]) -> Digest:
        """Names, element types, shapes and bytes."""
        for name, tensor in named.items():
            self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            array: NDArray[np.uint8] = values.numpy()
            self._hash.update(array.data)
        return self

    def settings(self, **values: Any) -> Digest:
        """Plain data; what JSON does not know counts by its text."""
        self._hash.update(json.dumps(values, sort_keys=True, default=str).encode())
        return self

    def code(self, rooms: Iterable[str] = ("",)) -> Digest:
        """Every Python file of these rooms of the package; by default of the whole package."""
        for room in rooms:
            for file in sorted((PACKAGE / room).rglob("*.py")):
                self._hash.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
        return self

    def copy(self) -> Digest:
        """One that goes on from here by itself."""
        other = Digest()
        other._hash = self._hash.copy()
        return other

    def hex(self) -> str:
        """64 characters."""
        return self._hash.hexdigest()
