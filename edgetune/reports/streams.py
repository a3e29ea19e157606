"""Standard output and error that fail as other files do not: closed, full, left by their reader, or without some letters.

What is written there must never end hours of work, and its failures must not look like those of a disk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from edgetune.runtime.errors import EdgetuneError

_STANDARD_DESCRIPTORS = 3


class OutputError(EdgetuneError):
    """Standard output that cannot be written."""


class _Guarded(io.RawIOBase):
    """A standard stream's bytes. Once writing has failed, the rest is dropped where `goes_on` is set, and refused elsewhere."""

    def __init__(self, stream: TextIO, is_error: bool) -> None:
        raw = stream.buffer
        self._raw, self._fd = getattr(raw, "raw", raw), stream.fileno()
        self.is_error = self.goes_on = is_error  # nothing can be said about standard error that fails
        self.failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        """Write some of `data` and return how many bytes. Raises BrokenPipeError or OutputError, unless the work goes on."""
        if self.failed:
            return len(data)
        try:
            return self._raw.write(data)
        except OSError as error:
            self.failed = True
            problem = f"Standard output cannot be written ({error.strerror})."
            if self.goes_on:
                if not self.is_error:
                    print(f"edgetune: {problem} Nothing more is shown, and the work goes on.", file=sys.stderr, flush=True)
                return len(data)
            if error.errno == errno.EPIPE:
                raise
            raise OutputError(f"{problem} Free some space, or name another file.") from error


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Guard standard output and standard error within this context.

    Closed ones (as under pythonw) take everything and show nothing. Letters that the encoding lacks are shown as "?".
    """
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _guard(sys.stdout, False), _guard(sys.stderr, True)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, OutputError):
                stream.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def work_goes_on() -> Iterator[None]:
    """Let what is done within this context continue when standard output fails; one sentence then says so."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Guarded):
        yield
        return
    raw.goes_on = True
    try:
        yield
        sys.stdout.flush()
    finally:
        raw.goes_on = False


def _guard(stream: TextIO | None, is_error: bool) -> TextIO:
    """Return a text stream that writes where `stream` does; one that is in memory, as in tests, is left as it is."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        raw = _Guarded(stream, is_error)
    except (OSError, AttributeError, io.UnsupportedOperation):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors="replace",
        line_buffering=is_error or stream.isatty(),
    )


def _fill_closed_descriptors() -> None:
    """Open what is closed of descriptors 0 to 2: the next file would get its number, and native code would write into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _STANDARD_DESCRIPTORS:
        pass
    os.close(descriptor)
