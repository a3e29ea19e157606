"""Every bad or odd input of the corpus gets its right answer: no traceback, no hang, no heap of memory."""

from __future__ import annotations

import collections
import importlib
import pkgutil
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import pytest

import corpus
from corpus.case import CASES, Case, Place, remove_plain

for module in sorted(pkgutil.iter_modules(corpus.__path__), key=lambda module: module.name):
    if not module.name.startswith("test_"):
        importlib.import_module(f"corpus.{module.name}")

SECONDS, HANG_SECONDS = 10, 60
"""Longest time that the answer to one input may take, in time of the CPU if this machine is busy, and by the clock."""
MEMORY = 1 << 30
"""Most bytes by which one input may raise the peak memory of the process."""
FEWEST = 300
"""Number of distinct inputs that the corpus promises."""


class TooSlow(BaseException):
    """Raised in a command that runs into the time limit. No handler for exceptions in the product catches it."""


@contextmanager
def limited(seconds: int, memory: int) -> Iterator[None]:
    """Raise TooSlow in the block where it takes longer, and on Linux MemoryError where it allocates much more memory."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"no answer after {seconds} s")

    before, unlimited = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_DATA)
    signal.alarm(seconds)
    if sys.platform == "linux":  # a case that fails must not take the memory of everything else on this machine
        held = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, unlimited[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@pytest.fixture(scope="module", autouse=True)
def plain_is_removed() -> Iterator[None]:
    yield
    remove_plain()


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.name}" for case in CASES])
def test_every_input_gets_its_right_answer(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    place = Place(tmp_path / "place")
    place.folder.mkdir()
    before, start, cpu_start = peak_memory(), time.monotonic(), time.process_time()
    try:
        with limited(HANG_SECONDS, 2 * MEMORY):
            case.check(place)
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)
    assert min(time.monotonic() - start, time.process_time() - cpu_start) < SECONDS
    assert peak_memory() - before < MEMORY
    assert place.answers, "the case states no outcome"
    record_property("corpus", (case.kind, place.answers[-1]))


def test_the_corpus_holds_300_distinct_inputs() -> None:
    names = collections.Counter((case.kind, case.name) for case in CASES)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) >= FEWEST
