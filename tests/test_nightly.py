"""`edgetune nightly` writes what each scheduler understands, applies it with its own tool, and says how things stand."""

from __future__ import annotations

import json
import os
import plistlib
import shutil
import stat
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from keychain_for_tests import use_keychain

from edgetune.cli.main import cli
from edgetune.config import NightlyConfig
from edgetune.encrypting import encrypt
from edgetune.home import home
from edgetune.nights import install as installing
from edgetune.nights.begin import LOCKED_FILE, due_night
from edgetune.nights.install import run_trial
from edgetune.nights.job import Job, load_job, nights_folder
from edgetune.nights.record import Kind, NightRecord, Outcome, Stage
from edgetune.nights.schedulers import cron, scheduler, systemd
from edgetune.nights.schedulers.cron import Cron
from edgetune.nights.schedulers.launchd import Launchd
from edgetune.nights.schedulers.scheduler import Plan
from edgetune.nights.schedulers.systemd import Systemd
from edgetune.nights.schedulers.task_scheduler import NAMESPACE, TaskScheduler
from edgetune.runtime.encrypted_file import is_encrypted
from edgetune.runtime.errors import LockedError, UsageError

ODD = '/home/Ann O\'Neil/100% $HOME & <"notes"> \\n é'
"""A path with a character that is special to each scheduler."""
PLAN = Plan(
    (sys.executable, "-P", "-m", "edgetune", "nightly", "run", "--scheduled", ODD),
    {"EDGETUNE_HOME": ODD},
    folder="/tmp",
    log=ODD,
    at="1:05",
)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "my notes"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.md").write_text(f"note {number}")
    return folder


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of tools that write down how they are called, with a crontab that keeps a table."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("systemctl", "launchctl", "loginctl"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\n')
    (folder / "crontab").write_text(
        f'#!/bin/sh\ncase "$1" in\n-l) [ -f "{folder}/table" ] || {{ echo "no crontab for me" >&2; exit 1; }}; '
        f'cat "{folder}/table";;\n-) cat >"{folder}/table";;\nesac\n'
    )
    for tool in folder.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return folder


unix = pytest.mark.skipif(os.name == "nt", reason="these tools are shell scripts")


def edgetune(*words: str) -> Result:
    return CliRunner().invoke(cli, ["nightly", *words])


# -- what is written


def test_the_property_list_says_what_launchd_is_to_do() -> None:
    (written,) = Launchd().written(PLAN)
    assert written.place.endswith("Library/LaunchAgents/edgetune.nightly.plist")
    job = plistlib.loads(written.text.encode())
    assert job["ProgramArguments"] == list(PLAN.command)
    assert job["EnvironmentVariables"] == {"EDGETUNE_HOME": ODD}
    assert job["StartCalendarInterval"] == {"Hour": 1, "Minute": 5}
    assert (job["ProcessType"], job["LowPriorityIO"], job["RunAtLoad"]) == ("Standard", True, False)
    assert "KeepAlive" not in job


def test_the_task_is_read_back_as_it_was_meant() -> None:
    (written,) = TaskScheduler().written(Plan(PLAN.command, PLAN.environment, "/tmp", ODD, "01:05", hours=36, wake=True))
    task = ElementTree.fromstring(written.text.encode("utf-16"))

    def text(path: str) -> str | None:
        return task.findtext("/".join(f"{{{NAMESPACE}}}{name}" for name in path.split("/")))

    assert text("Triggers/CalendarTrigger/StartBoundary") == "2026-01-01T01:05:00"
    assert text("Triggers/CalendarTrigger/ScheduleByDay/DaysInterval") == "1"
    assert text("Settings/DisallowStartIfOnBatteries") == text("Settings/StopIfGoingOnBatteries") == "false"
    assert text("Settings/StartWhenAvailable") == text("Settings/WakeToRun") == "true"
    assert (text("Settings/MultipleInstancesPolicy"), text("Settings/ExecutionTimeLimit")) == ("IgnoreNew", "PT36H")
    assert text("Principals/Principal/RunLevel") == "LeastPrivilege"
    assert text("Actions/Exec/Command") == sys.executable
    arguments = [*PLAN.command[1:], "--set", f"EDGETUNE_HOME={ODD}"]
    assert text("Actions/Exec/Arguments") == subprocess.list2cmdline(arguments)


