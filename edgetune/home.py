"""The private folder of a user's data: EDGETUNE_HOME, or the platform's data directory.

config.toml               the user's own settings
private.txt               the user's own words that are masked in notes
current.json, adapters/   the model that is used by default · all adapters, and the current one of each model
exports.json              where exports were written, so that `edgetune purge` can name them
models/                   GGUF models, converted to the form that edgetune works with
ledger/                   the notes that each adapter here was trained on, so that a note can be taken out of them again
forgotten.json            keyed digests of the notes that were forgotten, and that no run reads again
training-log.jsonl        what was trained, promoted and forgotten, and when: a chain of hashes
parsed/                   the text of PDFs and the like among the notes, so that a night parses only what changed
runs/, unfinished/        logs and reports of runs · interrupted runs and locks
privacy-ledger/           what each run of `edgetune train --private` has spent
nightly.json, nights/     what `edgetune nightly` does · a record of each night, and what is known of last night's notes
scratch/                  files of the command that is running; the next one deletes what a killed one left
encryption.json           how far `edgetune encrypt` is, and the id of the key in the system's keychain; no secret
secret                    a key for digests of notes, so that an adapter given away tells nobody which notes they are
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

import platformdirs

from edgetune.encryption import DataKeeper
from edgetune.runtime import cipher
from edgetune.runtime.encrypted_file import decrypted
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import explain_full_disk, is_ours, mend, new_file

PRIVATE_FOLDER = 0o700
"""Mode of every folder below `home()`: its owner alone can read it."""
CONTENTS = (
    "config.toml",
    "private.txt",
    "current.json",
    "exports.json",
    "adapters",
    "models",
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
    "encryption.json",
)
"""Names of the entries that edgetune makes or reads in the folder. Anything else there is the user's own."""
SECRET_BYTES = 32
"""Size of the key of `keyed_digest`."""


def home() -> Path:
    """Return edgetune's data folder, created with mode 0700 on first use.

    Raises UsageError where it cannot be created, belongs to another user, or can be written by others: they could put notes,
    adapters and settings of theirs there.
    """
    path = _place()
    try:
        private_folder(path)
        about = path.stat()
    except OSError as error:
        raise UsageError(
            f"The data folder {path} cannot be created ({error.strerror}). Set EDGETUNE_HOME to a folder that you can write."
        ) from error
    if os.name != "nt":
        _refuse_others(path, about)
        _make_private(path)
    return path


def _place() -> Path:
    """Return the path of the data folder, which may not exist yet."""
    named = os.environ.get("EDGETUNE_HOME")
    return expand(named) if named else Path(platformdirs.user_data_dir("edgetune", appauthor=False))


def is_in_home(path: Path) -> bool:
    """Return True for a path in edgetune's data folder, or for the folder itself."""
    return path.absolute().is_relative_to(_place().absolute())


def _refuse_others(path: Path, about: os.stat_result) -> None:
    """Raise UsageError for a folder that others can change. Root may use anybody's: a container's often belongs to a user."""
    if about.st_uid != os.geteuid() and os.geteuid() != 0:
        raise UsageError(f"The data folder {path} belongs to another user. Set EDGETUNE_HOME to a folder of your own.")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"Other users can write to the data folder {path}. Type: chmod go-w {path}, or set EDGETUNE_HOME to another folder."
        )


@functools.cache
def _make_private(folder: Path) -> None:
    """Take every right of others from what edgetune keeps in `folder`: a copy or a backup may have been made without care."""
    for name in CONTENTS:
        for place, folders, files in os.walk(folder / name):
            for path in [Path(place), *(Path(place, inner) for inner in [*folders, *files])]:
                _take_rights(path)
        _take_rights(folder / name)


def _take_rights(path: Path) -> None:
    with contextlib.suppress(OSError):  # it may have been deleted since
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode & 0o077 and is_ours(path):
            path.chmod(mode & PRIVATE_FOLDER)


def keyed_digest(text: str) -> str:
    """Return the HMAC-SHA-256 of `text` in hexadecimal, with a key that only this user's edgetune knows.

    Whoever is given it cannot test whether it is that of a text which they know. Raises UsageError for an unusable key.
    """
    return keyed_digests([text])[0]


def keyed_digests(texts: Iterable[str]) -> list[str]:
    """Return the keyed digest of each text, with one look at the key."""
    key = _secret()
    return [hmac.new(key, text.encode(), hashlib.sha256).hexdigest() for text in texts]


def _secret() -> bytes:
    """Return the key of `keyed_digest`, made on first use."""
    path = home() / "secret"
    try:
        if not os.path.lexists(path):
            _make_secret(path)
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        opened = FileIO(str(path), opener=lambda _, how: os.open(path, flags))
        with decrypted(opened, path, UsageError) as file:
            found = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}). Delete it: edgetune makes a new one.") from error
    if len(found) != SECRET_BYTES:
        raise UsageError(f"{path} is damaged. Delete it: edgetune makes a new one.")
    mend(path)  # a process may have been killed while it made the key; one that is making another takes this one
    return found


def _make_secret(path: Path) -> None:
    """Write a new key to `path`, unless another process has just done so."""
    with explain_full_disk(path):
        file, temporary = new_file(path)
        try:
            with file:
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # a rename would replace the key that another process has already used
            except (FileExistsError, FileNotFoundError):  # another process was first; it may have deleted the temporary file
                pass
            except OSError:  # a file system without hard links
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def unfinished_folder() -> Path:
    """Return the folder that holds interrupted runs and the locks of runs and output folders."""
    return private_folder(home() / "unfinished")


def private_folder(path: Path) -> Path:
    """Create `path` and its missing parents, readable by their owner alone; leave existing folders as they are."""
    with explain_full_disk(path):
        for folder in reversed([path, *path.parents]):
            folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
    return path


def expand(path: str) -> Path:
    """Expand `~` in a path that a user typed. Raises UsageError for the home folder of an unknown user.

    A file that exists under the very name, such as `~draft.md`, is that file.
    """
    if path[:1] == "~" and path[1:2] not in ("", "/", os.sep) and os.path.lexists(path):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} names the home folder of a user that does not exist here. Type the path in full.") from error


cipher.install(DataKeeper(_place))
