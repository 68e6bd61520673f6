"""Triton's interpreter without what it does again and again to no effect: half of the time of a kernel's test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any


def quicken() -> None:
    """Make kernels that are interpreted faster; what they compute, and what is checked, stays the same.

    A device function's call patches ``triton.language``, which its launch has patched already. And sums and products
    of integers are made a second time in 64 bits for an assertion that only ``debug`` keeps, which is off.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug  # else overflows would be asserted
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[Any] = set()

    @cache
    def languages(fn: Any) -> frozenset[int]:
        modules = (interpreter.tl, interpreter.tl.core)
        return frozenset(id(value) for value in fn.__globals__.values() if any(value is each for each in modules))

    def patch_once(fn: Any) -> Any:
        if languages(fn) <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages(fn))
        return patch(fn)

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_once
