"""Reads private.txt in edgetune's data folder: the user's own words that must not be trained on, one entry a line."""

from __future__ import annotations

import os

from edgetune.config import DataConfig
from edgetune.home import home
from edgetune.parsing import parse_regions
from edgetune.privacy.masking import Masker
from edgetune.runtime.errors import UsageError
from edgetune.runtime.untrusted_file import SETTINGS_FILE, read_untrusted

OWN_LIST = "private.txt"
MOST_ENTRIES, LONGEST_ENTRY = 10_000, 200
"""Most entries of the list, and most characters of one. Chosen by hand."""


def new_masker(data: DataConfig) -> Masker:
    """Return a masker for notes that are read with these settings. Raises UsageError for a list that cannot be used."""
    regions = None if data.phone_regions is None else parse_regions(data.phone_regions)
    return Masker(data.mask, own_entries() if data.mask == "all" else (), regions)


def own_entries() -> tuple[str, ...]:
    """Return the entries of private.txt, without empty lines and those that begin with "#"; none if there is no such file.

    Raises UsageError for a file that cannot be used, which names no entry: training without it would take in what it lists.
    """
    path = home() / OWN_LIST
    if not os.path.lexists(path):
        return ()
    try:
        lines = read_untrusted(path, SETTINGS_FILE).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8. Save it as UTF-8, one entry a line.") from error
    entries = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")))
    if len(entries) > MOST_ENTRIES or any(not 2 <= len(entry) <= LONGEST_ENTRY for entry in entries):
        raise UsageError(
            f"{path} holds {len(entries):,} entries, and one of them may be too short or too long; expected at most "
            f"{MOST_ENTRIES:,}, each of 2 to {LONGEST_ENTRY} characters. Correct the list."
        )
    return entries
