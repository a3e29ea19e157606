"""Runs the parsers of untrusted documents in a process of their own, restarted when it hangs or crashes.

The parent opens the files; the child (parser_child.py) gets bytes through a pipe, and has given up sockets and writing.
Whatever becomes of the child is a reason for which a file was not read, and never ends the reading.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

from edgetune.documents.encoding import NotText
from edgetune.documents.formats.parsed import KINDS, Parsed
from edgetune.documents.limits import MAX_TEXT_BYTES, PARSE_SECONDS
from edgetune.documents.parser_child import LENGTH
from edgetune.documents.reasons import Reason
from edgetune.runtime import json_file

ALL_LIMITS = frozenset({"memory", "writes", "files", "time"})
"""Limits that the child reports where its system enforces all of them."""
_POLL_SECONDS = 0.1
"""Time between two looks at a child that parses, in seconds: within it, Ctrl-C is noticed. Chosen by hand."""
_START_SECONDS = 60.0
"""Longest time that a child may take to start, in seconds. Chosen by hand: a slow disk takes ten."""
_KEPT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP")
"""Variables of the environment that the child inherits: no token or key is among them."""


class Ended(Exception):
    """Raised where the child ended, or answered with what is no answer."""


class NotStarted(NotText):
    """Raised where no child could be started, which says nothing of the file."""


@dataclass
class _Child:
    """A running child and the thread that talks to it."""

    process: subprocess.Popen[bytes]
    talker: ThreadPoolExecutor

    def exchange(self, messages: list[bytes]) -> dict[str, Any]:
        """Send messages and return the answer. Raises Ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            for message in messages:
                self.process.stdin.write(LENGTH.pack(len(message)))
                self.process.stdin.write(message)
            self.process.stdin.flush()
            head = self.process.stdout.read(LENGTH.size)
            length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else MAX_TEXT_BYTES + 1
            data = self.process.stdout.read(length) if length <= MAX_TEXT_BYTES else b""
            found = json_file.parse(data) if len(data) == length else None
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise Ended
        return found

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.talker.shutdown()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent yet
                    pipe.close()


class ParserProcess:
    """Parses documents in one child process, which is started with the first document. Use it as a context manager."""

    def __init__(self, seconds: float = PARSE_SECONDS) -> None:
        self._seconds = seconds
        self._child: _Child | None = None
        self.unlimited: frozenset[str] = frozenset()
        """Limits of ALL_LIMITS that this system does not enforce, once a child has run."""

    def __enter__(self) -> ParserProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def parse(self, module: str, data: bytes, waiting: Callable[[], None] = lambda: None) -> Parsed:
        """Return what the format's `module` reads in a file's bytes. Raises NotText with the reason why it cannot: NotStarted
        where the file has nothing to do with that.

        waiting: called ten times a second meanwhile. It may raise to end the work, which ends the child too.
        """
        try:
            child = self._child or self._start(waiting)
            return _checked(self._answer(child, [module.encode(), data], self._seconds, waiting))
        except NotText:
            raise
        except Ended:
            self.close()
            raise NotText(Reason.UNPARSED) from None
        except NotYet:
            self.close()
            raise NotText(Reason.TOO_SLOW) from None
        except BaseException:
            self.close()
            raise

    def _start(self, waiting: Callable[[], None]) -> _Child:
        """Start a child and wait until it has given up its rights. Raises NotStarted, also where that takes too long."""
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # The child may read what Python imports from, so the user's present folder must not be among it, except in a clone.
        here = os.getcwd()
        paths = [place for place in sys.path if place and (place != here or os.path.isdir(os.path.join(place, "edgetune")))]
        process = subprocess.Popen(
            [sys.executable, "-B", "-P", "-m", "edgetune.documents.parser_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"},
        )
        self._child = _Child(process, ThreadPoolExecutor(1, "parser"))
        try:
            hello = self._answer(self._child, [], _START_SECONDS, waiting)
        except (Ended, NotYet):
            self.close()
            raise NotStarted(Reason.UNPARSED) from None
        limits = hello.get("limits")
        self.unlimited = ALL_LIMITS - {str(name) for name in limits} if isinstance(limits, list) else ALL_LIMITS
        return self._child

    def _answer(self, child: _Child, messages: list[bytes], seconds: float, waiting: Callable[[], None]) -> dict[str, Any]:
        """Return the child's answer. Raises NotYet when it takes longer than `seconds`."""
        waits: Future[dict[str, Any]] = child.talker.submit(child.exchange, messages)
        deadline = time.monotonic() + seconds
        while True:
            try:
                return waits.result(_POLL_SECONDS)
            except NotYet:
                if time.monotonic() > deadline:
                    raise
                waiting()


def _checked(found: dict[str, Any]) -> Parsed:
    """Return the parsed texts of an answer, which an untrusted file may have forged. Raises NotText, or Ended for no answer."""
    reason, texts, left_out = found.get("reason"), found.get("texts"), found.get("left_out")
    if isinstance(reason, str) and reason in Reason.__members__:
        raise NotText(Reason[reason])
    if not isinstance(texts, list) or not isinstance(left_out, dict) or not all(isinstance(text, str) for text in texts):
        raise Ended
    counts = {kind: count for kind, count in left_out.items() if kind in KINDS and isinstance(count, int)}
    return Parsed([text.replace("\0", "") for text in texts], Counter(counts))
