"""Turns encryption at rest on and off: converts every file of the data folder that may hold a person's text or adapters.

Each file is replaced in one step, and the state in encryption.json says which way the conversion goes, so that it can be
interrupted at any moment and goes on when the command is typed again. While it lasts, nothing else writes to the folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from edgetune import keychain
from edgetune.encryption import ENCRYPTED, Encryption, State, forget_keys, is_covered, load
from edgetune.encryption import FILE as STATE_FILE
from edgetune.home import home, private_folder
from edgetune.lock import Lock
from edgetune.progress import Progress, ignore
from edgetune.runtime.cipher import KEY_BYTES, Cipher
from edgetune.runtime.encrypted_file import EncryptedWriter, decrypted, is_encrypted
from edgetune.runtime.errors import BusyError, DataError, LockedError, UsageError
from edgetune.runtime.files import explain_full_disk, mend, plain_temporary, sync_folder
from edgetune.scratch import delete_leftovers

PLAIN = (
    "your notes themselves, and private.txt and config.toml, which you write",
    "models/: base models, converted from files that are on this machine anyway",
    "nights/last.log, which the system's scheduler writes: sentences and paths, no text of notes",
    "nights/locked.log: when a night could not begin, since the keychain was locked",
    "exports and folders named with --out: what you take out of the data folder is for other programs",
    "what the disk keeps of files as they were, snapshots, backups made before, and swapped-out memory",
)
"""What encryption at rest does not cover, as sentences for the user."""
_PIECE = 1 << 20
"""Bytes that are converted at a time."""
_EACH_FILE = 1 << 20
"""Bytes that count for a file beside its own: about what is converted while a file, however small, reaches the disk and gets
its name. Chosen by hand."""


@dataclass(frozen=True)
class Converted:
    """The outcome of encrypting or decrypting the data folder `home`."""

    home: str
    files: int
    """Files that were converted."""
    bytes: int
    """Their size as plain files."""
    already: int
    """Files that had that form before."""
    damaged: tuple[str, ...] = ()
    """Paths of files that could not be converted and were left as they are."""


def encrypt(progress: Progress = ignore) -> Converted:
    """Turn encryption at rest on, and encrypt what is in the data folder. Interrupted, it goes on when it is called again.

    progress: called with the bytes done and the bytes in total, each file counted as some bytes more; it may raise to end the
    work. Raises LockedError without a keychain that keeps the key, BusyError while a run or a night is going, ResourceError
    on a full disk. Then nothing is lost.
    """
    folder = home()
    with _nothing_running(folder):
        found = _with_key(folder)
        if found.state is not State.ON:
            found = found.save(folder, State.ENCRYPTING)
        done = _convert(folder, Cipher(folder, found.key()), True, progress)
        found.save(folder, State.ON)
    return done


def decrypt(progress: Progress = ignore) -> Converted:
    """Decrypt the data folder, turn encryption at rest off, and delete the key. progress and errors as in `encrypt`.

    A file that was damaged or changed is left encrypted and named, and the key is kept then.
    """
    folder = home()
    with _nothing_running(folder):
        found = load(folder)
        if found is None:
            raise UsageError("Encryption at rest is off. To turn it on, type edgetune encrypt.")
        if any(is_encrypted(path) for path in covered_files(folder)):
            cipher = Cipher(folder, found.key())
            found = found.save(folder, State.DECRYPTING)
            done = _convert(folder, cipher, False, progress)
        else:
            done = Converted(str(folder), 0, 0, 0)
        if not done.damaged:
            keychain.delete(found.key_id)
            (folder / STATE_FILE).unlink()
            sync_folder(folder)
            forget_keys()
    return done


def discard_key(folder: Path) -> None:
    """Delete the key of a data folder from the keychain, if there is one. Raises LockedError, UsageError."""
    found = load(folder)
    if found is not None:
        keychain.delete(found.key_id)
        forget_keys()


def covered_files(folder: Path) -> list[Path]:
    """Return the files of a data folder that are encrypted when encryption is on, in the order of their paths."""
    found = []
    for name in ENCRYPTED:
        top = folder / name
        inner = [Path(place, file) for place, _, files in os.walk(top) for file in files] if not top.is_symlink() else []
        found += [path for path in inner or [top] if is_covered(folder, path)]
    found += [path for path in folder.glob(".*.tmp") if is_covered(folder, path)]
    return sorted(path for path in found if _is_regular(path))


def plain_files(folder: Path) -> int:
    """Return the number of files that are plain and should not be, while encryption is on."""
    return sum(not is_encrypted(path) for path in covered_files(folder))


@contextlib.contextmanager
def _nothing_running(folder: Path) -> Iterator[None]:
    """Hold every lock of runs, nights, exports and scratch folders for the block. Raises BusyError where one is held."""
    delete_leftovers()
    with contextlib.ExitStack() as locks:
        own = private_folder(folder / "unfinished") / "encryption.lock"
        locks.enter_context(Lock(own, "the conversion of the data folder"))
        for name in ("unfinished", "scratch", "nights"):
            for path in sorted((folder / name).glob("*.lock")):
                if path != own:
                    locks.enter_context(Lock(path, "edgetune's folder"))
        mend(folder / STATE_FILE)
        yield


def _with_key(folder: Path) -> Encryption:
    """Return the folder's record once its key is in the keychain: a new key, unless files are encrypted with one already."""
    found = load(folder)
    if found is not None and found.state is not State.PREPARING:
        try:
            found.key()
            return found
        except LockedError:
            if keychain.fetch(found.key_id) is not None or any(is_encrypted(path) for path in covered_files(folder)):
                raise
    keychain.system_keychain()
    key = secrets.token_bytes(KEY_BYTES)
    # The record first: a crash must not leave a key in the keychain that nothing names.
    if found is not None:
        keychain.delete(found.key_id)
    found = Encryption.begin(key).save(folder, State.PREPARING)
    keychain.store(found.key_id, key)
    forget_keys()
    found.key()
    return found


