"""Keeps the master key of encrypted data in the system's keychain, through keyring.

Only keychains of operating systems and desktops are used. keyring itself would also take one that keeps passwords in a plain
file, or none at all.
"""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Callable
from typing import Any

from edgetune.runtime.cipher import EXTRA
from edgetune.runtime.errors import LockedError

SERVICE = "edgetune"
"""Name of the entries in the keychain; the user name of an entry is the key's id."""
ANSWER_SECONDS = 120.0
"""Seconds that the keychain may take to answer, since it may ask the user for a password. Chosen by hand."""
_SYSTEM = ("macOS", "Windows", "SecretService", "libsecret", "kwallet")
"""Modules of keyring.backends that ask a keychain of the system or the desktop."""


def fetch(key_id: str) -> bytes | None:
    """Return a key, or None if the keychain has none of this id. Raises LockedError where it does not answer."""
    keychain = system_keychain()
    found = _asked(lambda: keychain.get_password(SERVICE, key_id))
    try:
        return None if found is None else base64.b64decode(found, validate=True)
    except ValueError:
        return b""


def store(key_id: str, key: bytes) -> None:
    """Put a key into the keychain. Raises LockedError where that does not take it."""
    keychain = system_keychain()
    _asked(lambda: keychain.set_password(SERVICE, key_id, base64.b64encode(key).decode()))


def delete(key_id: str) -> None:
    """Delete a key from the keychain, if it is there. Raises LockedError where that does not answer."""
    keychain = system_keychain()
    if fetch(key_id) is not None:
        _asked(lambda: keychain.delete_password(SERVICE, key_id))


def system_keychain() -> Any:
    """Return keyring's way to the keychain of this system. Raises LockedError where there is none."""
    try:
        import keyring
    except ImportError as error:
        raise LockedError(EXTRA) from error
    # cron tells its jobs nothing of the desktop's session.
    if hasattr(os, "getuid") and os.path.exists(bus := f"/run/user/{os.getuid()}/bus"):
        os.environ.setdefault("DBUS_SESSION_BUS_ADDRESS", f"unix:path={bus}")
    chosen = _asked(keyring.get_keyring)
    # A chain asks several, and might end at one that keeps keys in a plain file.
    for backend in getattr(chosen, "backends", [chosen]):
        module = type(backend).__module__
        if module.startswith(tuple(f"keyring.backends.{name}" for name in _SYSTEM)):
            return backend
    raise LockedError(
        f"There is no keychain to use (keyring found {type(chosen).__module__}; expected the keychain of macOS or Windows, "
        "Secret Service or KWallet). Log in at the desktop; on a machine without one, encrypt the disk instead."
    )


def _asked(question: Callable[[], Any]) -> Any:
    """Return the keychain's answer. Raises LockedError for a failure, and where it takes longer than ANSWER_SECONDS."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append((question(), None))
        except Exception as error:  # every keychain has failures of its own
            answers.append((None, error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if not answers:
        raise LockedError(f"The keychain did not answer within {ANSWER_SECONDS:.0f} s. Unlock it and type the command again.")
    answer, error = answers[0]
    if error is not None:
        raise LockedError(
            f"The keychain does not give edgetune its key ({type(error).__name__}). Unlock it and type the command again."
        ) from error
    return answer
