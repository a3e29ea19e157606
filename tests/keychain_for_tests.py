"""A keychain for tests: keyring's interface, with its entries in one file, so that killed processes leave what they stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked

from edgetune import encryption


class FileKeychain(KeyringBackend):
    """The keychain. `locked` makes every question fail, as where the user is not logged in."""

    priority = 0.1  # type: ignore[assignment]
    __module__ = "keyring.backends.SecretService.for_tests"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.locked = path, False

    @property
    def entries(self) -> dict[str, str]:
        return dict(json.loads(self.path.read_text())) if self.path.exists() else {}

    def get_password(self, service: str, username: str) -> str | None:
        self._check()
        return self.entries.get(f"{service} {username}")

    def set_password(self, service: str, username: str, password: str) -> None:
        self._check()
        self.path.write_text(json.dumps({**self.entries, f"{service} {username}": password}))

    def delete_password(self, service: str, username: str) -> None:
        self._check()
        entries = self.entries
        del entries[f"{service} {username}"]
        self.path.write_text(json.dumps(entries))

    def lock(self) -> None:
        """Answer no more, and forget what this process was told."""
        self.locked = True
        encryption.forget_keys()

    def _check(self) -> None:
        if self.locked:
            raise KeyringLocked("locked")


def use_keychain(monkeypatch: pytest.MonkeyPatch, path: Path) -> FileKeychain:
    """Make a new keychain the system's for a test."""
    found = FileKeychain(path)
    monkeypatch.setattr("keyring.get_keyring", lambda: found)
    encryption.forget_keys()
    return found
