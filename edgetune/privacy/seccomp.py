"""Lets the Linux kernel refuse system calls to this process, to all of its threads and to every program that it starts.

The filter is a few instructions of classic BPF, made here and installed through ctypes, because privacy is what edgetune exists
for, and no library confines a running process as it must:

- sandlock 0.9 filters the system calls only of programs that it starts itself. What it can take from a running process are
  rights that Landlock knows, and Landlock refuses neither UDP nor a socket as such. It needs Linux 6.12, and 45 ms to import.
- seccompy 0.2 overlooks the x32 numbers of x86-64's calls, by which its rules can be passed, and compares 64 bits of arguments
  of which the kernel reads 32.
- pyseccomp 0.1 was last released in 2021, and needs a libseccomp that every user would have to install.

Sources: the kernel's Documentation/userspace-api/seccomp_filter.rst, and seccomp(2).
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.privacy.system_calls import NUMBERS

_LOAD, _RETURN = 0x20, 0x06
"""BPF's instructions to load a word of the call (BPF_LD | BPF_W | BPF_ABS), and to return a decision (BPF_RET | BPF_K)."""
EQUALS, AT_LEAST, HAS_A_BIT = 0x15, 0x35, 0x45
"""BPF's comparisons of the loaded word with a value: BPF_JMP with BPF_JEQ, BPF_JGE and BPF_JSET."""
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
"""Decisions: SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, and SECCOMP_RET_ERRNO with the error in its lower 16 bits."""
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in the kernel's struct seccomp_data, in bytes. An argument has 64 bits, the lower 32 first."""
_X32 = 0x40000000
"""First number of x86-64's x32 calls: the same calls under other numbers, for programs with pointers of 32 bits."""
_NO_NEW_PRIVS = 38
"""prctl's PR_SET_NO_NEW_PRIVS, without which only an administrator may install a filter: no program started from here on gains
rights by its set-user-ID bit."""
_SET_FILTER, _GET_ACTION_AVAIL = 1, 2
"""Operations SECCOMP_SET_MODE_FILTER and SECCOMP_GET_ACTION_AVAIL."""
_ALL_THREADS, _KEEP_SPEED = 1, 4
"""Flags SECCOMP_FILTER_FLAG_TSYNC and SECCOMP_FILTER_FLAG_SPEC_ALLOW (Linux 4.17). Without the latter, kernels before 5.16 turn
off a shortcut of the processor for whatever has a filter, since a hostile program could spy on others by it."""


@dataclass(frozen=True)
class Machine:
    """A kind of processor: its name to the kernel's audit, the column of its numbers in NUMBERS, and its seccomp call."""

    audit: int
    column: int
    seccomp: int


MACHINES = {"x86_64": Machine(0xC000003E, 0, 317), "aarch64": Machine(0xC00000B7, 1, 277)}
"""Processors whose system calls are known here, by the names that uname gives them (linux/audit.h)."""


@dataclass(frozen=True)
class Refused:
    """A system call that fails with `error`: always, or where the comparison of an argument's lower 32 bits comes out so.

    Several rules about one call refuse it where any of them does.
    """

    call: str
    argument: int | None = None
    comparison: int = EQUALS
    value: int = 0
    outcome: bool = True
    error: int = errno.EACCES


def machine() -> Machine | None:
    """Return the processor of this process; None where filters cannot be made: another system or processor, or 32 bits."""
    return MACHINES.get(os.uname().machine) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None


def program(refused: Sequence[Refused], machine: Machine) -> bytes:
    """Return the BPF program, 8 bytes an instruction, that refuses these calls and allows all others.

    Calls of another architecture, such as those of a 32-bit program, have other numbers, so their process is killed; x32 calls
    are refused.
    """
    code = [_load(_ARCHITECTURE), _jump(EQUALS, machine.audit, 1, 0), _decide(_KILL)]
    code += [_load(_NUMBER), _jump(AT_LEAST, _X32, 0, 1), _decide(_ERROR | errno.EACCES)]
    for rule in refused:
        number = NUMBERS[rule.call][machine.column]
        if number is not None:
            judged = _judged(rule)
            code += [_jump(EQUALS, number, 0, len(judged)), *judged]
    return b"".join([*code, _decide(_ALLOW)])


def _judged(rule: Refused) -> list[bytes]:
    """Return the instructions that refuse a call whose number is the rule's, or load its number again for the next rule."""
    refusal = _decide(_ERROR | rule.error)
    if rule.argument is None:
        return [refusal]
    comparison = _jump(rule.comparison, rule.value, *((0, 1) if rule.outcome else (1, 0)))
    return [_load(_ARGUMENTS + 8 * rule.argument), comparison, refusal, _load(_NUMBER)]


def _load(offset: int) -> bytes:
    return struct.pack("<HBBI", _LOAD, 0, 0, offset)


def _jump(comparison: int, value: int, skipped_if_true: int, skipped_if_false: int) -> bytes:
    """Return an instruction that skips so many of the next ones, by how a comparison with the loaded word comes out."""
    return struct.pack("<HBBI", comparison, skipped_if_true, skipped_if_false, value)


def _decide(decision: int) -> bytes:
    return struct.pack("<HBBI", _RETURN, 0, 0, decision)


def is_offered() -> bool:
    """Return True if this kernel takes filters for this process."""
    here = machine()
    return here is not None and _call(here.seccomp, _GET_ACTION_AVAIL, 0, struct.pack("<I", _ERROR)) == 0


def install(refused: Sequence[Refused], hostile: bool) -> bool:
    """Refuse these calls from here on, for good, in all threads of this process and in all programs that it starts.

    hostile: True for a process that a file could take over: kernels before 5.16 then slow it down, so that it spies on nobody.
    Return False where there can be no filter: then nothing is refused.
    """
    here = machine()
    if here is None:
        return False
    import ctypes

    code = program(refused, here)
    held = ctypes.create_string_buffer(code, len(code))
    filter = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))  # struct sock_fprog
    if ctypes.CDLL(None).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    wanted = (_ALL_THREADS,) if hostile else (_ALL_THREADS | _KEEP_SPEED, _ALL_THREADS)
    return any(_call(here.seccomp, _SET_FILTER, flags, filter) == 0 for flags in wanted)


def _call(number: int, operation: int, flags: int, structure: bytes) -> int:
    """Make the call seccomp(2) and return its result; not 0 where it failed."""
    import ctypes

    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), ctypes.c_long(operation), ctypes.c_long(flags), structure))
