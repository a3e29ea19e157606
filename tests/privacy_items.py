"""Makes invented secrets, personal identifiers and harmless look-alikes, each in the form that its issuer documents.

Nothing here reads the rules of edgetune/privacy/, so that a mistake in a rule cannot hide in the corpus. Check digits are
computed here from their definitions, or by python-stdnum where the definition is long.
"""

# ruff: noqa: E501

from __future__ import annotations

import base64
import json
import random
import string
import uuid
from collections.abc import Callable
from pathlib import Path

Maker = Callable[[random.Random], str]

UPPER, LOWER, DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
ALNUM, HEX, URLSAFE, BASE64 = (
    UPPER + LOWER + DIGITS,
    "0123456789abcdef",
    UPPER + LOWER + DIGITS + "-_",
    UPPER + LOWER + DIGITS + "+/",
)
BASE32 = UPPER + "234567"
BECH32 = "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"


def some(rng: random.Random, letters: str, low: int, high: int = 0) -> str:
    """Return `low` (to `high`) random letters."""
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, max(low, high))))


def b64(rng: random.Random, size: int) -> str:
    return base64.b64encode(rng.randbytes(size)).decode()


def b64url(rng: random.Random, data: bytes | int) -> str:
    data = rng.randbytes(data) if isinstance(data, int) else data
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def jwt(rng: random.Random) -> str:
    head = json.dumps({"alg": rng.choice(["HS256", "RS256", "ES256"]), "typ": "JWT"}, separators=(",", ":"))
    body = {
        "sub": some(rng, DIGITS, 6, 10),
        "iat": rng.randint(1_500_000_000, 1_800_000_000),
        "role": rng.choice(["admin", "user"]),
    }
    signature = b64url(rng, rng.choice([32, 64, 256]))
    return f"{b64url(rng, head.encode())}.{b64url(rng, json.dumps(body).encode())}.{signature}"


