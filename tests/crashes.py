"""Run `edgetune train` many times, each time in a fork of one warm process, and make each run fail in a chosen way.

Executed as a script, this file is the driver: a process with one thread that performs its first task itself, so that torch is
loaded, and every further task in a fork, which saves torch's start-up time. Tasks arrive as JSON lines. A task may name a
fault. {"crash": n} and {"stop": n} strike at the run's n-th change of the disk, {"full": n} at the n-th and all later ones, and
{"kill": seconds} after that time. When a run has stopped, the driver creates HOME.stopped and waits for HOME.go before it
continues the run. With "beside", the output of a second run in the same home goes to files of its own.
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
    """Wraps the functions by which a run changes the disk, counts their calls and injects the fault at the chosen call."""

    def __init__(self, crash: int = 0, full: int = 0, stop: int = 0) -> None:
        self.crash, self.full, self.stop, self.count = crash, full, stop, 0

    def point(self, fills: bool, tear: Callable[[], object] = lambda: None) -> None:
        """Count a change that is about to be made, and inject the fault if it is due.

        `tear` makes half of the change before a crash. A full disk refuses only changes that take space (`fills`).
        """
        self.count += 1
        if self.count == self.crash:
            tear()
            os._exit(CRASHED)
        if self.count == self.stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        if fills and self.full and self.count >= self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def install(self) -> None:
        """Count every change of the disk in this process from now on."""
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
    """A file whose writes are counted as changes of the disk; a crash at a write leaves its first half written."""

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
    """Perform one run in this forked process and exit. Standard output and error go to files beside its home."""
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
    """Return the files that receive a run's standard output and standard error."""
    return [Path(f"{task['home']}{'.beside' if 'beside' in task else ''}.{name}") for name in ("out", "err")]


def command(home: str, arguments: list[str]) -> int:
    """Run `edgetune` with these arguments; return its exit status, or 99 if it raised an unexpected exception."""
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
    """Act as the driver: fork a run for each task and print the run's exit code and duration as JSON."""
    import torch

    from edgetune.training import checkpoints, sample_writer

    torch.set_num_threads(1)
    # Write a checkpoint before every step and every evaluation.
    checkpoints.KEEP_SECONDS = 0.0
    sample_writer.SAMPLE_TOKENS = 4
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
    """Wait until the file exists."""
    while not path.exists():
        time.sleep(0.01)


@dataclass
class Ended:
    """The exit code, duration, JSON output and error text of a finished run."""

    code: int
    seconds: float
    out: list[dict[str, Any]]
    err: str


class Driver:
    """Starts a driver process and sends it tasks."""

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
        """Run `edgetune` once with an optional fault, and wait for it to end."""
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
        """End the driver process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


if __name__ == "__main__":
    main()
