"""Finds personal identifiers in a text: e-mail addresses, phone numbers, cards, IBANs, national ids."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence

from edgetune.privacy.kinds import Kind
from edgetune.privacy.rules import Rules
from edgetune.privacy.spans import Span

_LOCAL = re.compile(r"[\w.%+'-]{1,64}\Z")
_HOST = re.compile(r"(?:[^\W_](?:[\w-]{0,62}[^\W_])?\.){1,8}([^\W\d_]{2,24})(?![\w-])")
_NO_COUNTRY = re.compile(
    "png|jpe?g|gif|svg|webp|pdf|zip|exe|dll|so|js|ts|tsx|jsx|mjs|py|rb|s?css|html?|json|xml|ya?ml|toml|txt|lock|log|bak|conf|cfg"
    "|ini|sql|plist|service|timer|socket|target|local"
)
"""Endings of names that are no e-mail address, such as icon@2x.png."""
_SERVICES = frozenset({"git", "hg", "svn"})
"""Users of addresses by which programs reach repositories, such as git@github.com."""

_DIGITS = re.compile(r"[+(0-9](?<![\w,.#/$€£@+-][+(0-9])(?:[ \u00a0./()–-]{0,3}\d){6,20}(?![\w@]|[.,:/-]\d|-[A-Za-z])")
_LETTERED = re.compile(r"[A-Z0-9][A-Z0-9 +-]{7,19}")
_DATE = re.compile(r"(?:(?:19|20)\d{2}([-./])\d{1,2}\1\d{1,2}|\d{1,2}([-./])\d{1,2}\2(?:19|20)\d{2})(?!\d)")
_IN_A_TABLE = re.compile(r"(?:\b[0-9a-f]{2}|\b\d{4}|\d:|\d\.)[ ]{0,2}\Z")
"""Characters before a group of digits in a dump of bytes, a list of numbers or a time."""
_HOURS = re.compile(r"\d{1,2}[.:]\d{2} ?[–-] ?\d{1,2}[.:]\d{2}")
_ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")
_YEARS = re.compile(r"(?:1[5-9]|20)\d\d ?[-–/] ?(?:1[5-9]|20)\d\d")
_UNIT = re.compile(
    r"\s?(?:[%€$£°]|(?:bytes|rows|ns|ms|EUR|USD|GBP|CHF|km|kg|mm|people|inhabitants|users|tokens|lines|items|files|hits|views)\b)"
)
_SHAPES = ((3, 3, 3), (3, 2, 2, 2), (2, 3, 2, 2), (3, 3, 4))
"""Sizes of the groups of digits in which countries without a leading zero write their numbers."""
_AREA_CODE = re.compile(r"\(\d{2,4}\) ?\d{4,5}-\d{4}")
_GROUP = re.compile(r"\d+")
_CARD_PREFIX = re.compile(
    r"(?:4\d{12}(?:\d{3})?(?:\d{3})?|5[1-5]\d{14}|2(?:2[2-9]|[3-6]\d|7[01])\d{13}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17})\Z"
)
"""Lengths and first digits of the cards of Visa, Mastercard, American Express, Diners, Discover, JCB and UnionPay."""
_CARD_GROUPS = ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3))
_NORTH_AMERICAN = re.compile(r"(?:\+?1[-. ])?\(?[2-9]\d{2}\)?[-. ]{1,2}[2-9]\d{2}[-. ]\d{4}")
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9][A-Z])[A-Z]\d\d[A-Z0-9 ]{11,42}")
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24,
    "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29,
    "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22,
    "VG": 24, "XK": 20,
}  # fmt: skip
"""Length of an IBAN by country, in characters, from SWIFT's IBAN registry."""
BESIDE = 32
"""Characters before a number in which a word for it is looked for. Chosen by hand."""


def find_identifiers(text: str, lowered: str, rules: Rules, regions: Sequence[str]) -> Iterator[Span]:
    """Yield every personal identifier in `text`. lowered: the same text in lower case, letter by letter at the same places."""
    yield from _emails(text)
    yield from _ibans(text)
    for run in _LETTERED.finditer(text):
        for found in rules.lettered.finditer(text, *run.span()):
            fitting = (rule for rule in rules.numbers if rule.letters and rule.form.fullmatch(found[0]))
            if any(_checked(rule.module, found[0]) for rule in fitting):
                yield Span(*found.span(), Kind.NATIONAL)
    for found in _DIGITS.finditer(text):
        before = lowered[max(0, found.start() - BESIDE) : found.start()]
        before = before[before.rfind("\n\n") + 1 :]
        number = found[0] if ")" in found[0] else found[0].lstrip("(")
        kind = kind_of_number(number, before, text[found.end() : found.end() + 16], rules, regions)
        if kind is not None:
            yield Span(found.end() - len(number), found.end(), kind)


