"""The process that parses untrusted documents: it receives their bytes from standard input, and can write or send nothing.

    python -m edgetune.documents.parser_child

Before the first file it gives up, for good, what a parser does not need: sockets, writing, starting programs, and reading
outside of the folders that Python and its libraries lie in. On Linux the kernel refuses all of that, also to native code that a
file has taken over: seccomp the system calls that parser_rules.py lists, Landlock files that lie elsewhere. The system limits
memory, time and open files where it can. An audit hook refuses the same everywhere, to Python code and honest libraries: it is
all that other systems have, and all that guards reading on a Linux without Landlock (before 5.13, or where it is off).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

from edgetune.documents.encoding import NotText
from edgetune.documents.limits import MAX_PARSED_BYTES, MAX_TEXT_BYTES, PARSE_SECONDS, PARSER_FILES, PARSER_MEMORY
from edgetune.documents.parser_rules import SYSTEM_FOLDERS, refused_calls
from edgetune.documents.reasons import Reason
from edgetune.privacy import landlock, seccomp

LENGTH = struct.Struct("<Q")
"""Stands before each message: the number of its bytes."""
_REFUSED = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "os.remove",
    "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.kill",
    "os.setxattr", "os.putenv", "shutil.", "tempfile.", "urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib.",
    "webbrowser.", "winreg.", "pty.", "msvcrt.", "_winapi.CreateProcess", "_winapi.CreateFile", "signal.pthread_kill",
)  # fmt: skip
"""Beginnings of the names of audit events (Python's documentation, "Audit events table") that a parser has no business with."""
_READS = ("os.listdir", "os.scandir", "ctypes.dlopen")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Answer one request after another until standard input ends. Each is a module's name and a file's bytes."""
    # What a library prints must neither reach the terminal nor stand among the answers.
    source, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    _send(answers, {"limits": give_up()})
    while (module := _receive(source)) is not None:
        data = _receive(source)
        if data is None:
            return
        _limit_time()
        _send(answers, answer(module.decode(), data))


def answer(module: str, data: bytes) -> dict[str, Any]:
    """Return the texts in a file as JSON, or the reason why there are none. Nothing of the file stands in a reason."""
    try:
        parsed = importlib.import_module(module).read(data)
        found = {"texts": [_unicode(text) for text in parsed.texts], "left_out": dict(parsed.left_out)}
        if sum(map(len, found["texts"])) <= MAX_TEXT_BYTES:
            return found
        return {"reason": Reason.TOO_LARGE_UNPACKED.name}
    except NotText as problem:
        return {"reason": problem.reason.name}
    except MemoryError:
        return {"reason": Reason.TOO_MUCH_MEMORY.name}
    except Exception:  # the libraries promise nothing about damaged files
        return {"reason": Reason.UNPARSED.name}


def give_up() -> list[str]:
    """Give up the rights of this process, and return the names of the limits that the system now enforces."""
    held = []
    try:
        import resource
    except ImportError:  # Windows
        resource = None  # type: ignore[assignment]
    if resource is not None:
        wanted = {
            "memory": (resource.RLIMIT_AS, _address_space() + PARSER_MEMORY),
            "writes": (resource.RLIMIT_FSIZE, 0),
            "files": (resource.RLIMIT_NOFILE, PARSER_FILES),
            "dumps": (resource.RLIMIT_CORE, 0),
        }
        for name, (kind, value) in wanted.items():
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some
                resource.setrlimit(kind, (value, value))
                held.append(name)
        held.append("time")
    sys.dont_write_bytecode = True
    folders = _import_folders()
    if landlock.read_only([*folders, *SYSTEM_FOLDERS, *_library_folders()]):
        held.append("reading")
    if seccomp.install(refused_calls(), hostile=True):
        held.append("calls")
    sys.addaudithook(_hook(tuple({*folders})))
    return held


def _hook(folders: tuple[str, ...]) -> Any:
    """Return the audit hook, which raises PermissionError for what a parser may not do."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and not {*mode}.isdisjoint("wax+")) or (isinstance(flags, int) and flags & _WRITING)
            if writes or not (isinstance(path, int) or _is_below(path, folders)):
                raise PermissionError(event)
        elif event in _READS:
            if arguments[0] is not None and not isinstance(arguments[0], int) and not _is_below(arguments[0], folders):
                raise PermissionError(event)
        elif event.startswith(_REFUSED):
            raise PermissionError(event)

    return refuse


def _is_below(path: Any, folders: tuple[str, ...]) -> bool:
    """Return True if a path lies in one of the folders; a library without a folder in its name is the system's own."""
    name = os.path.normpath(os.fsdecode(path))
    return os.path.dirname(name) == "" or (os.path.realpath(name) + os.sep).startswith(
        tuple(place + os.sep for place in folders)
    )


def _import_folders() -> list[str]:
    """Return the folders that Python and its packages lie in. The standard library may be a zip file."""
    places = [sys.prefix, sys.base_prefix, sys.exec_prefix, *(place for place in sys.path if place)]
    return [os.path.realpath(place).rstrip(os.sep) for place in places]


def _library_folders() -> list[str]:
    """Return the folders that the user lets the system look for libraries in, as far as they are named by whole paths."""
    return [place for place in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if os.path.isabs(place)]


def _address_space() -> int:
    """Return the bytes of address space that this process has already; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _limit_time() -> None:
    """Let the system end this process when a file has taken PARSE_SECONDS of the CPU's time."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + PARSE_SECONDS + 1, hard))


def _unicode(text: str) -> str:
    """Return a text without what no text holds: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _receive(source: BinaryIO) -> bytes | None:
    """Return the next message of the parent; None at the end."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    length = LENGTH.unpack(head)[0]
    data = source.read(length) if length <= MAX_PARSED_BYTES else b""
    return data if len(data) == length else None


def _send(answers: BinaryIO, value: dict[str, Any]) -> None:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    if len(data) > MAX_TEXT_BYTES:
        data = json.dumps({"reason": Reason.TOO_LARGE_UNPACKED.name}).encode()
    answers.write(LENGTH.pack(len(data)) + data)
    answers.flush()


if __name__ == "__main__":
    main()
