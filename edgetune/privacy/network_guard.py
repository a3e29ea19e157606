"""Keeps a process from the network, for good: the kernel refuses every internet socket where it can, an audit hook elsewhere.

seccomp (Linux, x86-64 and aarch64) refuses all sockets but Unix ones, by which services of the machine are asked, to all
threads, to C extensions and to every program that is started. Where there is Landlock alone (Linux 6.7 and later), it refuses
TCP to this thread and to what it starts. The audit hook stands everywhere: it stops Python code, with a sentence in place of an
error's number, but neither native code nor other programs.

Sockets that are open already stay open; a service of the machine that is asked through a Unix socket can use the network.
"""

from __future__ import annotations

import os
import shutil
import sys
from enum import StrEnum
from typing import Any

from edgetune.privacy import landlock, seccomp
from edgetune.privacy.seccomp import Refused
from edgetune.runtime.errors import NetworkForbidden

AF_UNIX = 1
"""Family of sockets between programs of one machine, on Linux and macOS."""
_WRAPPED = -1
"""The family that Python's audit event names for a descriptor that is a socket already."""
FORBIDDEN = (
    Refused("socket", 0, value=AF_UNIX, outcome=False),
    Refused("socketpair", 0, value=AF_UNIX, outcome=False),
    Refused("io_uring_setup"),  # its operations open sockets past every filter
)
"""System calls that a process without network is refused."""
_TO_AN_ADDRESS = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"})
"""Audit events of Python whose second argument is an address: a pair of host and port, or the path of a Unix socket."""
_NAMES = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"})
"""Audit events of Python that look up hosts."""
_GPU_TOOL, _GPU_FILE = "nvidia-modprobe", "/dev/nvidia-uvm"
"""The set-user-ID tool by which CUDA makes its device file where the system has not, and that file."""
_GPU_SECONDS = 20.0
"""Longest time that the tool may take, in seconds: it may have to load the driver. Chosen by hand."""


class Guard(StrEnum):
    """A mechanism that keeps this process from the network."""

    SECCOMP = "seccomp"
    LANDLOCK = "Landlock, TCP alone"
    AUDIT_HOOK = "audit hook"
    NONE = "none"


_guard = Guard.NONE


def guard() -> Guard:
    """Return what keeps this process from the network."""
    return _guard


def forbid_network(kernel: bool = True) -> Guard:
    """Forbid this process the network, for good, and return what enforces it. A second call changes nothing.

    kernel: False for a process that starts set-user-ID tools or programs that need the network themselves, such as a browser,
    since the kernel's refusal would reach them too: then only the audit hook stands.
    """
    global _guard
    if _guard is Guard.NONE:
        sys.addaudithook(_refuse)
        _guard = _by_the_kernel() if kernel else Guard.AUDIT_HOOK
    return _guard


def kernel_guards_of_parsers() -> tuple[str, ...]:
    """Return what this kernel can keep the parsers of documents in, best first; nothing but on Linux."""
    offered = {"seccomp": seccomp.is_offered(), "Landlock": landlock.version() > 0}
    return tuple(name for name, is_offered in offered.items() if is_offered)


def _by_the_kernel() -> Guard:
    """Let the kernel refuse the network, and return what does."""
    if sys.platform != "linux":
        return Guard.AUDIT_HOOK
    _make_device_file()
    if seccomp.install(FORBIDDEN, hostile=False):
        return Guard.SECCOMP
    return Guard.LANDLOCK if landlock.forbid_tcp() else Guard.AUDIT_HOOK


def _make_device_file() -> None:
    """Make CUDA's device file while set-user-ID tools still work, where NVIDIA's driver is installed and the file lacks."""
    tool = None if os.path.exists(_GPU_FILE) else shutil.which(_GPU_TOOL)
    if tool is not None:
        import subprocess

        quiet = subprocess.DEVNULL
        try:
            subprocess.run([tool, "-u", "-c=0"], stdin=quiet, stdout=quiet, stderr=quiet, timeout=_GPU_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise NetworkForbidden for an audit event of Python that reaches for the network."""
    if not event.startswith("socket."):
        return
    if event == "socket.__new__":
        is_refused = arguments[1] not in (AF_UNIX, _WRAPPED)
    else:
        is_refused = event in _NAMES or (event in _TO_AN_ADDRESS and isinstance(arguments[1], tuple))
    if is_refused:
        raise NetworkForbidden(
            f"Something asked for the network ({event}), which edgetune forbids itself: nothing was sent. Please report it, "
            "unless a package of yours did it."
        )
