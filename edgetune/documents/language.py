"""Guesses the language of a note for the manifest: from its script, or in Latin letters from its most frequent small words.

It is a guess, shown as one and used for nothing else. Where the evidence is thin, it is "?".
"""

from __future__ import annotations

import re
from collections import Counter

UNKNOWN = "?"
_SAMPLE_CHARS = 20_000
"""Characters of a note that are looked at. Chosen by hand."""
_FEWEST_LETTERS, _FEWEST_HITS = 10, 4
"""Letters, and hits among the small words, below which no language is named. Chosen by hand."""
_LEAST_SHARE, _LEAST_LEAD = 0.08, 1.25
"""Share of all words that must be small words of the language, and the factor by which it must lead. Chosen by hand: in running
text a quarter to a half of the words are among them."""
_SCRIPTS = (
    ("ja", "\u3040-\u30ff"),
    ("ko", "\uac00-\ud7af\u1100-\u11ff"),
    ("zh", "\u4e00-\u9fff\u3400-\u4dbf"),
    ("ru", "\u0400-\u04ff"),
    ("el", "\u0370-\u03ff"),
    ("he", "\u0590-\u05ff"),
    ("ar", "\u0600-\u06ff"),
    ("hi", "\u0900-\u097f"),
    ("th", "\u0e00-\u0e7f"),
)
"""Letters of scripts, each with the language that most often uses it."""
_LETTERS = tuple((code, re.compile(f"[{letters}]")) for code, letters in _SCRIPTS)
_JAPANESE_SHARE = 0.1
"""Share of kana among the letters from which Chinese characters are Japanese. Chosen by hand."""
_UKRAINIAN = re.compile("[іїєґ]")
_WORD = re.compile(r"[^\W\d_]+")
_SMALL_WORDS = {
    "en": "the of and to in is that it was for on are with as this be at not you have from they but or an by we which i my",
    "de": "der die und das ist nicht ich zu den mit ein eine es auf für sich von dem auch wie im wir sie aber noch nach bei",
    "fr": "le la les des et est une un dans que qui pour pas sur au du avec plus ce il je nous sont mais on cette par elle",
    "es": "el la los las de y que en un una es por con para no se del lo como más pero su al este muy yo está",
    "it": "il di che la e un una per non è con del sono le da si dei al anche come più ma nel della gli questo ho",
    "pt": "o a os de e que um uma não para com em do da se por mais como mas foi ao dos na no é eu está",
    "nl": "de het een en van is dat niet in te op voor met zijn aan er ook maar ik wij bij naar om dit hij nog",
    "sv": "och att det som en på är av för med den till inte om ett jag var men vi så har från kan han",
    "da": "og at det som en på er af for med den til ikke om et jeg var men vi så har fra kan han de",
    "pl": "i w na z się nie do że to jest jak o po co ale za od przez czy już dla tak był przy jego",
}  # fmt: skip
"""The most frequent small words of languages in Latin letters."""
_LANGUAGES_OF: dict[str, list[str]] = {}
for _code, _words in _SMALL_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_code)


def guess(text: str) -> str:
    """Return the two-letter code (ISO 639-1) of a text's likely language, or "?"."""
    sample = text[:_SAMPLE_CHARS].lower()
    words = _WORD.findall(sample)
    letters = sum(map(len, words))
    if letters < _FEWEST_LETTERS:
        return UNKNOWN
    counts = {code: len(pattern.findall(sample)) for code, pattern in _LETTERS}
    if counts["ja"] + counts["zh"] > letters / 2:
        return "ja" if counts["ja"] > _JAPANESE_SHARE * letters else "zh"
    script, most = max(counts.items(), key=lambda item: item[1])
    if most > letters / 2:
        return "uk" if script == "ru" and len(_UKRAINIAN.findall(sample)) > letters // 100 else script
    return _latin(words)


def _latin(words: list[str]) -> str:
    """Return the language whose small words are most frequent among `words`, if it leads clearly."""
    hits: Counter[str] = Counter()
    for word in words:
        hits.update(_LANGUAGES_OF.get(word, ()))
    first, second = [*hits.most_common(2), ("", 0), ("", 0)][:2]
    clear = first[1] >= max(_FEWEST_HITS, _LEAST_SHARE * len(words)) and first[1] >= _LEAST_LEAD * second[1]
    return first[0] if clear else UNKNOWN