ISSUED: dict[str, Maker] = {
    "github": lambda r: r.choice(["ghp_", "gho_", "ghu_", "ghs_"]) + some(r, ALNUM, 36),
    "github refresh": lambda r: "ghr_" + some(r, ALNUM, 76),
    "github fine-grained": lambda r: f"github_pat_{some(r, ALNUM, 22)}_{some(r, ALNUM, 59)}",
    "gitlab": lambda r: r.choice(["glpat-", "gldt-", "glrt-", "glptt-"]) + some(r, URLSAFE, 20),
    "aws key id": lambda r: r.choice(["AKIA", "ASIA"]) + some(r, BASE32, 16),
    "google api": lambda r: "AIza" + some(r, URLSAFE, 35),
    "google oauth client": lambda r: "GOCSPX-" + some(r, URLSAFE, 28),
    "google access": lambda r: "ya29." + some(r, URLSAFE, 100, 160),
    "openai": lambda r: "sk-" + some(r, ALNUM, 20) + "T3BlbkFJ" + some(r, ALNUM, 20),
    "openai project": lambda r: "sk-proj-" + some(r, URLSAFE, 74) + "T3BlbkFJ" + some(r, URLSAFE, 74),
    "anthropic": lambda r: "sk-ant-api03-" + some(r, URLSAFE, 93) + "AA",
    "huggingface": lambda r: "hf_" + some(r, UPPER + LOWER, 34),
    "slack bot": lambda r: f"xoxb-{some(r, DIGITS, 12)}-{some(r, DIGITS, 12)}-{some(r, ALNUM, 24)}",
    "slack user": lambda r: f"xoxp-{some(r, DIGITS, 12)}-{some(r, DIGITS, 12)}-{some(r, DIGITS, 12)}-{some(r, HEX, 32)}",
    "slack webhook": lambda r: (
        f"https://hooks.slack.com/services/T{some(r, UPPER + DIGITS, 8)}/B{some(r, UPPER + DIGITS, 8)}/{some(r, ALNUM, 24)}"
    ),
    "discord webhook": lambda r: f"https://discord.com/api/webhooks/{some(r, DIGITS, 18)}/{some(r, URLSAFE, 68)}",
    "discord bot": lambda r: f"{b64url(r, some(r, DIGITS, 18).encode())}.{some(r, URLSAFE, 6)}.{some(r, URLSAFE, 38)}",
    "stripe": lambda r: r.choice(["sk_live_", "rk_live_", "sk_test_"]) + some(r, ALNUM, 24, 99),
    "stripe webhook": lambda r: "whsec_" + some(r, ALNUM, 32),
    "twilio": lambda r: "SK" + some(r, HEX, 32),
    "sendgrid": lambda r: f"SG.{some(r, URLSAFE, 22)}.{some(r, URLSAFE, 43)}",
    "mailgun": lambda r: "key-" + some(r, HEX, 32),
    "mailchimp": lambda r: some(r, HEX, 32) + "-us" + str(r.randint(1, 21)),
    "npm": lambda r: "npm_" + some(r, ALNUM, 36),
    "pypi": lambda r: "pypi-AgEIcHlwaS5vcmc" + some(r, URLSAFE, 150),
    "rubygems": lambda r: "rubygems_" + some(r, HEX, 48),
    "docker hub": lambda r: "dckr_pat_" + some(r, URLSAFE, 27),
    "digitalocean": lambda r: r.choice(["dop_v1_", "doo_v1_"]) + some(r, HEX, 64),
    "shopify": lambda r: r.choice(["shpat_", "shpss_", "shpca_"]) + some(r, HEX, 32),
    "telegram": lambda r: f"{some(r, '123456789', 1)}{some(r, DIGITS, 9)}:AA{some(r, URLSAFE, 33)}",
    "square": lambda r: "EAAA" + some(r, URLSAFE, 60),
    "grafana": lambda r: f"glsa_{some(r, ALNUM, 32)}_{some(r, HEX, 8)}",
    "vault": lambda r: "hvs." + some(r, URLSAFE, 90, 100),
    "terraform": lambda r: f"{some(r, ALNUM, 14)}.atlasv1.{some(r, URLSAFE, 67)}",
    "linear": lambda r: "lin_api_" + some(r, ALNUM, 40),
    "notion": lambda r: r.choice(["secret_", "ntn_"]) + some(r, ALNUM, 43),
    "figma": lambda r: "figd_" + some(r, URLSAFE, 40),
    "airtable": lambda r: f"pat{some(r, ALNUM, 14)}.{some(r, HEX, 64)}",
    "postman": lambda r: f"PMAK-{some(r, HEX, 24)}-{some(r, HEX, 34)}",
    "databricks": lambda r: "dapi" + some(r, HEX, 32),
    "new relic": lambda r: "NRAK-" + some(r, UPPER + DIGITS, 27),
    "sentry": lambda r: "sntrys_" + b64url(r, 60) + "_" + some(r, ALNUM, 43),
    "atlassian": lambda r: "ATATT3xFfGF0" + some(r, URLSAFE, 171) + "=" + some(r, HEX.upper(), 8),
    "tailscale": lambda r: f"tskey-{r.choice(['auth', 'api'])}-{some(r, ALNUM, 12)}CNTRL-{some(r, ALNUM, 32)}",
    "doppler": lambda r: "dp.pt." + some(r, ALNUM, 43),
    "planetscale": lambda r: "pscale_tkn_" + some(r, URLSAFE, 43),
    "supabase": lambda r: "sbp_" + some(r, HEX, 40),
    "groq": lambda r: "gsk_" + some(r, ALNUM, 52),
    "xai": lambda r: "xai-" + some(r, ALNUM, 80),
    "replicate": lambda r: "r8_" + some(r, ALNUM, 37),
    "perplexity": lambda r: "pplx-" + some(r, ALNUM, 48),
    "dropbox": lambda r: "sl." + some(r, URLSAFE, 130, 140),
    "mapbox": lambda r: (
        f"sk.{b64url(r, json.dumps({'u': 'maps', 'a': some(r, LOWER + DIGITS, 25)}).encode())}.{some(r, URLSAFE, 22)}"
    ),
    "age": lambda r: "AGE-SECRET-KEY-1" + some(r, BECH32, 58),
    "azure storage": lambda r: b64(r, 64),
    "aws secret": lambda r: b64(r, 30),
    "heroku": lambda r: "HRKU-" + str(uuid.UUID(int=r.getrandbits(128), version=4)),
    "facebook": lambda r: "EAA" + some(r, ALNUM, 120, 180),
    "cloudflare": lambda r: some(r, URLSAFE, 40),
    "unknown base62": lambda r: some(r, ALNUM, 32, 44),
    "unknown hex": lambda r: some(r, HEX, 32),
}
"""Keys and tokens by issuer."""
NEED_A_NAME = ("azure storage", "aws secret", "cloudflare", "unknown hex", "unknown base62", "twilio", "mailchimp")
"""Issuers whose keys have no mark of their own: in notes, as in reality, their name or a word such as key stands beside them."""