def _emails(text: str) -> Iterator[Span]:
    at = -1
    while (at := text.find("@", at + 1)) >= 0:
        host = _HOST.match(text, at + 1)
        if host is None or _NO_COUNTRY.fullmatch(host[1].lower()):
            continue
        local = _LOCAL.search(text[max(0, at - 64) : at])
        name = local[0].lstrip(".'-%+") if local else ""
        if name and "://" in text[max(0, at - 64 - len(name)) : at] and text[at - len(name) - 1] == ":":
            continue  # a password that stands in a URL
        if name and not (name in _SERVICES and text[host.end() : host.end() + 1] in (":", "/")):
            yield Span(at - len(name), host.end(), Kind.EMAIL)


def _ibans(text: str) -> Iterator[Span]:
    for found in _IBAN.finditer(text):
        places = [place for place in range(*found.span()) if text[place] != " "]
        length = _IBAN_LENGTHS.get(found[0][:2], 0)
        if not length or len(places) < length:
            continue
        letters = "".join(text[place] for place in places[:length])
        end = places[length - 1] + 1
        number = int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4]))
        if number % 97 == 1 and not text[end : end + 1].isalnum():
            yield Span(found.start(), end, Kind.IBAN)


def kind_of_number(number: str, before: str, after: str, rules: Rules, regions: Sequence[str]) -> Kind | None:
    """Return the kind of identifier that a run of digits and separators is, or None. before, after: the text around it."""
    digits = "".join(_GROUP.findall(number))
    if _is_card(number, digits) and not (" " in number and _IN_A_TABLE.search(before)):
        return Kind.CARD
    if _is_book(digits, number, before) and not rules.phone_word.search(before):
        return None
    for rule in rules.numbers:
        if rule.letters or not rule.form.fullmatch(number):
            continue
        if not (rule.named and not any(name in before for name in rule.names)) and _checked(rule.module, number):
            return Kind.NATIONAL
    return Kind.PHONE if _is_phone(number, digits, before, after, rules, regions) else None


@functools.cache
def _module(name: str) -> object:
    return importlib.import_module(f"stdnum.{name}")


def _checked(module: str, number: str) -> bool:
    """Return True if python-stdnum's module finds the number valid; of a form without a module, the form is enough."""
    return not module or bool(_module(module).is_valid(number))  # type: ignore[attr-defined]


def _is_card(number: str, digits: str) -> bool:
    if not _CARD_PREFIX.match(digits) or "/" in number or "." in number or number[0] in "+(":
        return False
    groups = tuple(len(group) for group in _GROUP.findall(number))
    if len(groups) > 1 and groups not in _CARD_GROUPS:
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_book(digits: str, number: str, before: str) -> bool:
    """Return True for an ISBN."""
    if "isbn" in before:
        return True
    if len(digits) == 13 and digits[:3] in ("978", "979"):
        return sum(int(digit) * (1, 3)[place % 2] for place, digit in enumerate(digits)) % 10 == 0
    if len(digits) == 10 and (number.count("-") == 3 or number == digits):
        return sum(int(digit) * (10 - place) for place, digit in enumerate(digits)) % 11 == 0
    return False


def _is_phone(number: str, digits: str, before: str, after: str, rules: Rules, regions: Sequence[str]) -> bool:
    """Return True for a phone number: an international one, or one that is written as a country of `regions` writes it."""
    if not 7 <= len(digits) <= 15 or "  " in number or _DATE.match(number) or _ADDRESS.fullmatch(number):
        return False
    if _HOURS.fullmatch(number) or _YEARS.fullmatch(number) or _UNIT.match(after) or " / " in number:
        return False
    if number.startswith("+"):
        return _is_valid(f"+{digits}", None)
    if digits.startswith("00") and len(digits) >= 10:
        return _is_valid(f"+{digits[2:]}", None)
    named = rules.phone_word.search(before)
    if not named and (_IN_A_TABLE.search(before) or not _is_written_as_phone(number, digits)):
        return False
    return any(_is_valid(digits, region) for region in regions)


def _is_written_as_phone(number: str, digits: str) -> bool:
    """Return True for digits in groups as phone numbers have them, where no word says that this is one."""
    groups = _GROUP.findall(number)
    if _NORTH_AMERICAN.fullmatch(number) or _AREA_CODE.fullmatch(number):
        return True
    if min(map(len, groups)) < 2 or not 9 <= len(digits) <= 12:
        return False
    if digits.startswith("0"):
        return len(groups) > 2 or "." not in number
    return tuple(map(len, groups)) in _SHAPES and "." not in number and "/" not in number


@functools.lru_cache(1 << 14)
def _is_valid(digits: str, region: str | None) -> bool:
    """Return True if the digits are a phone number by the plan of `region`, or of any country if they begin with +."""
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(digits, region))
    except phonenumbers.NumberParseException:
        return False
