"""Measure how fast encrypted files are written, read and paged, beside plain ones. Run it on a quiet machine.

python tests/benchmarks/encryption.py FOLDER [MEBIBYTES]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from edgetune.runtime import cipher
from edgetune.runtime.cipher import Cipher
from edgetune.runtime.files import atomic_write, open_log, read_at, read_own, scratch_file, write_at

PAGE = 4 << 20
"""Bytes that are paged at a time: an optimizer's states of one parameter have about as many."""


class Everything:
    """A keeper that encrypts every file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.cipher = Cipher(folder, bytes(32))

    def to_write(self, path: Path) -> Cipher | None:
        return self.cipher

    def to_read(self, path: Path) -> Cipher:
        return self.cipher

    def hides_scratch(self, folder: Path) -> bool:
        return True


def best(work: Callable[[], object], times: int = 3) -> float:
    """Return the seconds of the fastest of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measured(folder: Path, mebibytes: int) -> str:
    """Measure with the keeper that is installed, and return the figures in words."""
    size = mebibytes << 20
    data, page = os.urandom(1 << 20) * mebibytes, memoryview(bytearray(os.urandom(PAGE)))
    seconds = {"written": best(lambda: atomic_write(folder / "whole", data)), "read": best(lambda: read_own(folder / "whole"))}
    file = scratch_file(folder, size)
    seconds["paged out"] = best(lambda: [write_at(file, page, start) for start in range(0, size, PAGE)])
    seconds["paged in"] = best(lambda: [read_at(file, page, start) for start in range(0, size, PAGE)])
    file.close()
    small = best(lambda: [atomic_write(folder / "small", b"x" * 1000) for _ in range(20)]) / 20
    with open_log(folder / "log") as log:
        line = best(lambda: [(log.write(b"x" * 200 + b"\n"), log.flush()) for _ in range(1000)]) / 1000
    speeds = ", ".join(f"{what} {size / 1e6 / taken:,.0f} MB/s" for what, taken in seconds.items())
    return f"{speeds}, a small file {small * 1e3:.2f} ms, a line of a log {line * 1e6:.0f} us"


def main(folder: Path, mebibytes: int) -> None:
    for name, keeper in (("plain", cipher.NoKeeper()), ("encrypted", Everything(folder))):
        cipher.install(keeper)
        print(f"{name}: {measured(folder, mebibytes)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 256)