_WORDS = ["sunset", "Tiger", "Berlin", "coffee", "winter", "dragon", "Mango", "rocket", "purple", "Vienna", "guitar", "pepper"]


def password(rng: random.Random) -> str:
    """Return a password as people choose them or as password managers make them."""
    form = rng.randrange(6)
    if form == 0:
        return rng.choice(_WORDS) + some(rng, DIGITS, 2, 4) + rng.choice(["!", "", "?", "$", "#"])
    if form == 1:
        return some(rng, ALNUM + "!#$%&*+-?@^_", 12, 20).rstrip("-_") + "7"
    if form == 2:
        return "-".join(rng.choice(_WORDS) for _ in range(4)) + some(rng, DIGITS, 1)
    if form == 3:
        word = rng.choice(_WORDS)
        return word.replace("e", "3").replace("o", "0").replace("i", "1").replace("a", "4") + some(rng, DIGITS, 2)
    if form == 4:
        return "-".join(some(rng, ALNUM, 6) for _ in range(3))
    return some(rng, LOWER, 3, 5) + some(rng, DIGITS, 3, 5)


def private_key(rng: random.Random) -> str:
    kind = rng.choice(["RSA ", "EC ", "OPENSSH ", "", "ENCRYPTED ", "DSA "])
    if rng.random() < 0.15:
        body = "\n".join(b64(rng, 48) for _ in range(rng.randint(8, 20)))
        return f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{body}\n={b64(rng, 3)}\n-----END PGP PRIVATE KEY BLOCK-----"
    body = "\n".join(b64(rng, 48) for _ in range(rng.randint(3, 26)))
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n{b64(rng, 20)}\n-----END {kind}PRIVATE KEY-----"


def url_password(rng: random.Random) -> str:
    """Return a password as it may stand in a URL."""
    return some(rng, ALNUM, 8, 18) if rng.random() < 0.6 else rng.choice(_WORDS) + some(rng, DIGITS, 2, 4)


def bip39_words() -> list[str]:
    folder = Path(__file__).resolve().parent.parent / "edgetune" / "privacy"
    return (folder / "bip39_english.txt").read_text().split()


