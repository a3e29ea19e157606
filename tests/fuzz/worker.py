"""Fuzzes in a process of its own, so that a hang, a crash in C++ or a heap of memory is found and the rest goes on.

    PYTHONPATH=.:tests python -m fuzz.worker TARGET FIRST COUNT SECONDS

It reads COUNT inputs, or as many as fit into SECONDS. Input N of a target is the same in every run. Each failure is printed as
a line of JSON. The number of the input being read stands in the file that FUZZ_PROGRESS names.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil

from edgetune.runtime.errors import EdgetuneError
from fuzz.mutations import mutate
from fuzz.targets import TARGETS, model

INPUT_SECONDS = 10
"""Longest time that one input may take."""
MEMORY = 1 << 30
"""Most bytes by which reading may raise the memory of the process."""


def fault(name: str, number: int, folder: Path) -> str | None:
    """Read input `number` of a target; return what is wrong with the reaction, or None."""
    target = TARGETS[name]
    data = mutate(random.Random(f"{name}:{number}"), target.seeds())
    try:
        target.read(data, folder)
    except target.raises as error:
        text = str(error)
        if isinstance(error, EdgetuneError) and (not text.strip() or "\n" in text or len(text) > 3000):
            return f"{type(error).__name__} whose text is not one sentence: {text[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the target itself"
        own = [frame for frame in frames if any(f"/{part}/" in frame.filename for part in ("edgetune", "runtime", "export"))]
        through = f" through {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        return f"{type(error).__name__} at {where}{through}: {str(error)[:200]}"
    return None


def main(name: str, first: int, count: int, seconds: float) -> None:
    """Read inputs of a target until `count` or `seconds` are used up."""
    TARGETS[name].seeds(), model()
    if sys.platform == "linux":
        held = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    progress = open(os.environ.get("FUZZ_PROGRESS", os.devnull), "w")  # noqa: SIM115 - open as long as the process
    end, done = time.monotonic() + seconds, 0
    for number in range(first, first + count):
        if time.monotonic() > end:
            break
        progress.seek(0)
        progress.write(f"{number:12}")
        progress.flush()
        faulthandler.dump_traceback_later(INPUT_SECONDS, exit=True)
        folder = Path(tempfile.mkdtemp(prefix="edgetune-fuzz-"))
        try:
            found = fault(name, number, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        done += 1
        if found is not None:
            print(json.dumps({"target": name, "input": number, "fault": found}), flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"target": name, "read": done}), flush=True)
    shutil.rmtree(model().parent, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
