"""macOS's launchd: a property list in ~/Library/LaunchAgents, as launchd.plist(5) says.

launchd runs a job that it missed because the Mac slept as soon as the Mac wakes.
"""

from __future__ import annotations

import os
import plistlib
import shutil
from pathlib import Path

from edgetune.nights.schedulers.scheduler import Plan, Scheduler, Written, apply, ask, remove
from edgetune.runtime.files import atomic_write

LABEL = "edgetune.nightly"


class Launchd(Scheduler):
    """Starts the nights as a LaunchAgent of the user."""

    name = "launchd"

    def lacking(self) -> str | None:
        """Return why launchd cannot be used: this is no Mac."""
        return None if shutil.which("launchctl") else "launchd is part of macOS, and this system has no launchctl."

    def written(self, plan: Plan) -> list[Written]:
        """Return the property list."""
        job = {
            "Label": LABEL,
            "ProgramArguments": list(plan.command),
            "EnvironmentVariables": dict(plan.environment),
            "WorkingDirectory": plan.folder,
            "StartCalendarInterval": {"Hour": plan.hour, "Minute": plan.minute},
            # Background would let macOS slow the CPU down to a fraction; the process lowers its own priority.
            "ProcessType": "Standard",
            "LowPriorityIO": True,
            "RunAtLoad": False,
            "StandardOutPath": plan.log,
            "StandardErrorPath": plan.log,
        }
        return [Written(str(_path()), plistlib.dumps(job).decode())]

    def commands(self) -> list[list[str]]:
        """Return the command that loads the property list."""
        return [["launchctl", "bootstrap", _domain(), str(_path())]]

    def install(self, plan: Plan) -> None:
        """Write the property list and load it."""
        (written,) = self.written(plan)
        ask(["launchctl", "bootout", f"{_domain()}/{LABEL}"])  # fails where nothing was installed before
        atomic_write(written.place, written.text)
        for command in self.commands():
            apply(command)

    def uninstall(self) -> None:
        """Unload the job and delete its property list."""
        ask(["launchctl", "bootout", f"{_domain()}/{LABEL}"])
        remove(_path())

    def is_installed(self) -> bool:
        """Return True if launchd has loaded the job."""
        done = ask(["launchctl", "print", f"{_domain()}/{LABEL}"])
        return done is not None and done.returncode == 0

    def start(self, plan: Plan) -> None:
        """Let launchd run the job now."""
        apply(["launchctl", "kickstart", f"{_domain()}/{LABEL}"])


def _path() -> Path:
    return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def _domain() -> str:
    return f"gui/{os.getuid() if hasattr(os, 'getuid') else 0}"