def test_the_timer_makes_up_for_missed_nights_and_the_service_has_the_lowest_priority() -> None:
    service, timer = (written.text for written in Systemd().written(PLAN))
    assert "OnCalendar=*-*-* 01:05:00\n" in timer
    assert "Persistent=true\n" in timer
    assert "Nice=19\nIOSchedulingClass=idle\n" in service
    assert '100%% $HOME & <\\"notes\\"> \\\\n é"' in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_itself_finds_no_fault_with_the_units(tmp_path: Path) -> None:
    for written in Systemd().written(PLAN):
        (tmp_path / Path(written.place).name).write_text(written.text)
    units = [str(tmp_path / name) for name in (systemd.SERVICE, systemd.TIMER)]
    done = subprocess.run(["systemd-analyze", "--user", "verify", *units], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if "edgetune" in line]
    assert complaints == []


@unix
def test_crons_line_gives_the_program_its_very_arguments(tmp_path: Path) -> None:
    """The line is run as cron does it: an escaped % is a %, and sh takes the rest."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "%s\\n" "$EDGETUNE_HOME" "$@"\n')
    show.chmod(0o755)
    log = tmp_path / "100% log"
    plan = Plan((str(show), "--scheduled", ODD), {"EDGETUNE_HOME": ODD}, str(tmp_path), str(log), "01:05")
    line = cron.block(plan).decode().splitlines()[1]
    when, command = line[: len("5 * * * * ")], line[len("5 * * * * ") :]
    assert when == "5 * * * * "
    assert "%" not in command.replace("\\%", "")
    subprocess.run(["/bin/sh", "-c", command.replace("\\%", "%")], check=True)
    assert log.read_text() == f"{ODD}\n--scheduled\n{ODD}\n"


def test_a_path_with_a_line_break_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match="holds a line break or another control character"):
        Plan(("python",), {"EDGETUNE_HOME": "a\nb"}, "/", "/log", "01:00")


# -- what is applied


@unix
@pytest.mark.parametrize("table", [b"", b"MAILTO=me\n0 5 * * * backup 100\\%\n", b"@daily x\xff", b"\n\n# a line\n"])
def test_cron_keeps_every_other_byte_of_the_crontab(tools: Path, table: bytes) -> None:
    if table:
        (tools / "table").write_bytes(table)
    Cron().install(PLAN)
    Cron().install(PLAN)
    assert (tools / "table").read_bytes() == cron.block(PLAN) + table
    assert Cron().is_installed()
    Cron().start(PLAN)
    assert (tools / "table").read_bytes().count(b"--scheduled") == 2
    Cron().after_trial(PLAN)
    assert (tools / "table").read_bytes() == cron.block(PLAN) + table
    Cron().uninstall()
    assert (tools / "table").read_bytes() == table
    assert not Cron().is_installed()


@unix
def test_a_block_that_was_changed_by_hand_is_not_guessed_at(tools: Path) -> None:
    (tools / "table").write_bytes(cron.BEGIN + b"0 5 * * * backup\n")
    with pytest.raises(UsageError, match="were changed by hand"):
        Cron().install(PLAN)
    assert (tools / "table").read_bytes() == cron.BEGIN + b"0 5 * * * backup\n"


@unix
def test_a_tool_that_fails_is_quoted_in_one_sentence(tools: Path) -> None:
    (tools / "systemctl").write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2\nexit 1\n")
    with pytest.raises(UsageError, match="`systemctl --user daemon-reload` failed: Failed to connect to bus"):
        scheduler.apply(["systemctl", "--user", "daemon-reload"])
    assert Systemd().lacking() is not None


@unix
def test_install_status_pause_resume_and_uninstall(tools: Path, notes: Path, tmp_path: Path) -> None:
    words = ("install", str(notes), "--at", "02:00", "--until", "5:30", "--rank", "8", "--no-trial", "--scheduler", "systemd")
    outcome = edgetune(*words)
    assert outcome.exit_code == 0, outcome.output
    assert "3 notes and chats can be read. For systemd, edgetune writes:" in outcome.stderr
    assert "OnCalendar=*-*-* 02:00:00" in outcome.stderr
    calls = (tools / "calls").read_text()
    assert "systemctl --user daemon-reload\nsystemctl --user enable --now edgetune-nightly.timer\n" in calls
    units = tmp_path / "config" / "systemd" / "user"
    assert {stat.S_IMODE(path.stat().st_mode) for path in [*units.iterdir(), home() / "nightly.json"]} == {0o600}
    job = load_job()
    assert (job.notes, job.settings, job.train_config().rank) == ((str(notes),), {"model": "demo", "rank": 8}, 8)
    status = json.loads(edgetune("status", "--json").stdout)
    assert (status["is_installed"], status["at"], status["until"], status["last"]) == (True, "02:00", "5:30", None)
    assert status["next_night"].endswith(" 02:00")
    assert "There has been no night yet." in edgetune("status").stdout
    assert json.loads(edgetune("pause", "--json").stdout) == {"paused_until": "for ever"}
    assert load_job().is_paused(time.time() + 1e9)
    assert "Paused until you type: edgetune nightly resume" in edgetune("status").stdout
    assert "Paused until 2" in edgetune("pause", "--days", "3").stdout
    assert "The next night begins at " in edgetune("resume").stdout
    assert not load_job().is_paused(time.time())
    assert edgetune("uninstall").exit_code == 0
    assert list(units.iterdir()) == []
    outcome = edgetune("status")
    assert "No nights are installed here. Type for example: edgetune nightly install notes/" in str(outcome.exception)


@unix
def test_the_status_says_that_a_locked_keychain_kept_a_night_from_beginning(
    tools: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keychain, now = use_keychain(monkeypatch, tmp_path / "keychain.json"), time.time()
    at, until = (f"{datetime.fromtimestamp(now + hours * 3600):%H:%M}" for hours in (-1, 1))
    Job((str(notes),), NightlyConfig(at, until), "cron", now - 86400).save()
    encrypt()
    keychain.lock()
    assert isinstance(edgetune("run").exception, LockedError)
    assert isinstance(edgetune("run", "--scheduled").exception, LockedError)
    assert not is_encrypted(nights_folder() / LOCKED_FILE)
    keychain.locked = False
    sentence = f"A night could not begin at {installing.local(now)[:10]}"
    said = edgetune("status").stdout
    assert sentence in said
    assert ", since the keychain was locked: stay logged in.\n" in said
    due = due_night(load_job(), now)
    assert due is not None
    record = NightRecord(due.night, Kind.NIGHT, now - 60, due.ends_by, stage=Stage.ENDED, outcome=Outcome.NOTHING_NEW)
    record.save()  # it ran before the keychain was locked
    assert "could not begin" not in edgetune("status").stdout
    record.path.unlink()
    NightRecord("2027-01-01", Kind.NIGHT, time.time() + 60, due.ends_by, outcome=Outcome.NOTHING_NEW).save()
    assert "could not begin" not in edgetune("status").stdout


@unix
def test_print_installs_nothing(tools: Path, notes: Path) -> None:
    for name in installing.ALL:
        outcome = edgetune("install", str(notes), "--print", "--scheduler", name)
        assert outcome.exit_code == 0, outcome.output
        assert "nightly" in outcome.stdout
        assert "--scheduled" in outcome.stdout
    shown = json.loads(edgetune("install", str(notes), "--print", "--scheduler", "systemd", "--json").stdout)
    assert [Path(file["place"]).name for file in shown["files"]] == [systemd.SERVICE, systemd.TIMER]
    assert not (tools / "calls").exists()
    assert not (tools / "table").exists()
    assert not (home() / "nightly.json").exists()


@unix
def test_a_scheduler_that_refuses_leaves_no_job_behind(tools: Path, notes: Path) -> None:
    (tools / "crontab").write_text("#!/bin/sh\necho 'not allowed' >&2\nexit 1\n")
    outcome = edgetune("install", str(notes), "--scheduler", "cron", "--no-trial")
    assert "`crontab -l` failed: not allowed" in str(outcome.exception)
    assert not (home() / "nightly.json").exists()


@unix
def test_private_nights_are_not_installed_without_what_they_need(
    tools: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    outcome = edgetune("install", str(notes), "--private", "8", "--scheduler", "cron", "--no-trial")
    assert "pip install 'edgetune[private]'" in str(outcome.exception)
    assert not (home() / "nightly.json").exists()
    assert not (tools / "table").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--at", "25:00"], "--at is '25:00'; expected a time of day such as 01:00."),
        (["--at", "01:00", "--until", "1:00"], "--at and --until are both 01:00, so a night would have no time"),
        (["--battery", "0"], "--battery is 0; expected a whole number from 1 to 100."),
    ],
)
def test_impossible_times_are_refused_in_one_sentence(notes: Path, words: list[str], sentence: str) -> None:
    outcome = edgetune("install", str(notes), *words, "--print", "--scheduler", "systemd")
    assert sentence in str(outcome.exception)


def test_a_damaged_job_is_refused_in_one_sentence(notes: Path) -> None:
    for content in ("{}", "[1]", '{"format": 1}', '{"format": 99}', "no JSON"):
        (home() / "nightly.json").write_text(content)
        outcome = edgetune("status")
        assert isinstance(outcome.exception, UsageError), content
        assert "nightly.json" in str(outcome.exception)


# -- the trial, and a night that trains


class Started(Cron):
    """A scheduler that starts the command as another process, as every scheduler does."""

    process: subprocess.Popen[bytes] | None = None

    def start(self, plan: Plan) -> None:
        self.process = subprocess.Popen(plan.command, env={**os.environ, **plan.environment}, cwd=plan.folder)

    def after_trial(self, plan: Plan) -> None:
        assert self.process is not None
        self.process.wait()


def test_the_trial_is_a_tiny_night_in_a_process_of_the_scheduler(notes: Path) -> None:
    for number in range(12):
        (notes / f"long {number}.md").write_text(f"The {number}th tomato of the year was ripe, and nobody ate it. " * 20)
    at, until = (f"{datetime.now() + timedelta(hours=hours):%H:%M}" for hours in (2, 3))
    job = Job((str(notes),), NightlyConfig(at=at, until=until), "cron", time.time(), {"model": "demo"})
    job.save()
    record = run_trial(job, Started(), time.time, time.sleep)
    assert record is not None
    assert (record.kind, record.stage, record.steps) == (Kind.TRIAL, Stage.ENDED, 2)
    assert record.sentence.endswith("it works: 15 notes can be read, and 2 steps were trained; nothing changed.")
    assert not list((home() / "adapters").rglob("adapter_config.json")), "no adapter came of two steps"
    assert due_night(job, time.time()) is None, "a trial is no night, and is not repeated"
    assert not (nights_folder() / "notes.json").exists(), "the first night still has everything to learn"


def test_a_trial_that_never_begins_is_told_after_a_while(notes: Path) -> None:
    job = Job((str(notes),), NightlyConfig(), "cron", time.time())
    clock = [0.0]

    class Silent(Started):
        def start(self, plan: Plan) -> None:
            return

        def after_trial(self, plan: Plan) -> None:
            return

    def wait(seconds: float) -> None:
        clock[0] += seconds

    assert run_trial(job, Silent(), lambda: 1e9 + clock[0], wait) is None
    assert clock[0] == pytest.approx(180, abs=1)


def test_the_record_says_in_one_sentence_what_happened() -> None:
    record = NightRecord("2026-11-28", Kind.NIGHT, 0.0, 1.0, outcome=Outcome.BETTER, new_notes=7, changed_notes=1)
    assert record.sentence == (
        "Night 2026-11-28: learned from 7 new notes and 1 changed note; better on notes it had not seen; now in use."
    )
    record.outcome, record.new_notes, record.changed_notes = Outcome.TOO_FEW, 1, 0
    record.verdict, record.adapter, record.reason = "too few", "NAME", "With 3 held-out notes there is too little to judge by."
    assert record.sentence == (
        "Night 2026-11-28: learned from 1 new note; too few held-out notes were read to judge it; kept beside your current "
        "adapter, which stays in use. With 3 held-out notes there is too little to judge by. To use it, type: "
        "edgetune adapters promote NAME"
    )
