"""Leaves out the pictures and other files that stand in a note as base64: a photo of 2 MB would be most of what is learnt."""

from __future__ import annotations

import re

MARK = "embedded-file"
"""Stands in the text where an embedded file was left out."""
_LONG_WORD = 60
"""Length from which a run of base64 is looked at, in characters: PEM has 64 in a line, MIME 76. Chosen by hand."""
_LONG_BLOCK = 512
"""Length from which base64 without `data:` is left out, in characters. Chosen by hand: keys and digests are shorter."""
_LONG_RUN = re.compile(rf"\S{{{_LONG_WORD}}}")
_BASE64 = r"[A-Za-z0-9+/_\-]"
_DATA_URI = re.compile(
    r"data:[\w.+\-]{0,100}(?:/[\w.+\-]{0,100})?(?:;[^,;\s\"'()<>]{0,200}){0,5}"
    # base64, on one line or on several, or a percent-encoded picture
    r"(?:;base64,[A-Za-z0-9+/_\-%]{40,}=*(?:\n[ \t>]{0,20}[A-Za-z0-9+/_\-]{40,}=*)*(?:\n[ \t>]{0,20}[A-Za-z0-9+/_\-]+=+)?"
    r"|,[A-Za-z0-9.~!*+/_:;=%\-]{256,})",
    re.IGNORECASE,
)
_BARE_BLOCK = re.compile(
    rf"(?<!{_BASE64}){_BASE64}{{{_LONG_WORD},}}=*(?:[ \t]*\n[ \t>]{{0,20}}\n?[ \t>]{{0,20}}{_BASE64}{{{_LONG_WORD},}}=*)*"
    rf"(?:\n[ \t>]{{0,20}}{_BASE64}+=+)?"
)


def without_embedded_files(text: str) -> tuple[str, int]:
    """Return `text` with a mark in the place of each embedded file, and the number of characters that were left out."""
    if not _LONG_RUN.search(text):
        return text, 0
    shorter = _BARE_BLOCK.sub(_mark_of_block, _DATA_URI.sub(MARK, text))
    return shorter, len(text) - len(shorter)


def _mark_of_block(block: re.Match[str]) -> str:
    """Return the mark for a block that is long and mixed enough to be base64, and any other block as it stands."""
    found = block[0]
    mixed = all(re.search(kind, found) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    return MARK if len(found) >= _LONG_BLOCK and mixed else found
