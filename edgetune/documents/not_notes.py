"""Recognises what lies among notes and is none: app folders, models, edgetune's own files, notes that stay in a cloud."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Set
from pathlib import Path

from edgetune.documents.reasons import Reason
from edgetune.events import KINDS

_FOLDERS = {
    ".obsidian": Reason.APP_SETTINGS,
    ".logseq": Reason.APP_SETTINGS,
    "logseq/bak": Reason.OLD_VERSION,
    "logseq/version-files": Reason.OLD_VERSION,
    ".stversions": Reason.OLD_VERSION,  # Syncthing
    "logseq/.recycle": Reason.TRASH,
    ".trash": Reason.TRASH,  # Obsidian
    ".Trash": Reason.TRASH,  # macOS
    "$RECYCLE.BIN": Reason.TRASH,  # Windows
    "#recycle": Reason.TRASH,  # Synology
}
"""Folders of programs, by name or by the last two names of their path."""
_MODEL_FILES = frozenset(
    {"edgetune.json", "adapter_config.json", "tokenizer_config.json", "golden.json", "how-to-call.json", "adapters.safetensors"}
)
"""Files by which the folder of a model, an adapter or an export is recognised: it may hold merges.txt or README.md."""
_PAGE_FOLDER = re.compile(
    r"(.+)[_-](?:files|dateien|fichiers|archivos|arquivos|ficheiros|file|bestanden|filer|pliki|soubory|tiedostot)", re.I
)
"""Name of the folder that a browser saves beside a web page, in the browser's language: Firefox's `filesFolder`, and the same
words with either mark before them."""
_ICLOUD_PLACEHOLDER = re.compile(r"\.(.+)\.icloud")
_SF_DATALESS = 0x40000000
"""Flag of macOS: the content of this file is in a cloud, and reading it would download it."""
_RECALL = 0x1000 | 0x40000 | 0x400000
"""Attributes of Windows with the same meaning: OFFLINE, RECALL_ON_OPEN and RECALL_ON_DATA_ACCESS."""
_EVENT = re.compile(rb'\{"event": "(\w{1,20})"')
"""Beginning of each line of a run's log, whose samples are not the user's words."""


def app_folder(path: Path) -> Reason | None:
    """Return the reason for skipping the folder at `path` if a program keeps it for itself."""
    return _FOLDERS.get(path.name) or _FOLDERS.get(f"{path.parent.name}/{path.name}")


def is_folder_of_page(name: str, beside: Set[str]) -> bool:
    """Return True for the folder NAME_files of a saved web page: NAME.html or NAME.htm is among the names beside it."""
    found = _PAGE_FOLDER.fullmatch(name)
    return found is not None and not beside.isdisjoint({f"{found[1]}.html", f"{found[1]}.htm"})


def is_model_folder(names: Set[str]) -> bool:
    """Return True if a folder with these files holds a model, an adapter or an export."""
    return not names.isdisjoint(_MODEL_FILES)


def placeholder_of(name: str) -> str | None:
    """Return the name of the file that iCloud's placeholder `.NAME.icloud` stands for, or None for any other name."""
    found = _ICLOUD_PLACEHOLDER.fullmatch(name)
    return found[1] if found else None


def is_in_cloud(about: os.stat_result) -> bool:
    """Return True if the content of a file is not on this machine, so that reading it would download it."""
    on_mac = getattr(about, "st_flags", 0) & _SF_DATALESS
    on_windows = getattr(about, "st_file_attributes", 0) & _RECALL
    return bool(on_mac or on_windows)


def is_hidden(name: str, about: os.stat_result) -> bool:
    """Return True for a file or folder that its system does not show."""
    hidden = getattr(about, "st_file_attributes", 0) & getattr(stat, "FILE_ATTRIBUTE_HIDDEN", 0)
    return name.startswith((".", "~$")) or bool(hidden)  # ~$ begins Word's lock files


def is_own_log(first: bytes) -> bool:
    """Return True if a .jsonl file that begins with `first` is the log of a training run."""
    found = _EVENT.match(first)
    return found is not None and found[1].decode() in KINDS


def is_drawing_name(name: str) -> bool:
    """Return True for the name of a drawing that Obsidian's Excalidraw plugin keeps in a note."""
    return name.lower().endswith((".excalidraw.md", ".excalidraw"))
