"""Keeps a Mac awake while it trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CAFFEINATE = Path("/usr/bin/caffeinate")


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Within this context macOS does not go to sleep by itself (`caffeinate -is`); its display may, and should.

    The helper watches this process, so that it ends even where this one is killed. Nothing happens on other systems, or
    where there is no caffeinate. Sleep that a person asks for, or a closed lid, is not held up.
    """
    helper = None
    if sys.platform == "darwin":
        quiet = subprocess.DEVNULL
        command = [str(CAFFEINATE), "-is", "-w", str(os.getpid())]
        with contextlib.suppress(OSError):  # a session of its own: Ctrl-C is the run's, which saves before it ends
            helper = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield
    finally:
        if helper is not None:
            helper.terminate()
            helper.wait()
