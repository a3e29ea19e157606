"""Writing so that a reader never sees half a file: a temporary sibling, fsync, rename. Everything is private (0600/0700)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from edgetune.runtime.errors import ResourceError, UsageError

PRIVATE_FILE = 0o600
_SUFFIX = ".tmp"


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into the sentence a user can act on; other errors pass through."""
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
    """Make renames inside `folder` durable. Windows cannot open a folder, and needs no such thing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path | str, data: bytes | str, mode: int = PRIVATE_FILE) -> None:
    """Replace `path` by `data` in one step.

    Raises ResourceError when the disk is full; the old file, if any, is then still there.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def check_place(path: Path) -> None:
    """Make the folders above `path` and try to write beside it, before the work whose result goes there begins.

    Raises UsageError where that cannot be, ResourceError when the disk is full.
    """
    try:
        with explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rmdir(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror}); name another folder.") from error


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a private temporary folder that becomes `path` when the block ends, and vanishes when it raises.

    An existing `path` is replaced as `replace_folder` does, so that a crash leaves one whole folder.
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
    """Rename folder `source` to `path`, replacing a folder that stands there.

    Where the system can exchange two names, `path` is there all the time. Else the old folder is moved aside first, and
    `mend` brings it back after a crash in that moment.
    """
    old = None
    if path.exists():
        if not path.is_symlink() and exchange(source, path):  # a link goes aside; what it points to stays
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
    """Let two files or folders of one file system change names in one step; False, and nothing done, where that cannot be.

    Linux: renameat2(2), from glibc 2.28 and kernel 3.15 on; macOS: renamex_np(2), on APFS.
    """
    names, swap, here = (os.fsencode(first), os.fsencode(second)), 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD
    if sys.platform == "win32":
        return False
    system = ctypes.CDLL(None)
    if sys.platform == "darwin":
        return hasattr(system, "renamex_np") and system.renamex_np(*names, ctypes.c_uint(swap)) == 0
    return hasattr(system, "renameat2") and system.renameat2(here, names[0], here, names[1], ctypes.c_uint(swap)) == 0


def mend(path: Path) -> None:
    """Undo what a crash while `path` was written left beside it: a folder moved aside goes back, half-written ones go.

    Only for whoever alone writes there.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.(old\.)?\w{{8}}{re.escape(_SUFFIX)}")
    if not path.parent.is_dir():
        return
    for left in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        aside = left / path.name
        if left.name.startswith(f".{path.name}.old.") and aside.is_dir() and not path.exists():
            os.rename(aside, path)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sha256_file(path: Path | str) -> str:
    """Hex digest of a file's bytes, read a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def scratch_file(folder: Path, nbytes: int = 0) -> FileIO:
    """An unbuffered private file of `nbytes` zeros in `folder` that has no name, so that it ends with the process.

    Raises ResourceError when the disk has not that much room.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with explain_full_disk(folder):
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it is handed out
        if nbytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
    return file


def read_at(file: FileIO, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with a file's bytes from `offset` on, without a copy. Raises OSError where the file is shorter."""
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
    """Write `buffer` into a file from `offset` on."""
    while buffer:
        if hasattr(os, "pwrite"):
            count = os.pwrite(file.fileno(), buffer, offset)
        else:
            file.seek(offset)
            count = file.write(buffer)
        buffer, offset = buffer[count:], offset + count
