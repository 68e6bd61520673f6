"""Wall times of a rollout: per frame in the real loop, and per part in a separate instrumented pass.

On a GPU times are CUDA events around work that is synchronised after every frame, because a player's next
action waits for the frame; elsewhere they are ``time.perf_counter``. All times are milliseconds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Clock:
    """Reads the time at a point of a device's queue, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        """A time stamp to pass to :meth:`elapsed_ms` after :meth:`synchronise`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronise(self) -> None:
        """Wait until all work queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two stamps."""
        return start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3


def samples_ms(
    run: Callable[[], object], device: torch.device, count: int, warmup: int = 0, wait: bool = False
) -> list[float]:
    """Milliseconds of each of ``count`` calls of ``run``, after ``warmup`` calls that are not timed.

    On a GPU between events around what a call queues; the calls follow one another without a gap unless ``wait``: then
    each is waited for before the next begins. Elsewhere wall times.
    """
    clock = Clock(device)
    for _ in range(warmup):
        run()
    clock.synchronise()
    stamps = []
    for _ in range(count):
        start = clock.now()
        run()
        stamps.append((start, clock.now()))
        if wait:
            clock.synchronise()
    clock.synchronise()
    return [clock.elapsed_ms(start, end) for start, end in stamps]


class FrameTimer:
    """Splits each frame's time into consecutive spans and keeps one row of milliseconds per frame.

    ``start``, then ``lap`` once at the end of each span (the last lap ends the frame and synchronises).
    """

    def __init__(self, device: torch.device, spans: Sequence[str]) -> None:
        self.clock = Clock(device)
        self.spans = tuple(spans)
        self.rows: list[dict[str, float]] = []
        self._stamps: list[Any] = []

    def start(self) -> None:
        """Begin a frame on an idle device."""
        self.clock.synchronise()
        self._stamps = [self.clock.now()]

    def lap(self) -> None:
        """End the current span; ends the frame if it was the last."""
        self._stamps.append(self.clock.now())
        if len(self._stamps) == len(self.spans) + 1:
            self._finish()

    def _finish(self) -> None:
        self.clock.synchronise()
        pairs = zip(self.spans, self._stamps, self._stamps[1:], strict=False)
        row = {span: self.clock.elapsed_ms(a, b) for span, a, b in pairs}
        row["total"] = self.clock.elapsed_ms(self._stamps[0], self._stamps[-1])
        self.rows.append(row)

    def take(self) -> list[dict[str, float]]:
        """Hand over the rows so far and begin a new list."""
        rows, self.rows = self.rows, []
        return rows


class PartTimer:
    """Times named parts of code it does not own, nested parts counted once.

    A part's time excludes the parts that ran inside it, so the parts of a frame add up. Modules are timed
    by forward hooks and callables by wrapping; :meth:`installed` puts everything back.
    """

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self._open: list[tuple[str, Any, list[tuple[Any, Any]]]] = []
        self._closed: list[tuple[str, Any, Any, list[tuple[Any, Any]]]] = []

    def _enter(self, part: str) -> None:
        self._open.append((part, self.clock.now(), []))

    def _exit(self) -> None:
        part, start, inner = self._open.pop()
        end = self.clock.now()
        if self._open:
            self._open[-1][2].append((start, end))
        self._closed.append((part, start, end, inner))

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its time counted as ``part``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            result = function(*args, **kwargs)
            self._exit()
            return result

        return timed

    @contextmanager
    def installed(
        self,
        modules: Sequence[tuple[str, nn.Module]] = (),
        methods: Sequence[tuple[str, Any, str]] = (),
    ) -> Iterator[PartTimer]:
        """Time ``modules`` (part, module) and ``methods`` (part, object, method name) inside the context."""
        hooks = []
        for part, module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part)))
            hooks.append(module.register_forward_hook(lambda *_: self._exit()))
        for part, owner, name in methods:
            # An attribute of the instance hides the class's method; deleting it afterwards brings the
            # method back.
            setattr(owner, name, self.wrap(part, getattr(owner, name)))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            for _, owner, name in methods:
                delattr(owner, name)

    def frame(self) -> dict[str, float]:
        """Milliseconds of each part since the last call."""
        self.clock.synchronise()
        parts: dict[str, float] = defaultdict(float)
        for part, start, end, inner in self._closed:
            own = self.clock.elapsed_ms(start, end) - sum(self.clock.elapsed_ms(a, b) for a, b in inner)
            parts[part] += own
        self._closed.clear()
        return dict(parts)
