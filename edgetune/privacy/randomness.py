"""Tells random strings from words, names and code by what they cost in tokens.

A tokenizer's pieces are what people write often, so that a word or an identifier takes a token for every three or four
characters, and random letters take about one for each. The tokenizer of the built-in model judges, whatever model is trained:
the same notes are masked alike for every model, and --dry-run needs none.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable
from pathlib import Path

CountTokens = Callable[[str], int]

LEAST_LENGTH = 20
"""Length of the shortest string that is judged without a word such as key beside it, in characters. Chosen by hand."""
LEAST_COST = 0.68
"""Tokens per character from which a string of letters and digits is random. Tuned on the corpus of tests/privacy_corpus.py."""
LEAST_COST_NAMED = 0.52
"""Tokens per character from which a string beside a word such as key or token is random. Tuned on the corpus of
tests/privacy_corpus.py."""
LONGEST_JUDGED = 200
"""Characters of a string that are tokenized to judge it. Chosen by hand."""
_HEX = re.compile(r"(?:0x)?(?:[0-9a-f]+|[0-9A-F]+)")
_ALPHABET = re.compile(r"(?i:ABCDEFG|STUVWXYZ)|0123456|23456789")
_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")


@functools.cache
def builtin_cost() -> CountTokens:
    """Return a function that counts the tokens of a text with the built-in model's tokenizer."""
    from edgetune.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(__file__).resolve().parent.parent / "demo")
    return lambda text: len(tokenizer.encode(text))


def is_hex(text: str) -> bool:
    """Return True for a hexadecimal number and for a UUID, which are digests, commits and names far more often than keys."""
    return bool(_HEX.fullmatch(text) or _UUID.fullmatch(text))


def cost(text: str, count_tokens: CountTokens) -> float:
    """Return the tokens per character of `text`."""
    text = text[:LONGEST_JUDGED]
    return count_tokens(text) / len(text)


def is_random(text: str, count_tokens: CountTokens) -> bool:
    """Return True for a string that looks random by itself: mixed letters and digits at a high cost in tokens."""
    if len(text) < LEAST_LENGTH or is_hex(text):
        return False
    digits, upper, lower = (sum(map(test, text)) for test in (str.isdigit, str.isupper, str.islower))
    if digits < 2 or upper < 2 or lower < 2:
        return False
    return cost(text, count_tokens) >= LEAST_COST and not _ALPHABET.search(text) and not _is_encoded_text(text)


def _is_encoded_text(text: str) -> bool:
    """Return True for text in base64, which is as random as the text is."""
    try:
        data = base64.b64decode(text[: len(text) // 4 * 4], validate=True)
    except ValueError:
        return False
    return all(32 <= byte < 127 or byte in b"\t\n\r" for byte in data)


def is_random_beside_name(text: str, count_tokens: CountTokens) -> bool:
    """Return True for a string that looks random beside a word such as key or token."""
    if len(text) < 8 or not any(map(str.isalpha, text)) or not any(map(str.isdigit, text)):
        return False
    if is_hex(text):
        return len(text) >= 16
    return cost(text, count_tokens) >= LEAST_COST_NAMED and (len(text) >= 12 or any(map(str.isupper, text)))
