"""Finds secrets in a text: keys and tokens, passwords, private keys and seed phrases. Each finder yields spans."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from edgetune.privacy.kinds import Kind
from edgetune.privacy.randomness import CountTokens, is_hex, is_random, is_random_beside_name
from edgetune.privacy.rules import Rules, seed_words
from edgetune.privacy.spans import Span

_LONG_WORD = re.compile(r"[!-~]{16,}")
_JWT = re.compile(
    r"eyJ[\w-]{8,}={0,2}\.eyJ?[\w-]{4,}={0,2}\.[\w-]{8,}={0,2}"  # signed (RFC 7519)
    r"|eyJ[\w-]{8,}\.[\w-]*\.[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"  # encrypted (RFC 7516)
)
_PART = re.compile(r"[A-Za-z0-9+/_-]{20,}={0,2}")
_NAME = re.compile(r"[A-Za-z0-9+_-]{20,}")
_DIGEST = re.compile(r"(?:sha\d{1,3}|md5|h1)[-_]|AAAA", re.I)
_BEFORE_DIGEST = re.compile(r"(?:sha(?:1|256|384|512)[-:=]|md5[-:=]|h1:|AAAA\S*|/nix/store/\S*|data:\S*)$", re.I)
_QUERY = re.compile(
    r"[?&;](?:[\w.-]{0,30}(?:key|token|secret|signature|password|passwd|pwd|auth)|sig|pw|pass|code)=([^\s&#\"'<>;]{6,4096})",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"://(?:[^\s/:@\"'<>]{0,128}:([^\s/@\"'<>]{1,256})|([^\s/:@\"'<>]{16,256}))@[\w\[]")
_BEGIN_KEY = re.compile(r"-----BEGIN ((?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?)-----")
_PUTTY_KEY = re.compile(r"Private-Lines: \d{1,4}\s+((?:[ \t>]{0,8}[A-Za-z0-9+/=]{1,80}\s{1,3}){1,500})")
_KEY_LINE = re.compile(r"[ \t>|]{0,16}(?:[A-Za-z0-9+/=]{1,128}|[A-Za-z-]{1,20}: [^\n]{1,80}|)[ \t\r\\n]{0,4}(?:\n|$)")
LONGEST_KEY = 1 << 16
"""Most characters of a block of a private key. A key of 16,384 bits takes 12,000."""

_SEPARATOR = re.compile(
    r"[\"'`*_\])]{0,4}(?: ?\([^()\n]{1,30}\))?[ \t]{0,3}(?:=>|->|:=|[:=：|→])"
    r"(?:\*\*|__|\*(?=\s))?[ \t]{0,3}(?:\n[ \t>]{0,8})?(?:\*\*)?[\"'`“„«(]{0,3}"
)
"""The characters between a word such as password and its value; the value may stand on the next line."""
_SPACE = re.compile(r"[\"'`*_]{0,3}[ \t]{1,3}(?:\*\*)?[\"'`“„«]{0,3}")
_QUOTES = "\"'`“„«"
_CLOSING = {"“": "”", "„": "“", "«": "»"}
_VALUE = re.compile(r"\S{3,256}")
_PHRASE = re.compile(r"[A-Za-z]{2,12}(?: [A-Za-z]{2,12}){2,11}(?=[\s\"'`.]*(?:\n|$))")
_CODE = re.compile(
    r"[$<{%\[(@&]|[\w.:>-]+\(|\w+\[|!(?:vault|secret|ref)\b"
    r"|(?:process|os|env|config|req|self|this|settings|secrets?|var|data|local|form|user)\.\w"
)
"""The beginning of a value that is code: a variable, a call, a reference."""
_MASK = re.compile(r"[*•xX.\-_?#…]+|(?:x{3,}|\*{2,}|\.{3,}).*|\[\w[\w -]*\]")
_ENDS = ".,;:)]}>|"
_CUT = re.compile(r"';|\",|\"\}|'\}|',|`|</|&\w+=|\*\*|\\n")
_PIN = re.compile(r"\d{3,8}(?!\d)")
LONGEST_VALUE = 512
"""Characters of a key beside its name that are looked at; the rest of a longer one follows it. Chosen by hand."""
_TOKEN_VALUE = re.compile(rf"(?:Bearer |Basic |Token |token )?([A-Za-z0-9+/=_.~:%!@#$^&*-]{{8,{LONGEST_VALUE}}})")
_REST_OF_TOKEN = re.compile(r"[A-Za-z0-9+/=_-]{0,8192}")
_OWNERS = ("api", "access", "secret", "client", "auth", "app")
"""Words before "key" or "token" beside which a hexadecimal number is a key even without a colon between them."""
_WITH_PASSWORD = re.compile(r"[^\n]{0,120}?\s(?:-p|-a|--pass(?:word)?)[ =]?(['\"]?)(\S{3,128})")
_WITH_USER = re.compile(r"\b[^\n]{0,200}?\s(?:-u|--user)[ =](?:['\"]?[^\s:'\"]{1,64}:)(['\"]?)([^\s'\"]{3,128})")
_SEED = re.compile(
    r"(?<![\w'-])[a-z]{3,8}(?:(?:[ \t]{1,2}|[ \t]?,[ \t]?|[ \t]?\n[ \t>]{0,4})(?:\d{1,2}[.):][ \t]?)?[a-z]{3,8}(?![\w'])){11,}"
)
_SEED_LETTERS = re.compile(r"[a-z]+")


_SEED_RUN = b"\1" * 10  # marks may cling to the first word and the last


@functools.cache
def _seed_parts() -> frozenset[str]:
    """Return what a seed phrase consists of between spaces: its words, also with a comma, and the numbers of a list."""
    words = seed_words()
    numbers = (f"{number}{mark}" for number in range(1, 25) for mark in (".", ")", ":"))
    return frozenset([*words, *(f"{word}," for word in words), *numbers, ">"])


def find_secrets(text: str, lowered: str, rules: Rules, count_tokens: CountTokens) -> Iterator[Span]:
    """Yield every secret in `text`. lowered: the same text in lower case, letter by letter at the same places."""
    yield from private_keys(text)
    yield from _in_long_words(text, rules, count_tokens)
    yield from _beside_words(text, lowered, rules, count_tokens)
    yield from _in_commands(text, lowered, rules)
    yield from _seed_phrases(text)


def private_keys(text: str) -> Iterator[Span]:
    """Yield the blocks of private keys. One without an end goes on while its lines look like one."""
    at = 0
    while (at := text.find("-----BEGIN ", at)) >= 0:
        begin = _BEGIN_KEY.match(text, at)
        if begin is None:
            at += 11
            continue
        end_mark = f"-----END {begin[1]}-----"
        end = text.find(end_mark, begin.end(), begin.end() + LONGEST_KEY)
        if end >= 0:
            end += len(end_mark)
        else:
            end = text.find("\n", begin.end()) + 1 or len(text)
            while end < len(text) and (line := _KEY_LINE.match(text, end)) and line.end() > end:
                end = line.end()
        yield Span(at, end, Kind.PRIVATE_KEY)
        at = end
    if "Private-Lines: " in text:
        yield from (Span(*found.span(1), Kind.PRIVATE_KEY) for found in _PUTTY_KEY.finditer(text))


def _in_long_words(text: str, rules: Rules, count_tokens: CountTokens) -> Iterator[Span]:
    """Yield what is found within words of 16 and more characters: marked tokens, parts of URLs, random strings."""
    for word in _LONG_WORD.finditer(text):
        start, end = word.span()
        marked = [Span(*found.span(), Kind.API_KEY) for found in rules.token.finditer(text, start, end)]
        if (at := text.find("eyJ", start, end)) >= 0:
            marked += [Span(*found.span(), Kind.JWT) for found in _JWT.finditer(text, at, end)]
        if "://" in word[0]:
            for found in _USER_INFO.finditer(text, start, min(end + 1, len(text))):
                group = 1 if found[1] is not None else 2
                if not _is_placeholder(found[group], rules):
                    marked.append(Span(*found.span(group), Kind.PASSWORD))
        if "=" in word[0]:
            for found in _QUERY.finditer(text, start, end):
                if not _is_placeholder(found[1], rules) and any(map(str.isdigit, found[1])):
                    marked.append(Span(*found.span(1), Kind.API_KEY))
        yield from marked
        if not marked and not word[0].islower() and "://" not in word[0]:
            yield from _random_parts(text, start, end, count_tokens)


def _random_parts(text: str, start: int, end: int, count_tokens: CountTokens) -> Iterator[Span]:
    """Yield the random strings in a word that nothing marks."""
    for part in _PART.finditer(text, start, end):
        before = text[max(0, part.start() - 24) : part.start()]
        if before.endswith(("AAAA", "@")) or _DIGEST.match(part[0]) or _BEFORE_DIGEST.search(before):
            continue
        # A string with slashes is base64 if its length says so, and else a path.
        whole = "/" not in part[0] or before.endswith("$") or (len(part[0]) % 4 == 0 and len(part[0]) >= 40)
        for piece in [part] if whole else _NAME.finditer(text, *part.span()):
            if is_random(piece[0], count_tokens):
                yield Span(*piece.span(), Kind.RANDOM)


def _beside_words(text: str, lowered: str, rules: Rules, count_tokens: CountTokens) -> Iterator[Span]:
    """Yield passwords, PINs and unmarked keys that stand beside a word that names them."""
    for stem, pattern in rules.secret_words.items():
        at = -1
        while (at := lowered.find(stem, at + 1)) >= 0:
            word = pattern.match(lowered, at)
            if word is not None:
                yield from _beside_word(text, word, rules, count_tokens)


def _beside_word(text: str, word: re.Match[str], rules: Rules, count_tokens: CountTokens) -> Iterator[Span]:
    """Yield what stands beside one such word: after ":" or "=", after "is", or after a space alone."""
    at, is_pin, is_key = word.end(), word.lastgroup == "pin", word.lastgroup == "key"
    strong, about = _SEPARATOR.match(text, at), None
    if strong is None:
        about = rules.about.match(text, at)
        strong = _SEPARATOR.match(text, about.end()) if about is not None else None
    opening = strong or _SPACE.match(text, about.end() if about is not None else at)
    if opening is None:
        return
    if is_pin:
        found = _PIN.match(text, opening.end())
        if found is not None:
            yield Span(*found.span(), Kind.PASSWORD)
    elif is_key:
        yield from _named_key(text, word.start(), opening.end(), bool(strong or about), rules, count_tokens)
    else:
        yield from _password(text, opening, bool(strong), "phrase" in word[0] or "code" in word[0], rules)


def _named_key(text: str, word: int, at: int, strong: bool, rules: Rules, count_tokens: CountTokens) -> Iterator[Span]:
    """Yield the key at `at`, if what stands there looks like one."""
    found = _TOKEN_VALUE.match(text, at)
    if found is None:
        return
    start, end = found.span(1)
    end = start + len(text[start:end].rstrip(".,:;!*"))
    value = text[start:end]
    if not strong and len(value) < 16:
        return
    line = text.rfind("\n", max(0, word - 200), word) + 1
    if rules.digest_word.search(text[max(line, word - 40) : start].lower()) or _CODE.match(value) or "://" in value:
        return
    bare = not strong and is_hex(value) and text[max(line, word - 8) : word].strip(" _-").lower()[-6:] not in _OWNERS
    if is_random_beside_name(value.strip("="), count_tokens) and not bare:
        if len(found[1]) == LONGEST_VALUE:
            end = _REST_OF_TOKEN.match(text, end).end()  # type: ignore[union-attr]
        yield Span(start, end, Kind.API_KEY)


def _password(text: str, opening: re.Match[str], strong: bool, phrase: bool, rules: Rules) -> Iterator[Span]:
    """Yield the password that stands after `opening`, which ends a word for it and what separates the two."""
    at = opening.end()
    quote = next((mark for mark in reversed(opening[0]) if mark in _QUOTES), "") if opening[0][-1:] in _QUOTES else ""
    if phrase and strong and (words := _PHRASE.match(text, at)):
        yield Span(*words.span(), Kind.PASSWORD)
        return
    found = _VALUE.match(text, at)
    if found is None:
        return
    start, end = found.span()
    if quote:
        closing = text.find(_CLOSING.get(quote, quote), start, start + 128)
        line_end = text.find("\n", start)
        end = closing if closing > start and not -1 < line_end < closing else end
    else:
        end = _end_of_value(text, start, end)
    value = text[start:end]
    if len(value) >= 3 and _is_password(value, text[end : end + 40], strong, bool(quote), rules):
        yield Span(start, end, Kind.PASSWORD)


def _end_of_value(text: str, start: int, end: int) -> int:
    """Return where an unquoted value ends: before the marks that belong to the sentence, the table or the code around it."""
    value = text[start:end]
    mark = _CUT.search(value, 1)
    cut = mark.start() if mark else len(value)
    if ";" in value[:cut] and "=" in value[value.find(";") : cut]:  # a connection string
        cut = value.find(";")
    value = value[:cut].rstrip("\"'")
    return start + len(value.rstrip(_ENDS) if len(value.rstrip(_ENDS)) >= 3 else value)


def _is_password(value: str, after: str, strong: bool, quoted: bool, rules: Rules) -> bool:
    """Return True if a value beside a word for passwords is one, and neither code, a placeholder nor the next word."""
    if _is_placeholder(value, rules):
        return False
    digits, letters = any(map(str.isdigit, value)), any(map(str.isalpha, value))
    mixed = digits and letters
    marked = any(not letter.isalnum() for letter in value[1:])
    if not strong and not (quoted and (mixed or marked)):
        return mixed and len(value) >= 5 and "://" not in value
    if mixed or (marked and not value.replace("_", "").replace(".", "").isalpha()):
        return True
    if digits:
        return len(value) >= 4
    # A single word of letters is a password only if nothing follows it on its line.
    ends = not after.strip(" \t\"'`*|,;).").split("\n")[0] if after[:1] != "\n" else True
    return ends and value.isalpha()


def _is_placeholder(value: str, rules: Rules) -> bool:
    """Return True for a value that stands for one: a variable, a call, a type, a row of stars, "your-password"."""
    low = value.lower().strip("\"'`.,;:")
    if low in rules.no_passwords or _CODE.match(value) or _MASK.fullmatch(value):
        return True
    return low.startswith(("your", "my-", "my_", "example", "replace", "insert", "enter", "change", "dummy", "test-key"))


def _in_commands(text: str, lowered: str, rules: Rules) -> Iterator[Span]:
    """Yield the passwords in commands such as mysql -p."""
    for name in rules.commands:
        at = -1
        while (at := lowered.find(name, at + 1)) >= 0:
            found = (_WITH_USER if name == "curl" else _WITH_PASSWORD).match(text, at + len(name))
            if found is None or _is_placeholder(found[2], rules):
                continue
            start, end = found.span(2)
            quote = found[2].find(found[1]) if found[1] else -1
            yield Span(start, start + quote if quote > 0 else end - len(found[2]) + len(found[2].rstrip("`")), Kind.PASSWORD)


def _seed_phrases(text: str) -> Iterator[Span]:
    """Yield 12 to 48 words in a row of the list from which wallets make seed phrases, hardly any of them twice.

    No sentence has that many; a longer row is a list of words.
    """
    known = seed_words()
    parts = text.split()
    if _SEED_RUN not in bytes(map(_seed_parts().__contains__, parts)) or len(_seed_parts().intersection(parts)) < len(
        _SEED_RUN
    ):
        return
    for run in _SEED.finditer(text):
        places = [word.span() for word in _SEED_LETTERS.finditer(text, *run.span())]
        first = 0
        for number in range(len(places) + 1):
            if number < len(places) and text[slice(*places[number])] in known:
                continue
            words = [text[slice(*place)] for place in places[first:number]] if 12 <= number - first <= 48 else []
            if words and len(set(words)) >= 0.8 * len(words):
                yield Span(places[first][0], places[number - 1][1], Kind.SEED_PHRASE)
            first = number + 1
