"""Writes and reads encrypted files: AES-256-GCM in chunks, so that what was changed, cut off, reordered or moved is noticed.

A file is MAGIC, a random salt of 32 bytes, and its bytes in chunks of 64 KiB, the last one shorter, each followed by its tag of
16 bytes. The key is derived from the master key and the salt, so that each file has its own. The nonce of chunk i is i in 11
bytes, then 1 for the last chunk and 0 for the others: the STREAM construction, as in age (https://age-encryption.org/v1). The
file's path in the data folder is authenticated with every chunk.

A log, to which records are added, is LOG_MAGIC, a salt, and records: the length of the ciphertext in 4 bytes, little-endian,
then the ciphertext. The nonce of record i is i in 11 bytes, then 2. The end of a log is not marked: what a crash cuts off of
a plain log is lost likewise. A log that is opened again is written anew, with another salt, so that no nonce is used twice.
"""

from __future__ import annotations

import io
import mmap
import os
import secrets
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from edgetune.runtime.cipher import KEY_BYTES, Cipher, keeper
from edgetune.runtime.errors import DataError, EdgetuneError

MAGIC, LOG_MAGIC = b"edgetune crypt 1", b"edgetune crlog 1"
"""First bytes of an encrypted file, and of an encrypted log; the digit is the format's version."""
HEADER_BYTES = len(MAGIC) + KEY_BYTES
CHUNK = 1 << 16
"""Plain bytes of a chunk, as in age. AES-GCM encrypts 5 GB/s in chunks of this size and 8 GB/s in ones of a mebibyte, measured
on one core of an AMD EPYC: both are faster than disks."""
TAG_BYTES = 16
_SEALED = CHUNK + TAG_BYTES
_MORE, _LAST, _RECORD = b"\0", b"\1", b"\2"
"""Last byte of a nonce: of a chunk that others follow, of the last chunk, of a record of a log."""
_LENGTH_BYTES = 4


