"""Random calls of the C++ kernels give plain torch's results and touch no memory but their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgetune

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="no C++ kernels were built")

from fuzz.kernels import TRIES, fault  # noqa: E402 - needs the kernels
from fuzz.sanitized import runtimes  # noqa: E402

TESTS = Path(__file__).resolve().parent.parent
PATHS = (Path(edgetune.__file__).parent.parent, TESTS)
"""Folders from which a child process imports: those that this process imported from."""
SMOKE = 6
"""Calls of each kernel in the default tests, with the best instruction set."""
SLOW_SECONDS, SANITIZED_SECONDS = 20, 30
"""Seconds of the two slow runs. --fuzz-seconds gives each a quarter of its time instead."""
REPLAY = "PYTHONPATH=.:tests python -m fuzz.kernels {} 1 60"


def calls(seconds: float, *folder: str, preload: str = "") -> None:
    """Make random calls in a process of its own, with every instruction set of this machine, and check that none fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    if preload:
        environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [sys.executable, "-m", "fuzz.kernels", "0", str(10**9), str(seconds), *folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 300)
    numbers = [line for line in done.stderr.splitlines() if line.isdigit()]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    faults = [f"{each['fault']}\n    {REPLAY.format(each['call'])}" for each in found if "fault" in each]
    assert not faults, "\n".join(faults[:10])
    report = "\n".join(line for line in done.stderr.splitlines() if not line.isdigit())
    assert done.returncode == 0, f"{REPLAY.format(numbers[-1] if numbers else 0)}\n{report[:3000]}"
    assert found[-1]["made"] >= len(TRIES)


@pytest.mark.parametrize("attempt", range(len(TRIES)), ids=[attempt.__name__ for attempt in TRIES])
def test_a_few_random_calls_are_right(attempt: int) -> None:
    for number in range(SMOKE):
        found = fault(attempt + number * len(TRIES), cpu.isas()[0])
        assert found is None, f"{found}\n{REPLAY.format(attempt + number * len(TRIES))}"


@pytest.mark.slow
def test_many_random_calls_are_right_on_every_instruction_set(pytestconfig: pytest.Config) -> None:
    asked = pytestconfig.getoption("--fuzz-seconds")
    calls(asked / 4 if asked else SLOW_SECONDS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not runtimes(), reason="needs gcc's AddressSanitizer on Linux")
def test_no_call_touches_memory_that_is_not_its_own(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    built = subprocess.run([sys.executable, TESTS / "fuzz" / "sanitized.py", tmp_path], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the compiler cannot build with its sanitizers: {built.stderr.strip().splitlines()[-1]}")
    asked = pytestconfig.getoption("--fuzz-seconds")
    calls(asked / 4 if asked else SANITIZED_SECONDS, str(tmp_path), preload=built.stdout.strip())
