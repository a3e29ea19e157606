"""Reads the text of PDF pages with PDFium. A page that is only a picture has none, and is counted."""

from __future__ import annotations

from collections import Counter

from edgetune.documents.encoding import NotText
from edgetune.documents.formats.parsed import PAGES, Parsed
from edgetune.documents.limits import MAX_PDF_PAGES
from edgetune.documents.reasons import Reason

VERSION = 1
_WRONG_PASSWORD = 4
"""PDFium's FPDF_ERR_PASSWORD."""


def read(data: bytes) -> Parsed:
    """Return the text of all pages. Raises NotText for an encrypted file, and for one of pictures alone."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        encrypted = getattr(error, "err_code", None) == _WRONG_PASSWORD
        raise NotText(Reason.ENCRYPTED if encrypted else Reason.UNPARSED) from None
    count = len(document)
    if count > MAX_PDF_PAGES:
        raise NotText(Reason.TOO_LARGE_UNPACKED)
    pages = [_page_text(document, number) for number in range(count)]
    texts = [page for page in pages if page]
    if not texts:
        raise NotText(Reason.NO_TEXT)
    return Parsed(["\n\n".join(texts)], +Counter({PAGES: count - len(texts)}))


def _page_text(document: object, number: int) -> str:
    """Return the text of one page; empty for a page that PDFium cannot open."""
    import pypdfium2

    try:
        text: str = document[number].get_textpage().get_text_range()  # type: ignore[index]
    except pypdfium2.PdfiumError:
        return ""
    # PDFium writes U+FFFE, or U+0002 in older versions, where a word is hyphenated at the end of a line.
    for hyphen in ("\ufffe", "\x02"):
        text = text.replace(f"{hyphen}\r\n", "").replace(hyphen, "")
    return "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n")).strip()