class EncryptedWriter(io.BufferedIOBase):
    """Encrypts what is written to it into another file. `flush`, or closing, writes the last chunk and so ends the file."""

    def __init__(self, file: BinaryIO, cipher: Cipher, path: Path) -> None:
        self._file, self._buffer, self._number, self._ended = file, bytearray(), 0, False
        salt, self._place = secrets.token_bytes(KEY_BYTES), cipher.place(path)
        self._key = cipher.file_key(salt, b"file")
        file.write(MAGIC + salt)

    def writable(self) -> bool:
        """Return True: it can be written to."""
        return True

    def fileno(self) -> int:
        """Return the number of the file that holds the ciphertext, for os.fsync."""
        return self._file.fileno()

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Add bytes. Raises ValueError once `flush` has ended the file."""
        if self._ended:
            raise ValueError("an encrypted file takes nothing more once it is flushed")
        view = memoryview(data).cast("B")
        count = len(view)
        if len(self._buffer) + count > CHUNK:  # the last chunk is held back, since only the end says which it is
            taken = CHUNK - len(self._buffer)
            self._put(bytes(self._buffer) + view[:taken], _MORE)
            self._buffer.clear()
            view = view[taken:]
            while len(view) > CHUNK:
                self._put(view[:CHUNK], _MORE)
                view = view[CHUNK:]
        self._buffer += view
        return count

    def flush(self) -> None:
        """Write the last chunk: nothing can be added after it."""
        if not self._ended:
            self._ended = True
            self._put(bytes(self._buffer), _LAST)
            self._buffer.clear()
        self._file.flush()

    def close(self) -> None:
        """End the file and close it."""
        try:
            super().close()  # flushes
        finally:
            self._file.close()

    def _put(self, plain: bytes | memoryview, kind: bytes) -> None:
        self._file.write(self._key.encrypt(_nonce(self._number, kind), plain, self._place))
        self._number += 1


class EncryptedReader(FileIO):
    """Reads the plain bytes of an encrypted file. Raises `error` for a chunk that is not as it was written.

    It holds one chunk in memory at a time. It has no `fileno`, so that nobody maps or copies the ciphertext by mistake.
    """

    def __init__(self, file: FileIO, cipher: Cipher, path: Path, error: type[EdgetuneError]) -> None:
        """Take over an open file. Raises `error` for one that is too short."""
        super().__init__(os.dup(file.fileno()), "rb")
        file.close()
        self._path, self._error, self._position = path, error, 0
        stored = super().seek(0, os.SEEK_END) - HEADER_BYTES
        super().seek(len(MAGIC))
        salt = super().read(KEY_BYTES) or b""
        chunks = -(-stored // _SEALED)
        self._last, self.size = chunks - 1, stored - chunks * TAG_BYTES
        """The number of the last chunk, and the size of the plain file in bytes."""
        if len(salt) < KEY_BYTES or stored - self._last * _SEALED < TAG_BYTES or chunks < 1:
            self.close()
            raise changed(path, error)
        self._key, self._place = cipher.file_key(salt, b"file"), cipher.place(path)
        self._chunk: tuple[int, bytes] = (-1, b"")

    def fileno(self) -> int:
        """Raise UnsupportedOperation: the descriptor would give the ciphertext."""
        raise io.UnsupportedOperation("an encrypted file has no descriptor to read from")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a plain byte, and return its number."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        """Return the number of the plain byte that is read next."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return up to `size` plain bytes, all that are left for -1."""
        left = max(self.size - self._position, 0)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        self._fill(memoryview(data))
        return bytes(data)

    def readall(self) -> bytes:
        """Return all plain bytes that are left."""
        return self.read()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer with plain bytes, and return how many there were."""
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(self.size - self._position, 0))
        self._fill(view[:count])
        return count

    def in_memory(self) -> DecryptedMemory:
        """Return all plain bytes in memory of the process's own, as a mapping of the plain file would give them."""
        if hasattr(mmap, "MAP_PRIVATE"):
            memory = DecryptedMemory(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = DecryptedMemory(-1, self.size)
        self.seek(0)
        self.readinto(memoryview(memory))
        return memory

    def _fill(self, view: memoryview) -> None:
        """Fill `view` with the bytes at the position, and move it. They are known to be there."""
        while view:
            number, start = divmod(self._position, CHUNK)
            piece = self._opened(number)[start : start + len(view)]
            view[: len(piece)] = piece
            view, self._position = view[len(piece) :], self._position + len(piece)

    def _opened(self, number: int) -> bytes:
        """Return a chunk in plain. The last one that was read is kept."""
        if self._chunk[0] != number:
            kind = _LAST if number == self._last else _MORE
            super().seek(HEADER_BYTES + number * _SEALED)
            sealed = super().read(_SEALED) or b""
            try:
                self._chunk = number, self._key.decrypt(_nonce(number, kind), sealed, self._place)
            except Exception as error:  # InvalidTag, and ValueError for too few bytes
                raise changed(self._path, self._error) from error
        return self._chunk[1]


class DecryptedMemory(mmap.mmap):
    """The plain bytes of an encrypted file. The system must not drop them from memory: no file has them."""


class EncryptedLog(io.BufferedIOBase):
    """A log to which records are added; what is written between two calls of `flush` is one record."""

    def __init__(self, file: BinaryIO, cipher: Cipher, path: Path) -> None:
        self._file, self._pending, self._number, self._size = file, bytearray(), 0, 0
        salt, self._place = secrets.token_bytes(KEY_BYTES), cipher.place(path)
        self._key = cipher.file_key(salt, b"log")
        file.write(LOG_MAGIC + salt)

    def writable(self) -> bool:
        """Return True: it can be written to."""
        return True

    def fileno(self) -> int:
        """Return the number of the file that holds the ciphertext, for os.fsync."""
        return self._file.fileno()

    def tell(self) -> int:
        """Return the number of plain bytes."""
        return self._size

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Add bytes to the record that the next `flush` writes."""
        self._pending += data
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        """Write what was added since the last time as one record, and give it to the system."""
        if self._pending:
            sealed = self._key.encrypt(_nonce(self._number, _RECORD), bytes(self._pending), self._place)
            self._number += 1
            self._pending.clear()
            self._file.write(len(sealed).to_bytes(_LENGTH_BYTES, "little") + sealed)
        self._file.flush()

    def move(self, source: Path, path: Path) -> None:
        """Rename the file from `source` to `path`, once it is on the disk.

        It is closed meanwhile: Windows renames no open file.
        """
        self.flush()
        os.fsync(self.fileno())
        self._file.close()
        os.replace(source, path)
        self._file = open(path, "ab")  # noqa: SIM115 - `close` closes it

    def close(self) -> None:
        """Write what was added last, and close the file."""
        try:
            super().close()  # flushes
        finally:
            self._file.close()


def decrypted(file: FileIO, path: Path, error: type[EdgetuneError] = DataError) -> FileIO | io.BytesIO:
    """Return a file from which the plain bytes can be read: `file` itself, at its beginning, unless it is encrypted.

    error: raised for an encrypted file that is not as edgetune wrote it. Raises LockedError where there is no key.
    """
    try:
        start = file.read(len(MAGIC))
        file.seek(0)
    except OSError:  # a folder, or a pipe: its reader says so
        return file
    if start not in (MAGIC, LOG_MAGIC):
        return file
    try:
        cipher = keeper().to_read(path)
        if start == MAGIC:
            return EncryptedReader(file, cipher, path, error)
        with file:
            return io.BytesIO(b"".join(_records(file.readall(), cipher, path, error)))
    except BaseException:
        file.close()
        raise


def is_encrypted(path: Path) -> bool:
    """Return True for a file that begins as an encrypted one does."""
    with FileIO(str(path)) as file:
        return file.read(len(MAGIC)) in (MAGIC, LOG_MAGIC)


def changed(path: Path, error: type[EdgetuneError]) -> EdgetuneError:
    """Return the error for an encrypted file that its key does not open."""
    return error(
        f"{path} is encrypted, and not as edgetune wrote it here: it was damaged, changed, or moved from another place. "
        "Restore it from a backup, or delete it."
    )


def _records(data: bytes, cipher: Cipher, path: Path, error: type[EdgetuneError]) -> Iterator[bytes]:
    """Yield the records of a log in plain, but for one at the end that a crash cut off."""
    salt, place, position, number = data[len(LOG_MAGIC) : HEADER_BYTES], cipher.place(path), HEADER_BYTES, 0
    if len(salt) < KEY_BYTES:
        return
    key = cipher.file_key(salt, b"log")
    while position < len(data):
        length = int.from_bytes(data[position : position + _LENGTH_BYTES], "little")
        sealed = data[position + _LENGTH_BYTES : position + _LENGTH_BYTES + length]
        if len(sealed) < length or len(data) < position + _LENGTH_BYTES:
            return
        try:
            yield key.decrypt(_nonce(number, _RECORD), sealed, place)
        except Exception as failure:
            raise changed(path, error) from failure
        position, number = position + _LENGTH_BYTES + length, number + 1


def _nonce(number: int, kind: bytes) -> bytes:
    """Return the 12 bytes of the nonce of a chunk or a record."""
    return number.to_bytes(11, "big") + kind
