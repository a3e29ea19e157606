"""Asks the desktop to show a notification or to open a file, by the system's own program; without one, nothing happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

MOST_SECONDS = 5.0
"""Seconds after which a desktop that does not answer is left alone. Chosen by hand."""
_APPLESCRIPT = (
    "on run argv",
    "display notification (item 2 of argv) with title (item 1 of argv)",
    "end run",
)
"""The lines of an AppleScript that shows its arguments: text passed so cannot become a command."""


def notify(title: str, text: str) -> bool:
    """Show a notification; return False where the system has no program for that. Pass no text of a note."""
    if sys.platform == "darwin":
        words = ["osascript", *(word for line in _APPLESCRIPT for word in ("-e", line)), title, text]
    else:
        words = ["notify-send", "--app-name=edgetune", "--", title, text]
    return _run(words)


def open_file(path: Path) -> bool:
    """Open a file with the program that the desktop uses for it; return False where there is no desktop."""
    if sys.platform == "win32":
        os.startfile(path)
        return True
    if sys.platform == "darwin":
        return _run(["open", str(path)])
    has_screen = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return has_screen and _run(["xdg-open", str(path)])


def _run(words: list[str]) -> bool:
    """Run a program without input or output; return True if it is here and ended well in time."""
    if shutil.which(words[0]) is None:
        return False
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(words, stdin=quiet, stdout=quiet, stderr=quiet, timeout=MOST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
