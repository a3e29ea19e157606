"""Tells if the data folder is encrypted at rest and which of its files are, and asks the keychain for their key.

encryption.json in the data folder holds the state, the id of the key in the keychain, and a check value by which a wrong key
is recognised. None of them is secret.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edgetune import keychain
from edgetune.runtime.cipher import KEY_BYTES, Cipher, derived, final_name, place_within
from edgetune.runtime.errors import BusyError, LockedError, UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import ENCRYPTION_STATE

FILE = "encryption.json"
FORMAT = 1
"""Version of encryption.json."""
ENCRYPTED = (
    "current.json",
    "exports.json",
    "adapters",
    "ledger",
    "forgotten.json",
    "training-log.jsonl",
    "parsed",
    "runs",
    "unfinished",
    "privacy-ledger",
    "nightly.json",
    "nights",
    "scratch",
    "secret",
)
"""Entries of the data folder whose files are encrypted."""
PLAIN_SUFFIXES = (".lock", ".log", ".xml")
"""Endings of files in them that stay plain: locks, which hold a process's number; the last night's output, which the system's
scheduler writes; and the task that is given to the Task Scheduler."""


class State(StrEnum):
    """A stage of turning encryption of the data folder on or off.

    PREPARING: the key may not be in the keychain yet, so nothing is encrypted.
    """

    PREPARING = "preparing"
    ENCRYPTING = "encrypting"
    ON = "on"
    DECRYPTING = "decrypting"


@dataclass(frozen=True)
class Encryption:
    """The content of encryption.json. check: a digest of the key, which says nothing about it (hexadecimal)."""

    state: State
    key_id: str
    check: str

    @classmethod
    def begin(cls, key: bytes) -> Encryption:
        """Return the record of a new key, before it is in the keychain."""
        return cls(State.PREPARING, secrets.token_hex(8), _check(key))

    def save(self, folder: Path, state: State) -> Encryption:
        """Write the record with another state, and return it."""
        changed = dataclasses.replace(self, state=state)
        atomic_write(folder / FILE, json.dumps({"format": FORMAT, **dataclasses.asdict(changed)}, indent=2) + "\n")
        return changed

    def key(self) -> bytes:
        """Return the key from the keychain, which is asked once. Raises LockedError."""
        if self.key_id not in _keys:
            found = keychain.fetch(self.key_id)
            if found is None:
                raise LockedError(
                    "The keychain does not have the key of edgetune's data. Log in as the user who encrypted it, or restore "
                    "the keychain; if the key is lost, so is what it encrypted: type edgetune purge to start over."
                )
            if len(found) != KEY_BYTES or not hmac.compare_digest(_check(found), self.check):
                raise LockedError(
                    "The key in the keychain is not the one that edgetune's data is encrypted with. Restore the keychain, or "
                    f"the file {FILE} that belongs to it."
                )
            _keys[self.key_id] = found
        return _keys[self.key_id]


@dataclass(frozen=True)
class Standing:
    """If encryption at rest is on, and what is wrong with it, in a sentence for the user."""

    state: str
    problem: str | None = None


def standing(folder: Path) -> Standing:
    """Return how encryption at rest stands in a data folder. The keychain is asked if it is on."""
    try:
        found = load(folder)
        if found is None:
            return Standing("off")
        found.key()
    except (LockedError, UsageError) as error:
        return Standing("locked", str(error))
    if found.state is State.ON:
        return Standing("on")
    doing = "decrypt" if found.state is State.DECRYPTING else "encrypt"
    return Standing("interrupted", f"Encrypting or decrypting the data folder was interrupted: type edgetune {doing}.")


_keys: dict[str, bytes] = {}
"""The keys that this process was given, by their ids."""


def forget_keys() -> None:
    """Forget the keys that the keychain gave: the next file asks it again."""
    _keys.clear()


def load(folder: Path) -> Encryption | None:
    """Return the record of a data folder; None if nothing in it is encrypted. Raises UsageError for a damaged one."""
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    record = read_object(path, ENCRYPTION_STATE)
    try:
        if record["format"] != FORMAT:
            raise UsageError(f"{path} is of another version of edgetune; type the command with that version.")
        found = Encryption(State(record["state"]), record["key_id"], record["check"])
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{path} is damaged; restore it from a backup: without it, what is encrypted cannot be read."
        ) from error
    if not (isinstance(found.key_id, str) and isinstance(found.check, str)):
        raise UsageError(f"{path} is damaged; restore it from a backup: without it, what is encrypted cannot be read.")
    return found


def is_covered(folder: Path, path: Path) -> bool:
    """Return True for a path that is encrypted in the data folder `folder` when encryption is on."""
    inner = place_within(folder, path)
    if inner is None:
        return False
    name = final_name(inner)
    return name.split("/")[0] in ENCRYPTED and not name.endswith(PLAIN_SUFFIXES)


class DataKeeper:
    """Encrypts what lies in the data folder, which `place` returns. It is a `Keeper` of the runtime."""

    def __init__(self, place: Callable[[], Path]) -> None:
        self._place = place

    def to_write(self, path: Path) -> Cipher | None:
        """Return the cipher for a file of the data folder. Raises BusyError while the folder is being converted."""
        folder = self._place()
        if not os.path.lexists(folder / FILE) or not is_covered(folder, path):
            return None
        found = load(folder)
        if found is None:
            return None
        if found.state is not State.ON:
            doing = State.DECRYPTING if found.state is State.DECRYPTING else State.ENCRYPTING
            raise BusyError(
                f"The data folder {folder} is {doing} its files, or that was interrupted. Wait until it is done, or type "
                f"edgetune {doing.removesuffix('ing')} to finish it."
            )
        return Cipher(folder, found.key())

    def to_read(self, path: Path) -> Cipher:
        """Return the cipher of an encrypted file."""
        folder = self._place()
        found = load(folder)
        if place_within(folder, path) is None:
            raise LockedError(
                f"{path} is encrypted: it comes from edgetune's data folder, where alone it can be read. To take an adapter "
                "elsewhere, type edgetune export."
            )
        if found is None:
            raise LockedError(f"{path} is encrypted, and {folder / FILE} is missing. Restore it from a backup.")
        return Cipher(folder, found.key())

    def hides_scratch(self, folder: Path) -> bool:
        """Return True for any folder while encryption is on: scratch files hold notes as text and as activations."""
        found = load(self._place())
        return found is not None and found.state is State.ON


def _check(key: bytes) -> str:
    """Return the check value of a key: 16 bytes derived from it, from which it cannot be found."""
    return derived(key, b"", b"check")[:16].hex()