def _convert(folder: Path, cipher: Cipher, encrypts: bool, progress: Progress) -> Converted:
    """Bring every covered file to one form."""
    _delete_half_written(folder)
    paths = covered_files(folder)
    waiting = [path for path in paths if is_encrypted(path) is not encrypts]
    sizes = [path.stat().st_size for path in waiting]
    done, total, damaged = 0, sum(sizes) + len(sizes) * _EACH_FILE, list[str]()
    for path, size in zip(waiting, sizes, strict=True):
        tell = functools.partial(_tell, progress, done, total)
        try:
            _convert_file(path, cipher if encrypts else None, tell)
        except DataError:
            damaged.append(str(path))
        except FileNotFoundError:  # a command that only reads may have deleted it
            pass
        done += size + _EACH_FILE
        progress(done, total)
    return Converted(str(folder), len(waiting) - len(damaged), sum(sizes), len(paths) - len(waiting), tuple(damaged))


def _delete_half_written(folder: Path) -> None:
    """Delete what killed processes had not finished: half converted, it could never be read. What they moved aside is whole."""
    for path in covered_files(folder):
        parts = [part for part in path.relative_to(folder).parts if part.startswith(".") and part.endswith(".tmp")]
        if parts and not any(".old." in part for part in parts):
            path.unlink(missing_ok=True)


def _convert_file(path: Path, cipher: Cipher | None, tell: Callable[[int], object]) -> None:
    """Replace a file by its encrypted form, or by its plain one where there is no cipher. Its times and mode stay."""
    about = path.stat()
    with explain_full_disk(path):
        raw, temporary = plain_temporary(path)
        target = raw if cipher is None else cast(BinaryIO, EncryptedWriter(raw, cipher, path))
        try:
            with target, decrypted(FileIO(str(path)), path) as source:
                count = 0
                while piece := source.read(_PIECE):
                    target.write(piece)
                    count += len(piece)
                    tell(count)
                target.flush()
                os.fsync(target.fileno())
            os.utime(temporary, ns=(about.st_atime_ns, about.st_mtime_ns))
            os.chmod(temporary, stat.S_IMODE(about.st_mode))
            now = path.stat()
            if (now.st_ino, now.st_mtime_ns, now.st_size) != (about.st_ino, about.st_mtime_ns, about.st_size):
                raise BusyError(f"Another program has changed {path} meanwhile. End it, and type the same command again.")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _tell(progress: Progress, before: int, total: int, count: int) -> None:
    """Report the progress of all files from that of one: `count` of its bytes are done, and `before` of the files before it."""
    progress(min(before + count, total), total)


def _is_regular(path: Path) -> bool:
    """Return True for a file that is there and no link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
