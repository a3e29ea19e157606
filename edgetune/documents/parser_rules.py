"""Lists what Linux refuses to the process that parses documents: system calls by seccomp, and reading by Landlock."""

from __future__ import annotations

import errno
import os

from edgetune.privacy.seccomp import EQUALS, HAS_A_BIT, Refused

SYSTEM_FOLDERS = (
    "/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/localtime",
    "/dev/null", "/dev/urandom", "/sys/devices/system/cpu",
)  # fmt: skip
"""Folders and files that a parser may read beside Python's own: the system's programs, libraries and fonts, and the zone of its
clock. No user keeps notes in them."""
_CLONE_THREAD = 0x10000
"""Flag of clone(2) for a thread of the same process."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
"""Flags of open(2) with which a file could change."""
_SET_OWNER, _SET_OWNER_EX = 8, 15
"""Commands F_SETOWN and F_SETOWN_EX of fcntl(2), by which the kernel sends another process a signal when a file is ready."""
_TYPE_INTO_TERMINAL, _CONSOLE = 0x5412, 0x541C
"""Requests TIOCSTI and TIOCLINUX of ioctl(2), by which a process types into its terminal what a shell then runs."""
_SOCKETS = "socket socketpair io_uring_setup"
_PROCESSES = """
fork vfork execve execveat unshare setns
kill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal pidfd_getfd
ptrace process_vm_readv process_vm_writev
"""
"""Calls that start programs and processes, or reach into others."""
_FILES = """
creat open_by_handle_at truncate mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat
mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat
setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat file_setattr
"""
"""Calls that change files and folders, or what the system knows of them."""
_SYSTEM = """
mount umount2 move_mount open_tree fsopen fsmount mount_setattr pivot_root chroot
bpf perf_event_open userfaultfd add_key request_key keyctl mq_open mq_unlink
shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
"""
"""Calls that no parser needs, and that have let programs out of their cages, or that reach other programs."""


def refused_calls() -> list[Refused]:
    """Return the system calls that are refused to this process, which may still read, take memory and start threads.

    clone3 and openat2 keep their flags where no filter can see them; told that there are no such calls, the C library makes the
    older ones.
    """
    return [
        Refused("clone3", error=errno.ENOSYS),
        Refused("openat2", error=errno.ENOSYS),
        Refused("clone", 0, HAS_A_BIT, _CLONE_THREAD, outcome=False),
        Refused("openat", 2, HAS_A_BIT, _WRITING),
        Refused("open", 1, HAS_A_BIT, _WRITING),
        Refused("tgkill", 0, EQUALS, os.getpid(), outcome=False),
        Refused("prlimit64", 0, EQUALS, 0, outcome=False),
        Refused("fcntl", 1, EQUALS, _SET_OWNER),
        Refused("fcntl", 1, EQUALS, _SET_OWNER_EX),
        Refused("ioctl", 1, EQUALS, _TYPE_INTO_TERMINAL),
        Refused("ioctl", 1, EQUALS, _CONSOLE),
        *(Refused(call) for call in f"{_SOCKETS} {_PROCESSES} {_FILES} {_SYSTEM}".split()),
    ]
