"""Keeps a Mac awake while it trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CAFFEINATE = Path("/usr/bin/caffeinate")
"""The tool of macOS that holds off idle sleep."""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Hold off macOS's idle sleep within this context (`caffeinate -is`); the display may still sleep.

    Sleep that a user asks for, or a closed lid, is not prevented. Does nothing on other systems, or without caffeinate.
    """
    helper = None
    if sys.platform == "darwin":
        quiet = subprocess.DEVNULL
        # -w: caffeinate watches this process, and so ends with it even when it is killed.
        command = [str(CAFFEINATE), "-is", "-w", str(os.getpid())]
        # In a session of its own, Ctrl-C does not reach it: the Mac must stay awake while the run saves and ends.
        with contextlib.suppress(OSError):
            helper = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield
    finally:
        if helper is not None:
            helper.terminate()
            helper.wait()
