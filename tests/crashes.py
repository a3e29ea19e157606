"""Runs `edgetune train` again and again, each in a fork of one warm process, and lets each fail in a chosen way.

A driver is this file as a process of its own, with one thread, that does the first task itself, to be warm, and each
further one in a fork: that costs none of torch's start. Tasks are JSON lines. A task's fault is {"crash": n}, {"full": n}
or {"stop": n}, at (full: from) the n-th time that the run changes the disk; {"kill": seconds}; or nothing. A run that
stopped makes HOME.stopped and goes on when HOME.go is there. "beside" tells apart what a second run in one home says.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CRASHED = 77


class Disk:
    """Stands between a run and the functions by which it changes the disk, and counts: each call is a point."""

    def __init__(self, crash: int = 0, full: int = 0, stop: int = 0) -> None:
        self.crash, self.full, self.stop, self.count = crash, full, stop, 0

    def point(self, fills: bool, tear: Callable[[], object] = lambda: None) -> None:
        """Another change is about to be made; `tear` makes half of it. A full disk refuses those that take space."""
        self.count += 1
        if self.count == self.crash:
            tear()
            os._exit(CRASHED)
        if self.count == self.stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        if fills and self.full and self.count >= self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def install(self) -> None:
        """From here on every change of the disk in this process is counted."""
        for name, fills in {
            "mkdir": True, "fsync": True, "replace": True, "rename": True, "unlink": False, "remove": False, "rmdir": False,
        }.items():  # fmt: skip
            setattr(os, name, self._counted(getattr(os, name), fills))
        opened, fdopen, create = builtins.open, os.fdopen, os.open

        def counted_create(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                self.point(fills=True)
            return create(path, flags, *arguments, **named)

        def counted_open(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            result = opened(file, mode, *arguments, **named)
            return Writes(result, self) if isinstance(file, int) and set(mode) & set("w+") else result

        def counted_fdopen(file: int, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            result = fdopen(file, mode, *arguments, **named)
            return Writes(result, self) if set(mode) & set("w+") else result

        os.open, builtins.open, os.fdopen = counted_create, counted_open, counted_fdopen  # type: ignore[assignment]

    def _counted(self, original: Callable[..., Any], fills: bool) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.point(fills)
            return original(*arguments, **named)

        return counted


class Writes:
    """A file each of whose writes is a point; a crash there leaves the first half written."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Writes:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        half = memoryview(data)[: len(data) // 2]
        self._disk.point(fills=True, tear=lambda: (self._file.write(half), self._file.flush()))
        return self._file.write(data)


def child(task: dict[str, Any]) -> None:
    """One run in a process of its own; never returns. Standard output and error go to files beside its home."""
    for number, name in enumerate(outputs(task), 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    disk = Disk(**{kind: task[kind] for kind in ("crash", "full", "stop") if kind in task})
    disk.install()
    status = command(task["home"], task["arguments"])
    sys.stdout.flush()
    if task.get("count"):
        os.write(1, json.dumps({"points": disk.count}).encode() + b"\n")
    os._exit(status)


def outputs(task: dict[str, Any]) -> list[Path]:
    """Where a run's standard output and error go."""
    return [Path(f"{task['home']}{'.beside' if 'beside' in task else ''}.{name}") for name in ("out", "err")]


def command(home: str, arguments: list[str]) -> int:
    """`edgetune` with these arguments; its exit status, or 99 for a traceback."""
    from edgetune.cli.main import cli, plain_failures

    os.environ["EDGETUNE_HOME"] = home
    try:
        with plain_failures():
            cli.main(arguments, prog_name="edgetune", standalone_mode=False)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def main() -> None:
    """The driver: forks a run for each task, and answers with how it ended."""
    import torch

    from edgetune.training import checkpoints, loop

    torch.set_num_threads(1)
    checkpoints.KEEP_SECONDS = 0.0  # a checkpoint before every step and evaluation
    loop._SAMPLE_TOKENS = 4
    warm = json.loads(sys.stdin.readline())
    out = os.dup(1)
    os.dup2(2, 1)
    code = command(warm["home"], warm["arguments"])
    os.dup2(out, 1)
    print(json.dumps({"code": code}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        for path in outputs(task):
            path.write_bytes(b"")
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(task)
        if "kill" in task:
            time.sleep(task["kill"])
            os.kill(pid, signal.SIGKILL)
        elif "stop" in task:
            os.waitpid(pid, os.WUNTRACED)
            Path(f"{task['home']}.stopped").touch()
            wait_for(Path(f"{task['home']}.go"))
            os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}), flush=True)


def wait_for(path: Path) -> None:
    """Until the file is there."""
    while not path.exists():
        time.sleep(0.01)


@dataclass
class Ended:
    """How a run ended."""

    code: int
    seconds: float
    out: list[dict[str, Any]]
    err: str


class Driver:
    """The driver's process, from the test's side."""

    def __init__(self, home: Path, arguments: list[str]) -> None:
        tests = Path(__file__).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._ask({"home": str(home), "arguments": arguments})["code"] == 0

    def run(self, home: Path, arguments: list[str], **fault: float) -> Ended:
        """One run, to its end."""
        task = {"home": str(home), "arguments": arguments, **fault}
        answer = self._ask(task)
        out, err = (path.read_text() for path in outputs(task))
        lines = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith("\n")]
        return Ended(answer["code"], answer["seconds"], lines, err)

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


if __name__ == "__main__":
    main()
