"""systemd's user manager: a service and a timer, as systemd.service(5), systemd.timer(5) and systemd.syntax(7) say.

A timer with Persistent=true makes up for a night that it missed because the machine was off or asleep.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgetune.nights.schedulers.scheduler import NAME, Plan, Scheduler, Written, apply, ask, remove
from edgetune.runtime.files import atomic_write

SERVICE, TIMER = f"{NAME}.service", f"{NAME}.timer"
STOP_SECONDS = 60
"""Seconds that systemd gives a night to save its state when the machine shuts down; chosen by hand."""


class Systemd(Scheduler):
    """Starts the nights by a timer of the user's own systemd."""

    name = "systemd"

    def lacking(self) -> str | None:
        """Return why systemd cannot be used: this user has no manager of their own."""
        done = ask(["systemctl", "--user", "show-environment"])
        if done is None or done.returncode:
            return "there is no systemd user manager here (`systemctl --user` cannot reach one)."
        return None

    def written(self, plan: Plan) -> list[Written]:
        """Return the service and the timer."""
        environment = "".join(f"Environment={quoted(f'{name}={value}')}\n" for name, value in plan.environment.items())
        program, *arguments = plan.command
        # The colon turns the substitution of $VARIABLES off, which has no escape in the program's own path.
        command = " ".join(quoted(word) for word in (f":{program}", *arguments))
        service = (
            "[Unit]\n"
            "Description=edgetune learns from new notes\n"
            "\n"
            "[Service]\n"
            "Type=oneshot\n"
            f"ExecStart={command}\n"
            f"WorkingDirectory={plan.folder.replace('%', '%%')}\n"
            f"{environment}"
            "Nice=19\n"
            "IOSchedulingClass=idle\n"
            f"TimeoutStartSec={plan.hours}h\n"
            f"TimeoutStopSec={STOP_SECONDS}\n"
            "SuccessExitStatus=130 143\n"
        )
        timer = (
            "[Unit]\n"
            "Description=edgetune's nights\n"
            "\n"
            "[Timer]\n"
            f"OnCalendar=*-*-* {plan.at.rjust(5, '0')}:00\n"
            "AccuracySec=1min\n"
            "Persistent=true\n"
            "\n"
            "[Install]\n"
            "WantedBy=timers.target\n"
        )
        return [Written(str(_folder() / SERVICE), service), Written(str(_folder() / TIMER), timer)]

    def commands(self) -> list[list[str]]:
        """Return the commands that make systemd read the units and start the timer."""
        return [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", "--now", TIMER]]

    def install(self, plan: Plan) -> None:
        """Write both units and start the timer."""
        for written in self.written(plan):
            atomic_write(written.place, written.text)
        for command in self.commands():
            apply(command)

    def uninstall(self) -> None:
        """Stop the timer, and a night that is under way, and delete both units."""
        ask(["systemctl", "--user", "disable", "--now", TIMER])
        ask(["systemctl", "--user", "stop", SERVICE])
        for unit in (TIMER, SERVICE):
            remove(_folder() / unit)
        ask(["systemctl", "--user", "daemon-reload"])

    def is_installed(self) -> bool:
        """Return True if the timer runs."""
        done = ask(["systemctl", "--user", "is-active", TIMER])
        return done is not None and done.returncode == 0

    def start(self, plan: Plan) -> None:
        """Let systemd start the service now."""
        apply(["systemctl", "--user", "start", "--no-block", SERVICE])

    def notices(self) -> list[str]:
        """Say so if the user's manager, and with it the timer, ends when the user logs out."""
        done = ask(["loginctl", "show-user", str(os.getuid()), "--property=Linger"])
        if done is None or done.stdout.strip() != b"Linger=no":
            return []
        return ["Nights begin only while you are logged in. To let them begin at any time, type: loginctl enable-linger"]


def quoted(text: str) -> str:
    """Return a text as one word of a unit file, which holds it as it is: systemd.syntax(7), "Quoting" and "Specifiers"."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _folder() -> Path:
    named = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".config") / "systemd" / "user"
