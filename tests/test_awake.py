"""A helper keeps a Mac awake while it trains and ends with the run; here a shell script stands in for caffeinate."""

from __future__ import annotations

import importlib
import os
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetune.training import keep_awake as module
from edgetune.training.keep_awake import awake

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")


@pytest.fixture
def start_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace caffeinate by a script that writes its arguments and process id to a file, then waits; return the file."""
    script, start_file = tmp_path / "caffeinate", tmp_path / "started"
    script.write_text(f'#!/bin/sh\necho "$@ $$" > {start_file}.part\nmv {start_file}.part {start_file}\nexec sleep 60\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(module, "CAFFEINATE", script)
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform="darwin"))
    return start_file


def started(start_file: Path) -> tuple[list[str], int]:
    for _ in range(500):
        if start_file.exists():
            *arguments, number = start_file.read_text().split()
            return arguments, int(number)
        time.sleep(0.01)
    raise AssertionError("it was not started")


def runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_helper_watches_this_process_and_ends_with_the_work(start_file: Path) -> None:
    with awake():
        arguments, number = started(start_file)
        assert arguments == ["-is", "-w", str(os.getpid())]
        assert runs(number)
        assert os.getpgid(number) != os.getpgid(0)  # so that Ctrl-C does not reach it
    assert not runs(number)


def test_it_ends_where_the_work_fails(start_file: Path) -> None:
    numbers = []

    def work() -> None:
        with awake():
            numbers.append(started(start_file)[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not runs(numbers[0])


def test_without_caffeinate_the_work_goes_on(start_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CAFFEINATE", tmp_path / "nothing")
    done = False
    with awake():
        done = True
    assert done


def test_nothing_is_started_on_other_systems(start_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with awake():
        pass
    assert not start_file.exists()


def test_train_runs_awake(start_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from edgetune.cli.main import cli
    from edgetune.runtime.errors import DataError

    seen: list[bool] = []

    def run(*_: object) -> None:
        seen.append(runs(started(start_file)[1]))
        raise DataError("No notes.")

    monkeypatch.setattr(importlib.import_module("edgetune.training.train"), "train", run)
    assert isinstance(CliRunner().invoke(cli, ["train", "notes", "--json"]).exception, DataError)
    assert seen == [True]
    assert not runs(started(start_file)[1])
