"""Windows's Task Scheduler: a task in XML (UTF-16), as Microsoft's Task Scheduler Schema says.

StartWhenAvailable makes up for a night that was missed because the machine was off or asleep.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from edgetune.nights.job import nights_folder
from edgetune.nights.schedulers.scheduler import NAME, Plan, Scheduler, Written, apply, ask, remove
from edgetune.runtime.files import atomic_write

NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"
FIRST_DAY = "2026-01-01"
"""Day of the first night in the task's calendar: any day that is past."""
_BELOW_NORMAL = "7"
"""Priority of the task's process, from 0 to 10: 7 is below normal, and the process lowers its own to idle."""

_TRUE, _FALSE = "true", "false"


class TaskScheduler(Scheduler):
    """Starts the nights as a task of the user."""

    name = "task-scheduler"

    def lacking(self) -> str | None:
        """Return why Task Scheduler cannot be used: this is not Windows."""
        return None if shutil.which("schtasks") else "Task Scheduler is part of Windows, and this system has no schtasks."

    def written(self, plan: Plan) -> list[Written]:
        """Return the task."""
        task = ElementTree.Element("Task", {"version": "1.2", "xmlns": NAMESPACE})
        _add(task, "RegistrationInfo", {"Description": "edgetune learns from new notes"})
        calendar = ElementTree.SubElement(ElementTree.SubElement(task, "Triggers"), "CalendarTrigger")
        # Without a zone, the time is a local one, which follows the changes of the clock.
        ElementTree.SubElement(calendar, "StartBoundary").text = f"{FIRST_DAY}T{plan.at.rjust(5, '0')}:00"
        ElementTree.SubElement(calendar, "Enabled").text = _TRUE
        _add(calendar, "ScheduleByDay", {"DaysInterval": "1"})
        principal = ElementTree.SubElement(ElementTree.SubElement(task, "Principals"), "Principal", {"id": "Author"})
        ElementTree.SubElement(principal, "LogonType").text = "InteractiveToken"
        ElementTree.SubElement(principal, "RunLevel").text = "LeastPrivilege"
        _add(task, "Settings", _settings(plan))
        actions = ElementTree.SubElement(task, "Actions", {"Context": "Author"})
        program, *arguments = plan.command
        # A task cannot set variables: the command itself takes them.
        arguments += [part for name, value in plan.environment.items() for part in ("--set", f"{name}={value}")]
        _add(
            actions,
            "Exec",
            {"Command": program, "Arguments": subprocess.list2cmdline(arguments), "WorkingDirectory": plan.folder},
        )
        ElementTree.indent(task)
        text = ElementTree.tostring(task, encoding="unicode")
        return [Written(str(_path()), f'<?xml version="1.0" encoding="UTF-16"?>\n{text}\n')]

    def commands(self) -> list[list[str]]:
        """Return the command that registers the task."""
        return [["schtasks", "/Create", "/TN", NAME, "/XML", str(_path()), "/F"]]

    def install(self, plan: Plan) -> None:
        """Write the task and register it."""
        (written,) = self.written(plan)
        atomic_write(written.place, written.text.encode("utf-16"))
        for command in self.commands():
            apply(command)

    def uninstall(self) -> None:
        """End and delete the task."""
        ask(["schtasks", "/End", "/TN", NAME])
        ask(["schtasks", "/Delete", "/TN", NAME, "/F"])
        remove(_path())

    def is_installed(self) -> bool:
        """Return True if Task Scheduler knows the task."""
        done = ask(["schtasks", "/Query", "/TN", NAME])
        return done is not None and done.returncode == 0

    def start(self, plan: Plan) -> None:
        """Let Task Scheduler run the task now."""
        apply(["schtasks", "/Run", "/TN", NAME])


def _settings(plan: Plan) -> dict[str, str]:
    """Return the task's settings. Windows would by default neither start on battery nor go on: a night waits for mains itself,
    and resumes."""
    return {
        "DisallowStartIfOnBatteries": _FALSE,
        "StopIfGoingOnBatteries": _FALSE,
        "StartWhenAvailable": _TRUE,
        "WakeToRun": _TRUE if plan.wake else _FALSE,
        "MultipleInstancesPolicy": "IgnoreNew",
        "AllowHardTerminate": _TRUE,
        "RunOnlyIfNetworkAvailable": _FALSE,
        "RunOnlyIfIdle": _FALSE,
        "ExecutionTimeLimit": f"PT{plan.hours}H",
        "Priority": _BELOW_NORMAL,
        "Enabled": _TRUE,
    }


def _add(parent: ElementTree.Element, name: str, children: dict[str, str]) -> None:
    """Add an element with children that hold text alone."""
    element = ElementTree.SubElement(parent, name)
    for child, text in children.items():
        ElementTree.SubElement(element, child).text = text


def _path() -> Path:
    return nights_folder() / "task.xml"
