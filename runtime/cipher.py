"""Knows which files are encrypted, and with what: the runtime asks a `Keeper`, which the product installs.

Without a keeper nothing is encrypted. The runtime knows no keychain.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgetune.runtime.errors import LockedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
"""Size of the master key, of each file's own key, and of the salt that the one is derived from the other with: AES-256."""
EXTRA = "Encryption at rest needs keyring and cryptography; type pip install 'edgetune[encryption]'."
"""Sentence for an installation without the packages."""
_TEMPORARY = re.compile(r"\.(?P<name>.+?)\.(?P<old>old\.)?\w{8}\.tmp")
"""Pattern of the temporary names that runtime/files.py gives to what it will rename."""


@dataclass(frozen=True)
class Cipher:
    """The master key of the folder `root`, from which each file gets a key of its own."""

    root: Path
    master: bytes = field(repr=False)

    def place(self, path: Path | str) -> bytes:
        """Return what a file's chunks are bound to: its path within `root`, under the name that it will have in the end."""
        inner = place_within(self.root, Path(path))
        if inner is None:
            raise LockedError(f"{path} is encrypted and lies outside the data folder {self.root}. Move it back there.")
        return final_name(inner).encode("utf-8", "surrogateescape")

    def file_key(self, salt: bytes, purpose: bytes) -> AESGCM:
        """Return the key of one file, by HKDF-SHA-256 (RFC 5869). salt: KEY_BYTES random bytes that the file begins with."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise LockedError(EXTRA) from error
        return AESGCM(derived(self.master, salt, purpose))


def derived(master: bytes, salt: bytes, purpose: bytes) -> bytes:
    """Return a key of KEY_BYTES bytes derived from the master key. Raises LockedError without the package for it."""
    try:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise LockedError(EXTRA) from error
    return HKDF(SHA256(), KEY_BYTES, salt, b"edgetune " + purpose).derive(master)


class Keeper(Protocol):
    """Decides which files are encrypted, and holds the key."""

    def to_write(self, path: Path) -> Cipher | None:
        """Return the cipher that a file at `path` is to be written with; None for one that stays plain.

        Raises LockedError where the key cannot be had.
        """
        ...

    def to_read(self, path: Path) -> Cipher:
        """Return the cipher that the encrypted file at `path` was written with. Raises LockedError where it cannot be had."""
        ...

    def hides_scratch(self, folder: Path) -> bool:
        """Return True if nothing plain may be written to a scratch file in `folder`."""
        ...


class NoKeeper:
    """The keeper of a program that encrypts nothing. Every method is one of `Keeper`."""

    def to_write(self, path: Path) -> Cipher | None:
        """Return None: no file is encrypted."""
        return None

    def to_read(self, path: Path) -> Cipher:
        """Raise LockedError: there is no key."""
        raise LockedError(f"{path} is encrypted, and its key is not here.")

    def hides_scratch(self, folder: Path) -> bool:
        """Return False: no file is encrypted."""
        return False


_keeper: Keeper = NoKeeper()


def install(keeper: Keeper) -> Keeper:
    """Make every file be written and read as `keeper` says; return the keeper before."""
    global _keeper
    before, _keeper = _keeper, keeper
    return before


def keeper() -> Keeper:
    """Return the keeper that was installed last."""
    return _keeper


def place_within(root: Path, path: Path) -> Path | None:
    """Return a path relative to the folder `root`, however either is written; None for a path outside."""
    for outer, inner in ((os.path.abspath(root), os.path.abspath(path)), (os.path.realpath(root), _real(path))):
        if inner.startswith(outer + os.sep):
            return Path(inner[len(outer) + 1 :])
    return None


def final_name(inner: Path) -> str:
    """Return a path, with / between its parts, as it will be once its temporary parts are renamed (runtime/files.py)."""
    parts = []
    for part in inner.parts:
        temporary = _TEMPORARY.fullmatch(part)
        if temporary is None:
            parts.append(part)
        elif not temporary["old"]:  # what was moved aside lies in a folder more
            parts.append(temporary["name"])
    return "/".join(parts)


def _real(path: Path) -> str:
    """Return a path whose folders are no links. What the path itself names may be one."""
    return os.path.join(os.path.realpath(path.parent), path.name)
