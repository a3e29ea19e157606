"""Makes small files in each format that edgetune reads, by code alone."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/word/document.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)
_RELATIONS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="rId1" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/>'
    "</Relationships>"
)


def zipped(**members: str | bytes) -> bytes:
    """Return a zip file; in a member's name, two underscores stand for a slash and one for a dot."""
    return zipped_as({name.replace("__", "/").replace("_", "."): data for name, data in members.items()})


def zipped_as(members: dict[str, str | bytes]) -> bytes:
    """Return a zip file with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def docx(body: str, before: str = "") -> bytes:
    """Return a Word file with a body of WordprocessingML."""
    document = f'{before}<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>'
    return zipped_as({"[Content_Types].xml": _TYPES, "_rels/.rels": _RELATIONS, "word/document.xml": document})


def paragraph(text: str, style: str = "") -> str:
    """Return a paragraph of WordprocessingML."""
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{properties}<w:r><w:t>{text}</w:t></w:r></w:p>"


def odt(body: str) -> bytes:
    """Return an OpenDocument text."""
    names = " ".join(f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"' for name in ("office", "text", "table"))
    content = f"<office:document-content {names}><office:body><office:text>{body}</office:text></office:body>"
    return zipped(mimetype="application/vnd.oasis.opendocument.text", content_xml=f"{content}</office:document-content>")


def epub(chapters: dict[str, str], spine: Sequence[str]) -> bytes:
    """Return a book with chapters by name, read in the order of `spine`."""
    items = "".join(f'<item id="{name}" href="{name}.xhtml"/>' for name in chapters)
    order = "".join(f'<itemref idref="{name}"/>' for name in spine)
    package = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine></package>'
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="text/book.opf"/></rootfiles></container>'
    )
    pages = {f"text/{name}.xhtml": f"<html><body>{page}</body></html>" for name, page in chapters.items()}
    return zipped_as({"META-INF/container.xml": container, "text/book.opf": package, **pages})


def enex(*notes: str) -> bytes:
    """Return an export of Evernote's with these notes, as XML."""
    head = '<?xml version="1.0"?><!DOCTYPE en-export SYSTEM "http://xml.evernote.com/pub/evernote-export4.dtd">'
    return f"{head}<en-export>{''.join(notes)}</en-export>".encode()


def pdf(pages: Sequence[str], trailer: str = "", kids: str = "") -> bytes:
    """Return a PDF with a line of text on each page; none on a page whose text is empty. `trailer`: more of its keys."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    references = kids or " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{references}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    count = len(objects) + 1
    end = f"xref\n0 {count}\n0000000000 65535 f \n{table}trailer\n<< /Size {count} /Root 1 0 R {trailer} >>\n"
    return data + f"{end}startxref\n{len(data)}\n%%EOF\n".encode()


def notebook(*cells: str) -> bytes:
    """Return a Jupyter notebook with these cells, as JSON."""
    return f'{{"cells": [{", ".join(cells)}], "metadata": {{"language_info": {{"name": "python"}}}}, "nbformat": 4}}'.encode()
