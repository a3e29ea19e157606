"""cron, where there is no systemd user manager: a marked block at the top of the user's crontab, as crontab(5) says.

cron makes up for nothing, so it asks every hour whether a night is due: one that was missed then begins late.
"""

from __future__ import annotations

import shlex
import shutil
from datetime import datetime, timedelta

from edgetune.nights.schedulers.scheduler import Plan, Scheduler, Written, apply, ask
from edgetune.runtime.errors import UsageError

BEGIN = b"# BEGIN edgetune nightly (to remove it, type: edgetune nightly uninstall)\n"
END = b"# END edgetune nightly\n"


class Cron(Scheduler):
    """Starts the nights by the user's crontab."""

    name = "cron"

    def lacking(self) -> str | None:
        """Return why cron cannot be used: it is not installed."""
        return None if shutil.which("crontab") else "cron is not installed here (there is no crontab)."

    def written(self, plan: Plan) -> list[Written]:
        """Return the block of the crontab."""
        return [Written("crontab", block(plan).decode())]

    def commands(self) -> list[list[str]]:
        """Return the command that takes the new crontab from its standard input."""
        return [["crontab", "-"]]

    def install(self, plan: Plan) -> None:
        """Put the block at the top of the crontab, in place of an earlier one."""
        apply(["crontab", "-"], block(plan) + without_block(_crontab()))

    def uninstall(self) -> None:
        """Remove the block. Every other byte of the crontab stays as it is."""
        if self.is_installed():
            apply(["crontab", "-"], without_block(_crontab()))

    def is_installed(self) -> bool:
        """Return True if the crontab holds the block."""
        return shutil.which("crontab") is not None and BEGIN in _crontab()

    def start(self, plan: Plan) -> None:
        """Let cron run the command within two minutes: it cannot run anything at once."""
        soon = datetime.now() + timedelta(seconds=70)  # cron may have read its table for the next minute already
        line = _line(plan, f"{soon.minute} {soon.hour} {soon.day} {soon.month} *")
        apply(["crontab", "-"], block(plan, line) + without_block(_crontab()))

    def after_trial(self, plan: Plan) -> None:
        """Remove the line of the trial."""
        self.install(plan)


def block(plan: Plan, more: bytes = b"") -> bytes:
    """Return the block: a line that runs the command at the night's minute of every hour, and `more` lines."""
    return BEGIN + _line(plan, f"{plan.minute} * * * *") + more + END


def without_block(crontab: bytes) -> bytes:
    """Return a crontab without the block. Raises UsageError for one whose block was changed by hand."""
    before, begin, rest = crontab.partition(BEGIN)
    if not begin:
        return crontab
    _, end, after = rest.partition(END)
    if not end or BEGIN in after:
        raise UsageError(
            "The crontab's lines between `# BEGIN edgetune nightly` and `# END edgetune nightly` were changed by hand. Delete "
            "them with `crontab -e`, and type the command again."
        )
    return before + after


def _line(plan: Plan, when: str) -> bytes:
    """Return a line of the crontab. The command is one for sh, in which cron itself takes a % for the end of a line."""
    words = ["env", *(f"{name}={value}" for name, value in plan.environment.items()), *plan.command]
    command = f"cd {shlex.quote(plan.folder)} && {shlex.join(words)} >>{shlex.quote(plan.log)} 2>&1"
    return f"{when} {command}\n".replace("%", "\\%").encode("utf-8", "surrogateescape")


def _crontab() -> bytes:
    """Return the user's crontab; empty if there is none. Raises UsageError where it cannot be read."""
    done = ask(["crontab", "-l"])
    if done is not None and done.returncode and b"no crontab for" in done.stderr:
        return b""
    return apply(["crontab", "-l"]) if done is None or done.returncode else done.stdout
