"""Reads mail (.eml, mbox): a document for each message, without quoted replies, signatures and attachments."""

from __future__ import annotations

import email
import email.policy
import re
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage

from edgetune.documents.encoding import NotText
from edgetune.documents.formats import html
from edgetune.documents.formats.parsed import ATTACHMENTS, PROTECTED, UNREADABLE, WORDLESS, Parsed
from edgetune.documents.limits import MAX_MAIL_PARTS
from edgetune.documents.reasons import Reason

VERSION = 1
_SEPARATOR = re.compile(rb"(?:\A|(?<=\n\n)|(?<=\r\n\r\n))From \S[^\n]*\d\d:\d\d[^\n]*\n")
_ESCAPED = re.compile(rb"^>(>*From )", re.MULTILINE)
_SIGNATURE = re.compile(r"^-- ?$", re.MULTILINE)
_FORWARDED = re.compile(
    r"^(?:-{2,} ?(?:Original Message|Ursprüngliche Nachricht|Message d'origine) ?-{2,}|_{20,})$", re.MULTILINE
)
_WROTE = re.compile(
    r"^(?:On|Am|Le|El|Il|Op|Em|Den|W dniu)\b[^\n]{0,200}(?:\n[^\n]{0,200})?"
    r"(?:wrote|schrieb|a écrit|escribió|ha scritto|schreef|escreveu|skrev|napisał)[^\n]{0,80}:[ \t]*$"
)
_HEADER_KEYS = (b"from:", b"to:", b"subject:", b"date:", b"received:", b"message-id:", b"mime-version:", b"return-path:")


def read(data: bytes) -> Parsed:
    """Return a text for each message: its subject as a heading, then its sender's words. Raises NotText if it is no mail."""
    parsed = Parsed([])
    for message in _messages(data):
        try:
            text = _text(email.message_from_bytes(message, policy=email.policy.default), parsed.left_out)
        except (ValueError, LookupError, AttributeError, TypeError, KeyError, IndexError):
            # headers and encodings that the standard library does not survive
            parsed.left_out[UNREADABLE] += 1
        else:
            parsed.texts += [text] if text else []
            parsed.left_out[WORDLESS] += not text
    return Parsed(parsed.texts, +parsed.left_out)


def _messages(data: bytes) -> Iterator[bytes]:
    """Yield the bytes of each message of an mbox, or those of the one in an .eml file. Raises NotText."""
    starts = [found.span() for found in _SEPARATOR.finditer(data)]
    if not starts or starts[0][0] != 0:
        if not data[:1000].lower().lstrip().startswith(_HEADER_KEYS) and not _has_headers(data):
            raise NotText(Reason.UNPARSED)
        yield data
        return
    for (_, begin), (end, _) in zip(starts, [*starts[1:], (len(data), 0)], strict=True):
        yield _ESCAPED.sub(rb"\1", data[begin:end])


def _has_headers(data: bytes) -> bool:
    """Return True if two or more of the usual headers stand before the first empty line."""
    head = re.split(rb"\r?\n\r?\n", data[: 1 << 16], maxsplit=1)[0].lower()
    return sum(re.search(rb"^" + key, head, re.MULTILINE) is not None for key in _HEADER_KEYS) >= 2


def _text(message: EmailMessage, left_out: Counter[str]) -> str:
    """Return the subject and the body of a message; empty if its sender wrote nothing."""
    body, found = "", 0
    for number, part in enumerate(message.walk()):
        if number > MAX_MAIL_PARTS:
            raise ValueError("too many parts")
        if part.is_multipart():
            continue
        kind = part.get_content_type()
        if kind in ("application/pgp-encrypted", "application/pkcs7-mime", "application/x-pkcs7-mime"):
            left_out[PROTECTED] += 1
        elif kind not in ("text/plain", "text/html") or part.is_attachment():
            left_out[ATTACHMENTS] += kind not in ("application/pgp-signature", "application/pkcs7-signature")
        elif kind == "text/plain" and found < 2:
            body, found = (f"{body}\n\n{part.get_content()}" if found else part.get_content()), 1
        elif kind == "text/html" and not found:
            body, found = html.to_text(str(part.get_content())), 2
    body = own_words(body)
    subject = " ".join(str(message.get("Subject", "")).split())
    return "\n\n".join(part for part in (f"# {subject}" if subject else "", body) if part) if body else ""


def own_words(body: str) -> str:
    """Return a message's text without what it quotes, forwards or is signed with."""
    text = body.replace("\r\n", "\n")
    for end in (_SIGNATURE, _FORWARDED):
        found = end.search(text)
        text = text[: found.start()] if found and text[: found.start()].strip() else text
    kept: list[str] = []
    for line in text.split("\n"):
        if not line.startswith(">"):
            kept.append(line.rstrip())
            continue
        while kept and not kept[-1]:
            kept.pop()
        for lines in (2, 1):  # the line above a quotation says who wrote it, and when; it may be broken in two
            if kept and _WROTE.search("\n".join(kept[-lines:])):
                del kept[-lines:]
                break
        kept.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
