"""Standard streams whose reader may leave (``| head -1``) and whose disk may be full (``> /dev/full``)."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def shown(text: str) -> str:
    """``text`` as a terminal may have it: of what a file brought into it, control characters are shown, not obeyed."""
    plain = (one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
    return "".join(plain)


def complain(error: object, more: Iterable[str] = ()) -> None:
    """Tell on standard error what is wrong, and ``more`` lines of it."""
    print(shown("\n".join([f"error: {error}", *more])), file=sys.stderr)


class PatientStream:
    """A text stream that drops what cannot be written: a run is worth more than what it says.

    Attributes:
        lost: why the first thing was dropped; ``None`` if nothing was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``, or drop it; returns its length."""
        try:
            if self.lost is None:
                self._written(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def _written(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a path that is no UTF-8, or a terminal of fewer letters
            coding = self._stream.encoding
            self._stream.write(text.encode(coding, "backslashreplace").decode(coding))

    def flush(self) -> None:
        """Flush, or drop what waits."""
        try:
            if self.lost is None:
                self._stream.flush()
        except OSError as error:
            self._lose(error)

    def writelines(self, lines: Any) -> None:
        """Write every line, or drop it."""
        for line in lines:
            self.write(line)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        # What is still buffered would fail once more when Python closes the stream, and change the exit code.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Within the context standard output and error drop what they cannot write.

    Afterwards, if something was lost for another reason than that its reader left, standard error says so.
    """
    before = sys.stdout, sys.stderr
    streams = [
        PatientStream(stream if stream is not None else _null(number)) for number, stream in enumerate(before, 1)
    ]
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        out, _ = streams
        if out.lost is not None and out.lost.errno != errno.EPIPE:
            print(f"note: standard output was lost: {out.lost.strerror}", file=sys.stderr, flush=True)
        sys.stdout, sys.stderr = before


def patient(command: Callable[P, T]) -> Callable[P, T]:
    """A command whose work does not depend on whether anybody reads what it says."""

    @wraps(command)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with patient_streams():
            return command(*args, **kwargs)

    return called


def _null(number: int) -> TextIO:
    """For a stream that is closed (``>&-``), so that no file of the run gets its number."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    return os.fdopen(number, "w", encoding="utf-8", closefd=False)
