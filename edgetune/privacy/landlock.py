"""Takes rights on files from this process through Landlock, for good, and lets nobody give them back (Linux 5.13 and later).

Three system calls, made through ctypes. sandlock 0.9 offers the same for a running process, but needs Linux 6.12 and brings
13 MB; the packages that are called landlock, landlockpy and py-landlock are in alpha or some weeks old.

Source: the kernel's Documentation/userspace-api/landlock.rst, and linux/landlock.h.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import sys
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on every processor."""
_ASK_VERSION, _PATH_BENEATH = 1, 1
"""The flag LANDLOCK_CREATE_RULESET_VERSION, and the kind of rule LANDLOCK_RULE_PATH_BENEATH."""
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = ((1, 1 << 13), (2, 1 << 14), (3, 1 << 15), (5, 1 << 16))
"""Versions of Landlock, and the first bit of struct landlock_ruleset_attr's handled_access_fs that they do not know."""
_TCP = (4, 0b11)
"""Version that knows LANDLOCK_ACCESS_NET_BIND_TCP and LANDLOCK_ACCESS_NET_CONNECT_TCP, and their bits."""
_SCOPES = (6, 0b11)
"""Version that knows LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and LANDLOCK_SCOPE_SIGNAL, and their bits."""
_NO_NEW_PRIVS = 38
"""prctl's PR_SET_NO_NEW_PRIVS, which Landlock asks for."""


def version() -> int:
    """Return the version of Landlock's interface that this kernel offers; 0 where there is none, or where it is off."""
    return 0 if sys.platform != "linux" else max(_call(_CREATE_RULESET, None, 0, _ASK_VERSION), 0)


def read_only(places: Iterable[str]) -> bool:
    """Let this thread and its children read what lies in `places`, and nothing else; change, create or run no file, send no
    signal, and use no TCP. What is open stays so. Return False where the kernel cannot do that: then nothing is taken.
    """
    known = version()
    rights = max((first - 1 for since, first in _FILE_RIGHTS if known >= since), default=0)
    return rights > 0 and _restrict(rights, _of(_TCP, known), _of(_SCOPES, known), places)


def forbid_tcp() -> bool:
    """Forbid this thread and its children to connect by TCP, or to offer it. Return False where the kernel cannot do that."""
    bits = _of(_TCP, version())
    return bits > 0 and _restrict(0, bits, 0, ())


def _of(bits: tuple[int, int], known: int) -> int:
    return bits[1] if known >= bits[0] else 0


def _restrict(files: int, tcp: int, scopes: int, places: Iterable[str]) -> bool:
    """Take these rights, except for reading in `places`. Return False where that fails."""
    handled = struct.pack("<QQQ", files, tcp, scopes)
    ruleset = _call(_CREATE_RULESET, handled, len(handled), 0)
    if ruleset < 0:
        return False
    try:
        for place in places:
            with contextlib.suppress(OSError):  # a place that is not on this machine
                _allow_reading(ruleset, place)
        return _no_new_privileges() and _call(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow_reading(ruleset: int, place: str) -> None:
    """Add a rule for a file or a folder with all that lies in it. Raises OSError where it does not exist."""
    descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack("<Qi", _READ_FILE | _READ_DIR if is_folder else _READ_FILE, descriptor)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)


def _no_new_privileges() -> bool:
    import ctypes

    return bool(ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call and return its result, which is negative where it failed."""
    import ctypes

    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), *(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)))
