"""Names the kinds of secrets and personal identifiers, and the placeholder that stands for each in masked text."""

from __future__ import annotations

from enum import Enum

SECRETS, IDENTIFIERS = "secrets", "identifiers"


class Kind(Enum):
    """A kind of secret or identifier: its name in counts, the plural, its placeholder and its group.

    Where two kinds find the same text, the one that is declared first names it.
    """

    PRIVATE_KEY = ("private key", "private keys", "[private key]", SECRETS)
    PASSWORD = ("password", "passwords", "[password]", SECRETS)
    API_KEY = ("API key", "API keys", "[API key]", SECRETS)
    JWT = ("JSON Web Token", "JSON Web Tokens", "[token]", SECRETS)
    SEED_PHRASE = ("seed phrase", "seed phrases", "[seed phrase]", SECRETS)
    RANDOM = ("random string", "random strings", "[secret]", SECRETS)
    OWN = ("entry of private.txt", "entries of private.txt", "[private]", IDENTIFIERS)
    EMAIL = ("e-mail address", "e-mail addresses", "[e-mail]", IDENTIFIERS)
    IBAN = ("IBAN", "IBANs", "[IBAN]", IDENTIFIERS)
    CARD = ("card number", "card numbers", "[card]", IDENTIFIERS)
    NATIONAL = ("national id", "national ids", "[national id]", IDENTIFIERS)
    PHONE = ("phone number", "phone numbers", "[phone]", IDENTIFIERS)

    def __init__(self, one: str, many: str, placeholder: str, group: str) -> None:
        self.one, self.many, self.placeholder, self.group = one, many, placeholder, group


def in_words(counts: dict[str, int]) -> str:
    """Return counts by kind, in the order of the kinds, as a part of a sentence: "2 API keys, 1 phone number"."""
    return ", ".join(
        f"{counts[kind.one]:,} {kind.one if counts[kind.one] == 1 else kind.many}" for kind in Kind if counts.get(kind.one)
    )
