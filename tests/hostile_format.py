"""A format for tests whose parser does what a hostile file could make one do. It runs in the parser's process."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from edgetune.documents.formats.parsed import Parsed

VERSION = 1


def read(data: bytes) -> Parsed:
    """Do what the file says, and return what came of it."""
    deed, _, argument = data.decode().partition(" ")
    return Parsed([DEEDS[deed](argument)])


def refused(attempt: Callable[[], object]) -> str:
    """Return the name of the error that an attempt ends with, or "allowed"."""
    try:
        attempt()
    except Exception as error:
        return type(error).__name__
    return "allowed"


def connect(address: str) -> object:
    import socket

    return socket.create_connection((address, 9), timeout=1)


def endless(argument: str) -> str:
    while True:
        pass


def hoard(argument: str) -> str:
    return str(len(bytearray(16 << 30)))


def crash(argument: str) -> str:
    os.abort()


def forge(answer: bytes) -> str:
    """Write to the pipe of the answers, as native code that a file has taken over could."""
    for descriptor in range(3, 64):
        try:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, len(answer).to_bytes(8, "little") + answer)
        except OSError:
            continue
    return ""


def through_descriptor(argument: str) -> object:
    descriptor = os.memfd_create("x")
    return os.write(descriptor, b"x")


def native(words: str) -> str:
    """Call a function of the C library, as code in C would, and return the name of its error, or "done"."""
    name, *arguments = words.split()
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*(int(word) if word.lstrip("-").isdigit() else word.encode() for word in arguments)) >= 0:
        return "done"
    return errno.errorcode[ctypes.get_errno()]


def started(argument: str) -> str:
    """Return what a thread of the parser says."""
    said: list[str] = []
    thread = threading.Thread(target=said.append, args=[argument])
    thread.start()
    thread.join()
    return said[0]


def plain(argument: str) -> str:
    return argument


def nap(argument: str) -> str:
    time.sleep(float(argument))
    return "woke"


DEEDS: dict[str, Callable[[str], str]] = {
    "say": plain,
    "sleep": nap,
    "endless": endless,
    "hoard": hoard,
    "crash": crash,
    "connect": lambda address: refused(lambda: connect(address)),
    "write": lambda path: refused(lambda: Path(path).write_text("x")),
    "append": lambda path: refused(lambda: os.open(path, os.O_WRONLY | os.O_APPEND)),
    "memory-file": lambda _: refused(lambda: through_descriptor("")),
    "read": lambda path: refused(lambda: Path(path).read_text()),
    "list": lambda path: refused(lambda: os.listdir(path)),
    "delete": lambda path: refused(lambda: os.remove(path)),
    "run": lambda program: refused(lambda: os.system(program)),
    "fork": lambda _: refused(os.fork),
    "forge": lambda answer: forge(answer.encode()),
    "environment": lambda name: os.environ.get(name, "not there"),
    "native": native,
    "thread": started,
}
