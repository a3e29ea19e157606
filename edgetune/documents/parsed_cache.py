"""Keeps the text of parsed files between readings, or why there is none, so that only what changed is parsed again.

    parsed/PLACE/KEY.json    in the private folder; PLACE stands for the folders and files that were named, KEY for a file

Both names are keyed digests: they tell nobody which notes there are. A file is known by its bytes, so that one which was
renamed is not parsed again. What a reading did not meet, since it was deleted or excluded, leaves the cache at its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from edgetune.documents.encoding import NotText
from edgetune.documents.formats.parsed import Parsed
from edgetune.documents.limits import MAX_TEXT_BYTES
from edgetune.documents.reasons import Reason
from edgetune.home import home, keyed_digest, private_folder
from edgetune.runtime import json_file
from edgetune.runtime.errors import DataError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.untrusted_file import FileKind

FOLDER = "parsed"
UNUSED_DAYS = 30
"""Days after which the texts of folders that are not read any more are deleted. Chosen by hand: as long as nights are kept."""
RETRY_DAYS = 30
"""Days after which a file that could not be parsed is tried again. Chosen by hand: one that hangs costs a minute each time."""
_ENTRY = FileKind(MAX_TEXT_BYTES, DataError, "delete it")


class ParsedCache:
    """The texts of parsed files of one set of named paths."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Open the cache for readings of `paths`. Its folder is made with the first entry."""
        named = sorted(os.path.abspath(os.fspath(path)) for path in paths)
        self._folder = home() / FOLDER / keyed_digest("\n".join(named).encode("utf-8", "surrogateescape").hex())
        self._used: set[str] = set()

    def key(self, data: bytes, version: str) -> str:
        """Return the key of a file with these bytes, read by this version of its format's module."""
        return keyed_digest(f"{hashlib.sha256(data).hexdigest()} {version}")

    def get(self, key: str) -> Parsed | None:
        """Return what was parsed under `key`, or None; a damaged entry is none.

        Raises NotText with the reason why the same bytes could not be parsed within the last RETRY_DAYS.
        """
        path = self._folder / f"{key}.json"
        self._used.add(path.name)
        try:
            found = json_file.read_object_if_there(path, _ENTRY)
            if "reason" in found:
                _raise_reason(found)
                return None
            texts, left_out = found["texts"], found["left_out"]
        except (DataError, KeyError):
            return None
        return Parsed(texts, Counter(left_out)) if isinstance(texts, list) and isinstance(left_out, dict) else None

    def put(self, key: str, parsed: Parsed) -> None:
        """Keep what was parsed under `key`. Raises ResourceError when the disk is full."""
        self._write(key, {"texts": parsed.texts, "left_out": parsed.left_out})

    def put_failure(self, key: str, reason: Reason) -> None:
        """Keep the reason why a file could not be parsed. Raises ResourceError when the disk is full."""
        self._write(key, {"reason": reason.name, "since": time.time()})

    def _write(self, key: str, entry: dict[str, Any]) -> None:
        data = json.dumps(entry, ensure_ascii=False).encode()
        if len(data) <= MAX_TEXT_BYTES:
            private_folder(self._folder)
            atomic_write(self._folder / f"{key}.json", data)

    def tidy(self) -> None:
        """Delete the entries that this reading did not use, and those of other paths that were not read for UNUSED_DAYS."""
        parent = self._folder.parent
        if not parent.is_dir():
            return
        with contextlib.suppress(OSError):  # another process may tidy the same folder
            oldest = time.time() - UNUSED_DAYS * 86_400
            for folder in list(parent.iterdir()):
                if folder != self._folder and folder.lstat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
        if self._folder.is_dir():
            for entry in list(self._folder.iterdir()):
                if entry.name not in self._used:
                    entry.unlink(missing_ok=True)
            os.utime(self._folder)


def _raise_reason(entry: dict[str, Any]) -> None:
    """Raise NotText with the reason in an entry, unless it is older than RETRY_DAYS, from the future, or damaged."""
    reason, since = entry["reason"], entry["since"]
    is_recent = isinstance(since, int | float) and 0 <= time.time() - since <= RETRY_DAYS * 86_400
    if is_recent and isinstance(reason, str) and reason in Reason.__members__:
        raise NotText(Reason[reason])
