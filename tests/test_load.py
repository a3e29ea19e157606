"""The speed of a machine that other programs use is told apart from that of a free one."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from click.testing import CliRunner
from tiny import threads

from edgetune.cli.main import cli
from edgetune.machine.load import WORKING_SHARE, Load


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)


def test_on_a_free_machine_work_takes_the_time_that_it_took() -> None:
    load = Load(2)
    assert load.add(10.0, 18.0, 0.2) == 10.0
    assert load.others == pytest.approx(0.01)
    assert load.slowdown == 1.0


def test_one_program_on_one_of_two_processors_is_taken_out_of_the_time() -> None:
    """18.6 s of work for two threads, of which only one and a share of the other ran: 17 s instead of 10 s."""
    load = Load(2)
    assert load.add(17.0, 18.6, 15.4) == pytest.approx(18.6 / (2 * WORKING_SHARE))
    assert load.others == pytest.approx(15.4 / 34)
    assert load.slowdown == pytest.approx(1.7)


def test_work_that_could_not_use_more_processors_is_not_promised_to_be_faster() -> None:
    """One thread of four processors, of which others used two: it had all it could use."""
    load = Load(1)
    assert load.add(10.0, 9.9, 10.0) == 10.0
    assert load.slowdown == 1.0


def test_a_work_that_hardly_ran_is_promised_no_more_than_what_others_left_free() -> None:
    load = Load(16)
    assert load.add(10.0, 2.0, 8.0) == pytest.approx(2.0 / (0.2 + 0.8))


def test_a_negative_or_missing_figure_of_the_others_counts_as_none() -> None:
    load = Load(2)
    assert load.add(1.0, 1.9, -0.4) == 1.0
    assert load.others == 0.0


def test_a_busy_program_is_seen_by_the_real_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", os.cpu_count)
    ready = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    with subprocess.Popen(ready, stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            load, before = Load(1), psutil.Process(busy.pid).cpu_times()
            start = time.perf_counter()
            load.seconds(lambda: time.sleep(1.0))
            wall, after = time.perf_counter() - start, psutil.Process(busy.pid).cpu_times()
        finally:
            busy.kill()
    used = after.user + after.system - before.user - before.system
    # Others may run as well, but no less than this program did, up to a tick of the clock.
    assert load.others * os.cpu_count() * wall > used - 0.1


def test_plan_says_that_the_machine_is_busy_and_promises_the_time_of_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: object) -> float:
        load = arguments[-1]
        assert isinstance(load, Load)
        return load.add(17.0, 18.6, 15.4)

    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", measured)
    command = ["plan", "--model", "demo", "examples/notes", "--steps", "60"]
    with threads(2):
        shown = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    assert "60 steps in 10 min" in shown
    assert (
        "This is with the processors free. Other programs use 45% of them; like this it would take about 17 min 00 s." in shown
    )


def test_plan_says_nothing_of_other_programs_on_a_free_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.machine.forecast.seconds_a_step", lambda *arguments: arguments[-1].add(10.0, 18.6, 0.4))
    shown = CliRunner().invoke(cli, ["plan", "--model", "demo", "examples/notes"], catch_exceptions=False).stdout
    assert "tokens/s" in shown
    assert "Other programs" not in shown
