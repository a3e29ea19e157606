"""A scratch file whose bytes are encrypted with a key that only this process has, for pages that do not fit in memory."""

from __future__ import annotations

import secrets
from array import array
from io import FileIO
from typing import TYPE_CHECKING

from edgetune.runtime.cipher import EXTRA, KEY_BYTES
from edgetune.runtime.errors import LockedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, CipherContext

SECTOR = 1 << 16
"""Bytes that are encrypted at a time. AES-CTR takes 4.1 GB/s in sectors of this size, and 0.5 GB/s in ones of 4 KiB, measured
on one core of an AMD EPYC."""
_BLOCK_COUNTER_BYTES = 2
"""Bytes of the counter that AES-CTR itself counts up within a sector, in blocks of 16 bytes."""


class EncryptedScratch:
    """A nameless file whose sectors are encrypted by AES-256-CTR, each time with a new nonce: its number and its version.

    Sectors that were never written read as zeros. The nonce's parts are in memory alone, as is the key: nobody else can read
    the file, which goes with the process. Nobody else writes to it, so nothing is authenticated.
    """

    def __init__(self, file: FileIO) -> None:
        self._file, self._key = file, secrets.token_bytes(KEY_BYTES)
        self._versions = array("q")
        self.name = file.name

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the plain bytes at `offset`."""
        while buffer:
            number, start = divmod(offset, SECTOR)
            piece = self._sector(number)[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            buffer, offset = buffer[len(piece) :], offset + len(piece)

    def write_at(self, buffer: memoryview, offset: int) -> None:
        """Write `buffer` at `offset`. A sector of which it gives only a part is read, changed and written anew."""
        while buffer:
            number, start = divmod(offset, SECTOR)
            piece = buffer[: SECTOR - start]
            sector: bytes | memoryview = piece
            if len(piece) < SECTOR:
                whole = bytearray(self._sector(number))
                whole[start : start + len(piece)] = piece
                sector = bytes(whole)
            self._put(number, sector)
            buffer, offset = buffer[len(piece) :], offset + len(piece)

    def close(self) -> None:
        """Close the file, and so delete it."""
        self._file.close()

    def _sector(self, number: int) -> bytes:
        """Return a sector in plain."""
        if number >= len(self._versions) or not self._versions[number]:
            return bytes(SECTOR)
        sealed = bytearray(SECTOR)
        view, position = memoryview(sealed), number * SECTOR
        while view:
            self._file.seek(position)
            count = self._file.readinto(view)
            if not count:
                raise OSError(f"the scratch file ends at {position} bytes")
            view, position = view[count:], position + count
        return self._keystream(number).update(sealed)

    def _put(self, number: int, sector: bytes | memoryview) -> None:
        if number >= len(self._versions):
            self._versions.extend([0] * (number + 1))
        self._versions[number] += 1
        sealed, position = memoryview(self._keystream(number).update(sector)), number * SECTOR
        while sealed:
            self._file.seek(position)
            count = self._file.write(sealed)
            sealed, position = sealed[count:], position + count

    def _keystream(self, number: int) -> CipherContext | AEADEncryptionContext:
        """Return the keystream of a sector at its present version."""
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise LockedError(EXTRA) from error
        version = self._versions[number]
        nonce = number.to_bytes(6, "big") + version.to_bytes(8, "big") + bytes(_BLOCK_COUNTER_BYTES)
        return Cipher(algorithms.AES(self._key), modes.CTR(nonce)).encryptor()