def seed_phrase(rng: random.Random) -> str:
    """Return a seed phrase of 12 or 24 words with its checksum, as BIP-39 defines it."""
    import hashlib

    entropy = rng.randbytes(rng.choice([16, 32]))
    bits = int.from_bytes(entropy) << (len(entropy) // 4) | hashlib.sha256(entropy).digest()[0] >> (8 - len(entropy) // 4)
    words, count, chosen = bip39_words(), len(entropy) * 3 // 4, []
    for place in reversed(range(count)):
        chosen.append(words[bits >> 11 * place & 2047])
    return " ".join(chosen)


# Personal identifiers

_FIRST = ["anna", "jan", "marie", "lukas", "sofia", "tom", "priya", "wei", "elena", "omar", "kate", "piotr", "ines", "bjorn"]
_LAST = ["novak", "schmidt", "dupont", "garcia", "rossi", "jansen", "kowalski", "smith", "lee", "silva", "berg", "khan"]
_HOSTS = ["gmail.com", "outlook.com", "posteo.de", "uni-wien.ac.at", "example.org", "proton.me", "mail.co.uk", "wanadoo.fr"]
_HOSTS += ["firma-huber.at", "kth.se", "library.city.gov", "studio.design", "seznam.cz"]


def email(rng: random.Random) -> str:
    first, last = rng.choice(_FIRST), rng.choice(_LAST)
    number = some(rng, DIGITS, 0, 2)
    local = rng.choice(
        [f"{first}.{last}", f"{first}{number}", f"{first[0]}{last}", f"{first}_{last}{number}", f"{first}+{last}"]
    )
    return f"{local.title() if rng.random() < 0.1 else local}@{rng.choice(_HOSTS)}"


def _d(rng: random.Random, form: str) -> str:
    """Return `form` with every X as a digit, and every N as one from 2 to 9."""
    return "".join(rng.choice(DIGITS) if c == "X" else rng.choice("23456789") if c == "N" else c for c in form)


_US_AREAS = ["212", "415", "312", "206", "617", "303", "512", "718", "404", "602"]
PHONES: dict[str, Maker] = {
    "US": lambda r: _d(r, r.choice(["({a}) NXX-XXXX", "{a}-NXX-XXXX", "{a}.NXX.XXXX", "+1 {a} NXX XXXX", "+1-{a}-NXX-XXXX", "1-{a}-NXX-XXXX", "+1{a}NXXXXXX"])
                       .replace("{a}", r.choice(_US_AREAS)).replace("NXX", "N3X").replace("NXXXXXX", "N3XXXXX")),
    "GB": lambda r: _d(r, r.choice(["07911 1XXXXX", "+44 7911 1XXXXX", "020 7946 0XXX", "+44 20 7946 0XXX", "0117 496 0XXX", "07400 XXXXXX", "(020) 7946 0XXX"])),
    "DE": lambda r: _d(r, r.choice(["0151 2XXXXXXX", "+49 151 2XXXXXXX", "030 901820XX", "+49 30 901820XX", "0171/3XXXXXX", "0049 171 3XXXXXX", "+49 (0)89 636480XX"])),
    "FR": lambda r: _d(r, r.choice(["06 1X XX XX XX", "+33 6 1X XX XX XX", "01 42 68 5X XX", "06.1X.XX.XX.XX", "+33 1 42 68 5X XX"])),
    "ES": lambda r: _d(r, r.choice(["612 XXX XXX", "+34 612 XX XX XX", "91 123 XX XX", "+34 91 123 XX XX"])),
    "IT": lambda r: _d(r, r.choice(["347 123 XXXX", "+39 347 12XXXXX", "06 6982 XXXX", "+39 06 6982 XXXX"])),
    "NL": lambda r: _d(r, r.choice(["06 12345XXX", "06-1234XXXX", "+31 6 1234 XXXX", "020 123 4XXX"])),
    "PL": lambda r: _d(r, r.choice(["512 XXX XXX", "+48 512 XXX XXX", "22 123 4X XX"])),
    "CH": lambda r: _d(r, r.choice(["079 123 XX XX", "+41 79 123 XX XX", "044 668 1X XX", "+41 44 668 1X XX"])),
    "AT": lambda r: _d(r, r.choice(["0664 123XXXX", "+43 664 123XXXX", "+43 1 5XXXXXXX", "0664/12 34 XXX"])),
    "BR": lambda r: _d(r, r.choice(["(11) 96123-XXXX", "+55 11 96123-XXXX", "(21) 2123-XXXX"])),
    "IN": lambda r: _d(r, r.choice(["+91 81234 5XXXX", "081234 5XXXX", "+91-9812345XXX"])),
    "AU": lambda r: _d(r, r.choice(["0412 345 XXX", "+61 412 345 XXX", "(02) 9374 4XXX"])),
    "JP": lambda r: _d(r, r.choice(["090-1234-XXXX", "+81 90-1234-XXXX", "03-3224-XXXX"])),
    "SE": lambda r: _d(r, r.choice(["070-123 4X XX", "+46 70 123 4X XX"])),
    "CZ": lambda r: _d(r, r.choice(["+420 601 123 XXX", "+420 222 XXX XXX"])),
}  # fmt: skip
"""Phone numbers by country, as its national numbering plan has them."""


def phone(rng: random.Random) -> str:
    return PHONES[rng.choice(list(PHONES))](rng)


def luhn(digits: str) -> str:
    """Return the check digit of ISO/IEC 7812."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


def card(rng: random.Random) -> str:
    prefix, length = rng.choice(
        [("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("34", 15), ("37", 15), ("6011", 16), ("3530", 16)]
    )
    digits = prefix + some(rng, DIGITS, length - len(prefix) - 1)
    digits += luhn(digits)
    groups = [digits[:4], digits[4:10], digits[10:]] if length == 15 else [digits[at : at + 4] for at in range(0, 16, 4)]
    return rng.choice([" ", "-", "", " "]).join(groups)


_IBANS = {"DE": "nnnnnnnnnnnnnnnnnn", "AT": "nnnnnnnnnnnnnnnn", "GB": "aaaannnnnnnnnnnnnn", "NL": "aaaannnnnnnnnn"}
_IBANS |= {
    "CH": "nnnnncccccccccccc",
    "PL": "n" * 24,
    "SE": "n" * 20,
    "IE": "aaaannnnnnnnnnnnnn",
    "CZ": "n" * 20,
    "ES": "n" * 20,
}
_IBANS |= {"FR": "nnnnnnnnnncccccccccccnn", "IT": "annnnnnnnnncccccccccccc", "PT": "n" * 21, "NO": "n" * 11, "DK": "n" * 14}


def iban(rng: random.Random) -> str:
    country = rng.choice(list(_IBANS))
    sets = {"n": DIGITS, "a": UPPER, "c": DIGITS}
    account = "".join(rng.choice(sets[kind]) for kind in _IBANS[country])
    number = int("".join(str(int(letter, 36)) for letter in account + country + "00"))
    whole = f"{country}{98 - number % 97:02}{account}"
    return whole if rng.random() < 0.4 else " ".join(whole[at : at + 4] for at in range(0, len(whole), 4))


def _day(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(1940, 2005), rng.randint(1, 12), rng.randint(1, 28)


def _nir(rng: random.Random) -> str:
    year, month, _ = _day(rng)
    body = f"{rng.choice('12')}{year % 100:02}{month:02}{rng.randint(1, 95):02}{rng.randint(1, 900):03}{rng.randint(1, 900):03}"
    if body[5:7] == "20":
        body = f"{body[:5]}75{body[7:]}"
    check = f"{97 - int(body) % 97:02}"
    return (
        f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {check}"
        if rng.random() < 0.6
        else body + check
    )


def _pesel(rng: random.Random) -> str:
    year, month, day = _day(rng)
    body = f"{year % 100:02}{month + (20 if year >= 2000 else 0):02}{day:02}{some(rng, DIGITS, 4)}"
    return body + str(-sum(int(d) * w for d, w in zip(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3), strict=True)) % 10)


def _cpf(rng: random.Random) -> str:
    digits = [int(d) for d in some(rng, DIGITS, 9)]
    for _ in range(2):
        rest = sum(d * w for d, w in zip(digits, range(len(digits) + 1, 1, -1), strict=True)) * 10 % 11 % 10
        digits.append(rest)
    text = "".join(map(str, digits))
    return f"{text[:3]}.{text[3:6]}.{text[6:9]}-{text[9:]}"


def _fiscal(rng: random.Random) -> str:
    from stdnum.it import codicefiscale

    year, _, day = _day(rng)
    body = f"{some(rng, 'BCDFGLMNPRST', 6)}{year % 100:02}{rng.choice('ABCDEHLMPRST')}{day + rng.choice([0, 40]):02}H501"
    return body + str(codicefiscale.calc_check_digit(body))


def _hetu(rng: random.Random) -> str:
    year, month, day = _day(rng)
    body, number = f"{day:02}{month:02}{year % 100:02}", f"{rng.randint(2, 899):03}"
    return f"{body}{'-' if year < 2000 else 'A'}{number}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(body + number) % 31]}"


def _idnr(rng: random.Random) -> str:
    from stdnum.de import idnr
    from stdnum.iso7064 import mod_11_10

    while True:
        digits = rng.sample(DIGITS, 9)
        digits.insert(rng.randrange(10), digits[rng.randrange(9)])
        whole = "".join(digits) + mod_11_10.calc_check_digit("".join(digits))
        if idnr.is_valid(whole):
            return f"{whole[:2]} {whole[2:5]} {whole[5:8]} {whole[8:]}" if rng.random() < 0.6 else whole


def _bsn(rng: random.Random) -> str:
    from stdnum.nl import bsn

    body = some(rng, "123456789", 1) + some(rng, DIGITS, 7)
    check = bsn.checksum(body + "0") % 11
    return body + str(check) if check < 10 else _bsn(rng)


def _swedish(rng: random.Random) -> str:
    year, month, day = _day(rng)
    body = f"{year % 100:02}{month:02}{day:02}{some(rng, DIGITS, 3)}"
    return f"{year // 100}{body[:6]}-{body[6:]}{luhn(body)}" if rng.random() < 0.5 else f"{body[:6]}-{body[6:]}{luhn(body)}"


def _ahv(rng: random.Random) -> str:
    body = "756" + some(rng, DIGITS, 9)
    check = -sum(int(d) * (1, 3)[at % 2] for at, d in enumerate(body)) % 10
    return f"{body[:3]}.{body[3:7]}.{body[7:11]}.{body[11:]}{check}"


def _belgian(rng: random.Random) -> str:
    year, month, day = _day(rng)
    body = f"{year % 100:02}{month:02}{day:02}{rng.randint(1, 997):03}"
    check = f"{97 - int(('2' if year >= 2000 else '') + body) % 97:02}"
    return f"{body[:2]}.{body[2:4]}.{body[4:6]}-{body[6:]}.{check}"


def _aadhaar(rng: random.Random) -> str:
    from stdnum import verhoeff

    body = some(rng, "23456789", 1) + some(rng, DIGITS, 10)
    whole = body + verhoeff.calc_check_digit(body)
    return f"{whole[:4]} {whole[4:8]} {whole[8:]}"


def _sin(rng: random.Random) -> str:
    body = some(rng, "1234567", 1) + some(rng, DIGITS, 7)
    whole = body + luhn(body)
    return f"{whole[:3]} {whole[3:6]} {whole[6:]}" if rng.random() < 0.5 else f"{whole[:3]}-{whole[3:6]}-{whole[6:]}"


NATIONAL: dict[str, Maker] = {
    "US SSN": lambda r: f"{r.choice([r.randint(1, 665), r.randint(667, 899)]):03}-{r.randint(1, 99):02}-{r.randint(1, 9999):04}",
    "GB NINO": lambda r: f"{r.choice('ABCEGHJKLMNPRSTWXYZ')}{r.choice('ABCEGHJKLMNPRSTWXYZ')} {some(r, DIGITS, 2)} {some(r, DIGITS, 2)} {some(r, DIGITS, 2)} {r.choice('ABCD')}",
    "ES DNI": lambda r: (lambda n: f"{n:08}{r.choice(['', '-'])}{'TRWAGMYFPDXBNJZSQVHLCKE'[n % 23]}")(r.randint(10**7, 10**8 - 1)),
    "ES NIE": lambda r: (lambda n: f"{'XYZ'[n // 10**7]}{n % 10**7:07}{'TRWAGMYFPDXBNJZSQVHLCKE'[n % 23]}")(r.randint(0, 3 * 10**7 - 1)),
    "FR NIR": _nir, "PL PESEL": _pesel, "BR CPF": _cpf, "IT codice fiscale": _fiscal, "FI HETU": _hetu, "DE IdNr": _idnr,
    "NL BSN": _bsn, "SE personnummer": _swedish, "CH AHV": _ahv, "BE NN": _belgian, "IN Aadhaar": _aadhaar, "CA SIN": _sin,
}  # fmt: skip
"""National identification numbers by country."""
NATIONAL_NAMES = {
    "US SSN": "SSN", "GB NINO": "National Insurance number", "ES DNI": "DNI", "ES NIE": "NIE", "FR NIR": "numéro de sécurité sociale",
    "PL PESEL": "PESEL", "BR CPF": "CPF", "IT codice fiscale": "codice fiscale", "FI HETU": "henkilötunnus",
    "DE IdNr": "Steuer-ID", "NL BSN": "BSN", "SE personnummer": "personnummer", "CH AHV": "AHV-Nr.", "BE NN": "rijksregisternummer",
    "IN Aadhaar": "Aadhaar", "CA SIN": "SIN",
}  # fmt: skip
"""The name that stands beside each number in letters and forms."""
