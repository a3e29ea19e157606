"""Whatever bytes a reader gets, it works or raises the error that it promises, soon and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgetune

pytest.importorskip("resource", reason="limits of memory and time need a Unix")

from fuzz.targets import TARGETS, model
from fuzz.worker import INPUT_SECONDS, fault

TESTS = Path(__file__).resolve().parent.parent
PATHS = (Path(edgetune.__file__).parent.parent, TESTS)
"""Folders from which a child process imports: those that this process imported from."""
SMOKE = 12
"""Inputs of each target in the default tests."""
SLOW_SECONDS = 60
"""Seconds of the slow run, all targets together, without the start of their processes. --fuzz-seconds gives it half of its
time instead; the kernels get the other half."""
STARTS = 5
"""Times that a target's process is started anew after an input that ended it."""


def replay(name: str, number: int) -> str:
    """Return the command that reads one input again."""
    return f"PYTHONPATH=.:tests python -m fuzz.worker '{name}' {number} 1 60"


@pytest.fixture(scope="module", autouse=True)
def seeds_are_removed() -> Iterator[None]:
    yield
    shutil.rmtree(model().parent, ignore_errors=True)


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_changed_inputs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    for number in range(SMOKE):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = fault(name, number, folder)
        assert found is None, f"{found}\n{replay(name, number)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_inputs_are_read_or_refused(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    asked = pytestconfig.getoption("--fuzz-seconds")
    left = (asked / 2 if asked else SLOW_SECONDS) / len(TARGETS)
    first, faults, read = 0, dict[str, str](), 0
    for _ in range(STARTS):
        start = time.monotonic()
        progress = tmp_path / "progress"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, PATHS)), "FUZZ_PROGRESS": str(progress),
            "OMP_NUM_THREADS": "1", "EDGETUNE_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        command = [sys.executable, "-m", "fuzz.worker", name, str(first), str(10**9), str(left)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left + 20 * INPUT_SECONDS)
        for line in done.stdout.splitlines():
            found = json.loads(line)
            read += found.get("read", 0)
            if "fault" in found:
                faults.setdefault(found["fault"].split(":")[0], f"{found['fault']}\n    {replay(name, found['input'])}")
        left -= time.monotonic() - start
        if done.returncode == 0:
            break
        last = int(progress.read_text()) if progress.exists() else 0
        faults.setdefault(
            f"end {done.returncode}", f"the process ended ({done.returncode})\n    {replay(name, last)}\n{done.stderr[-3000:]}"
        )
        first = last + 1
        if left <= 0:
            break
    assert not faults, "\n".join([f"{len(faults)} kinds of faults:", *faults.values()])
    assert read
