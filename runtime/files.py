"""Write files and folders so that a reader never sees half of one: to a temporary sibling, then fsync, then rename.

Everything is private: mode 0600 for files, 0700 for folders. Where the product keeps its data encrypted, every function here
reads and writes encrypted files as if they were plain (runtime/encrypted_file.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
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
from typing import BinaryIO, cast

from edgetune.runtime.cipher import keeper
from edgetune.runtime.encrypted_file import (
    DecryptedMemory,
    EncryptedLog,
    EncryptedReader,
    EncryptedWriter,
    decrypted,
)
from edgetune.runtime.encrypted_scratch import EncryptedScratch
from edgetune.runtime.errors import DataError, ResourceError, UsageError

PRIVATE_FILE = 0o600
_SUFFIX = ".tmp"
Scratch = FileIO | EncryptedScratch
"""A nameless scratch file, for `read_at` and `write_at`."""


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
    if isinstance(mapping, DecryptedMemory):
        return
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
    Nothing can be written to it any more once it is flushed.
    """
    cipher = keeper().to_write(path)
    file, name = plain_temporary(path)
    return file if cipher is None else cast(BinaryIO, EncryptedWriter(file, cipher, path)), name


def plain_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """Create a file as `new_file` does that takes bytes as they are, also where those at `path` are to be encrypted."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    return os.fdopen(descriptor, "wb"), Path(name)


def private_file(path: Path) -> BinaryIO:
    """Create a file that its owner alone can read, in a folder that is not published yet, and open it for writing."""
    cipher = keeper().to_write(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags, PRIVATE_FILE), "wb")
    return file if cipher is None else cast(BinaryIO, EncryptedWriter(file, cipher, path))


def open_own(path: Path | str) -> BinaryIO:
    """Open a file that edgetune wrote for reading.

    Raises OSError; of an encrypted file, DataError where it was changed, and LockedError where there is no key.
    """
    plain = decrypted(FileIO(str(path)), Path(path))
    return plain if isinstance(plain, io.BytesIO) else io.BufferedReader(plain)


def read_own(path: Path | str) -> bytes:
    """Return the bytes of a file that edgetune wrote. Raises what `open_own` raises."""
    with open_own(path) as file:
        return file.read()


def map_own(path: Path) -> mmap.mmap | None:
    """Return the bytes of a file that edgetune wrote, as `map_file` does; None for an empty one. Raises as `open_own` does."""
    with decrypted(FileIO(str(path)), path) as file:
        if isinstance(file, io.BytesIO):
            raise DataError(f"{path} is a log, which is read from its beginning. Delete it and type the command again.")
        return map_file(file) if size_of(file) else None


def map_file(file: FileIO) -> mmap.mmap:
    """Return the bytes of an open file: the file itself, mapped, or a copy in memory if it is encrypted.

    Raises ValueError for an empty file, which cannot be mapped.
    """
    if isinstance(file, EncryptedReader):
        return file.in_memory()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def size_of(file: FileIO) -> int:
    """Return the size in bytes of a file that was just opened."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def move_file(source: Path, path: Path) -> None:
    """Rename a file, replacing the one at `path` in one step. An encrypted one is bound to its path, so it is written anew."""
    if keeper().to_write(path) is None:
        os.replace(source, path)
    else:
        atomic_write(path, read_own(source))
        source.unlink()


def open_log(path: Path, kept_bytes: int = -1) -> BinaryIO:
    """Open a private file to add lines to, after its first `kept_bytes` plain bytes (-1: all).

    A half-written last line is cut off. What is written is safe from a crash of the process after each `flush`.
    """
    cipher = keeper().to_write(path)
    if cipher is None:
        plain = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), PRIVATE_FILE), "r+b")
        plain.seek(plain.read(kept_bytes).rfind(b"\n") + 1)
        plain.truncate()
        return plain
    kept = read_own(path)[: kept_bytes if kept_bytes >= 0 else None] if path.exists() else b""
    file, name = plain_temporary(path)
    log = EncryptedLog(file, cipher, path)
    log.write(kept[: kept.rfind(b"\n") + 1])
    log.move(name, path)
    return cast(BinaryIO, log)


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
    """Return the SHA-256 of a file's plain bytes in hexadecimal, reading a mebibyte at a time."""
    digest = hashlib.sha256()
    with open_own(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def scratch_file(folder: Path, nbytes: int = 0) -> Scratch:
    """Open an unbuffered scratch file of `nbytes` zeros in `folder`. It has no name, so it disappears with the process.

    It is for `read_at` and `write_at`, and is encrypted in the data folder if that is. Raises ResourceError when the disk does
    not have enough space.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with explain_full_disk(folder):
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - the caller closes it
        if nbytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
    return EncryptedScratch(file) if keeper().hides_scratch(folder) else file


def read_at(file: Scratch, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the bytes of a file at `offset`, without a copy. Raises OSError if the file ends before."""
    if isinstance(file, EncryptedScratch):
        file.read_at(buffer, offset)
        return
    while buffer:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [buffer], offset)
        else:
            file.seek(offset)
            count = file.readinto(buffer) or 0
        if count == 0:
            raise OSError(errno.EIO, f"the file ends at {offset} bytes", str(file.name))
        buffer, offset = buffer[count:], offset + count


def write_at(file: Scratch, buffer: memoryview, offset: int) -> None:
    """Write `buffer` to a file at `offset`."""
    if isinstance(file, EncryptedScratch):
        file.write_at(buffer, offset)
        return
    while buffer:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file.fileno(), buffer, offset)
        else:
            file.seek(offset)
            count = file.write(buffer)
        buffer, offset = buffer[count:], offset + count


def scratch_in_memory(file: Scratch, nbytes: int) -> mmap.mmap:
    """Return the first `nbytes` of a scratch file: mapped, so that writing changes a copy, or copied if it is encrypted."""
    if not isinstance(file, EncryptedScratch):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    memory = mmap.mmap(-1, nbytes)
    file.read_at(memoryview(memory), 0)
    return memory
