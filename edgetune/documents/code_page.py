"""Judges whether a text that was decoded as Windows-1252 was written in it.

Every code page turns almost any bytes into letters. In the wrong one, Polish becomes `Za¿ó³æ` and Turkish `þehir`. Such text
shows itself in two ways: signs stand where only letters can, and no Western language has all of its letters.
"""

from __future__ import annotations

import re
from collections import Counter

_ALPHABETS = tuple(
    frozenset(letters + "é")  # in loan words everywhere
    for letters in (
        "äöüß",  # German
        "àâæçèêëîïôœùûü",  # French
        "áíóúüñ",  # Spanish
        "áâãàçêíóôõúü",  # Portuguese
        "àèìíîòóùú",  # Italian
        "àçèíïòóúü",  # Catalan
        "ëïóöüèê",  # Dutch
        "æøåòôè",  # Danish and Norwegian
        "åäöüà",  # Swedish and Finnish
        "áíóúýæöðþ",  # Icelandic
    )
)
"""Letters beyond ASCII of each language that is read from Windows-1252."""
_COVERED = 0.95
"""Share of a text's letters beyond ASCII that one alphabet must hold; the rest are foreign names. Chosen by hand."""
_ODD_SIGNS = 0.02
"""Largest share of the characters beyond ASCII that may stand in odd places. Chosen by hand."""
_LETTER = r"[^\W\d_]"
_HIGH_LETTERS = "À-ÖØ-öø-ÿŠŽŒšžœŸƒ"
_ODD = re.compile(
    rf"{_LETTER}[¡¢£¤¥¦§¨«¬¯°±²³¶¸¹º»¼½¾¿×÷†‡ˆ‰‹›€˜ª„‚•“”]{_LETTER}"  # signs within a word
    rf"|{_LETTER}(?<![lL])·{_LETTER}"  # Catalan has it between two l
    rf"|{_LETTER}{{2}}[¡¢£¤¥¦¬¯±¶¸¼¾¿µ×÷ªº‚„ˆ˜]"  # at the end of a word
    rf"|{_LETTER}{{2}}(?<![cdkm]m)[¹³]"  # cm³ is a unit
    rf"|[¢£¤¥¦¬¯±²³¶¸¹¼¾]{_LETTER}"  # at its beginning
    r"|[a-zß-öø-ÿšœž][À-ÖØ-ÞŠŽŒŸ]"  # a capital after a small letter
    rf"|[{_HIGH_LETTERS}]{{3}}"
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def looks_western(text: str) -> bool:
    """Return True if `text`, which was decoded as Windows-1252, reads like a Western European language."""
    beyond_ascii = _NOT_ASCII.findall(text)
    if sum(1 for _ in _ODD.finditer(text)) > _ODD_SIGNS * len(beyond_ascii):
        return False
    if "¤" in text:  # the euro sign in ISO 8859-15
        return False
    if text.count("¿") > text.count("?") or text.count("¡") > text.count("!"):  # Spanish closes what it opens
        return False
    letters = Counter(char.lower() for char in beyond_ascii if re.match(f"[{_HIGH_LETTERS}]", char))
    # Turkish in the wrong code page has the same letters as Icelandic, but never these beside them.
    if letters.keys() & set("ðþý") and not letters.keys() & set("áíóúæ"):
        return False
    covered = max(sum(letters[letter] for letter in alphabet) for alphabet in _ALPHABETS)
    return covered >= _COVERED * letters.total()
