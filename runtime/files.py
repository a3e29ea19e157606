"""Write files and folders so that a reader never sees half of one: to a temporary sibling, then fsync, then rename.

Everything is private: mode 0600 for files, 0700 for folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from edgetune.runtime.errors import ResourceError, UsageError

PRIVATE_FILE = 0o600
_SUFFIX = ".tmp"


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into a ResourceError that says what to do; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"The disk is full: could not write {path}; nothing already saved was lost. "
                "Free some space and run the same command again."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows neither can open a folder nor needs to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_pages(mapping: mmap.mmap, start: int, nbytes: int) -> None:
    """Let the system drop the pages that hold these bytes alone; the next access reads them again. Linux and macOS only."""
    page = mmap.PAGESIZE
    first = -(-start // page) * page
    whole = (start + nbytes) // page * page - first
    if whole > 0 and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, whole)


def is_ours(path: Path) -> bool:
    """Return True for a file or folder that is no link and that this process's user owns. Windows tells no owner by number."""
    try:
        about = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(about.st_mode) and (not hasattr(os, "geteuid") or about.st_uid == os.geteuid())


def new_file(path: Path) -> tuple[BinaryIO, Path]:
    """Create a private temporary file beside `path`; return it, open for writing, and its own path.

    Nobody can foresee its name: in a folder that others can write, they could else put a link or a file of theirs there.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    return os.fdopen(descriptor, "wb"), Path(name)


def atomic_write(path: Path | str, data: bytes | str, mode: int = PRIVATE_FILE) -> None:
    """Replace the content of `path` by `data` in one step.

    Raises ResourceError when the disk is full; an old file then stays unchanged.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, name = new_file(path)
        try:
            with file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def check_place(path: Path) -> None:
    """Create the folders above `path` and check that they can be written to, before work begins whose result goes there.

    Raises UsageError if they cannot, ResourceError when the disk is full.
    """
    try:
        with explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rmdir(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
    except OSError as error:
        raise UsageError(f"{path} cannot be created ({error.strerror}); name another folder.") from error


def refuse_occupied(path: Path) -> None:
    """Raise UsageError unless a new folder can take this name: nothing is there, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} already exists; name a new folder, or delete it first.")


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a private temporary folder that becomes `path` when the block ends, and is deleted when the block raises.

    An existing `path` is replaced by `replace_folder`, so that a crash leaves one whole folder.
    """
    path = Path(path)
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as handle:
                        os.fsync(handle.fileno())
            replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def replace_folder(source: Path, path: Path) -> None:
    """Rename the folder `source` to `path`, replacing a folder that already exists there.

    Where the system can exchange two names, `path` exists at every moment. Elsewhere the old folder is moved aside first,
    and `mend` brings it back if the process crashes between the two renames.
    """
    old = None
    if path.exists():
        # Exchanging a symbolic link would delete the folder that it points to: the link itself is moved aside instead.
        if not path.is_symlink() and exchange(source, path):
            sync_folder(path.parent)
            shutil.rmtree(source, ignore_errors=True)
            return
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.", suffix=_SUFFIX))
        os.rename(path, old / path.name)
    os.rename(source, path)
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders of one file system in one step; return False if the system cannot.

    Linux: renameat2(2), since glibc 2.28 and kernel 3.15. macOS: renamex_np(2), on APFS.
    """
    names, swap, here = (os.fsencode(first), os.fsencode(second)), 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD
    if sys.platform == "win32":
        return False
    system = ctypes.CDLL(None)
    if sys.platform == "darwin":
        return hasattr(system, "renamex_np") and system.renamex_np(*names, ctypes.c_uint(swap)) == 0
    return hasattr(system, "renameat2") and system.renameat2(here, names[0], here, names[1], ctypes.c_uint(swap)) == 0


def mend(path: Path) -> None:
    """Clean up after a crash during a write to `path`: restore a folder that was moved aside, delete half-written ones.

    Only the one process that may write to `path` can call this: another's unfinished write would be deleted. What another user
    put there is left alone.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.(old\.)?\w{{8}}{re.escape(_SUFFIX)}")
    if not path.parent.is_dir():
        return
    for entry in [entry for entry in path.parent.iterdir() if leftover.fullmatch(entry.name) and is_ours(entry)]:
        moved_aside = entry / path.name
        if entry.name.startswith(f".{path.name}.old.") and moved_aside.is_dir() and not path.exists():
            os.rename(moved_aside, path)
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal, reading a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def scratch_file(folder: Path, nbytes: int = 0) -> FileIO:
    """Open an unbuffered scratch file of `nbytes` zeros in `folder`. It has no name, so it disappears with the process.

    Raises ResourceError when the disk does not have enough space.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with explain_full_disk(folder):
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the caller closes it
        if nbytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
    return file


def read_at(file: FileIO, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the bytes of a file at `offset`, without a copy. Raises OSError if the file ends before."""
    while buffer:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [buffer], offset)
        else:
            file.seek(offset)
            count = file.readinto(buffer) or 0
        if count == 0:
            raise OSError(errno.EIO, f"the file ends at {offset} bytes", str(file.name))
        buffer, offset = buffer[count:], offset + count


def write_at(file: FileIO, buffer: memoryview, offset: int) -> None:
    """Write `buffer` to a file at `offset`."""
    while buffer:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file.fileno(), buffer, offset)
        else:
            file.seek(offset)
            count = file.write(buffer)
        buffer, offset = buffer[count:], offset + count
