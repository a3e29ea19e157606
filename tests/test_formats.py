"""Every format becomes plain text: its words, headings, lists and code, and nothing of what only its program needs."""

from __future__ import annotations

from pathlib import Path

import documents_in as made
import pytest

from edgetune.documents.encoding import NotText
from edgetune.documents.formats import docx, enex, epub, html, mail, notebook, odt, org, pdf, rst
from edgetune.documents.formats.parsed import ATTACHMENTS, OUTPUTS, PAGES, PROTECTED, WORDLESS
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason


def reason(read, data: bytes) -> Reason:
    with pytest.raises(NotText) as refused:
        read(data)
    return refused.value.reason


def text_of(found) -> str:
    (text,) = found.texts
    return text


# HTML

PAGE = """<html><head><title>Beans</title><style>p {}</style></head><body><nav>Home</nav><script>let a = 1</script>
<h2>In <em>May</em></h2><p>Sow   two
inches deep.<br>Water&nbsp;well &amp; wait.<!-- never --></p><ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>
<ol><li>first</li><li>second</li></ol><table><tr><th>Row</th><th>Seeds</th></tr><tr><td><p>1</p></td><td>12</td></tr></table>
<pre>def f():
    return  1</pre><blockquote><p>Wait.</p></blockquote><img src="data:image/png;base64,AAAA"><p>Use <code>f()</code>.</p>"""
PAGE_TEXT = """# Beans

## In May

Sow two inches deep.
Water\xa0well & wait.

- one
  - inner
- two

1. first
2. second

Row | Seeds
1 | 12

```
def f():
    return  1
```

> Wait.

Use `f()`."""


def test_html_keeps_words_and_structure_and_drops_the_rest() -> None:
    assert text_of(html.read(PAGE.encode())) == PAGE_TEXT


def test_a_page_with_a_heading_does_not_repeat_its_title() -> None:
    assert html.to_text("<title>Site - Beans</title><h1>Beans</h1><p>Sow.") == "# Beans\n\nSow."


def test_html_nested_as_deep_as_a_file_allows_is_read() -> None:
    assert html.to_text("<div>" * 50_000 + "deep") == "deep"


@pytest.mark.parametrize(
    ("page", "named"),
    [
        (b'<meta charset="windows-1251">', "cp1251"),
        (b"<META http-equiv=Content-Type content='text/html; charset=Shift_JIS'>", "shift_jis"),
        (b"<meta charset=utf-16>", None),
        (b"<meta charset=base64>", None),
        (b"<meta charset=klingon>", None),
        (b"<p>charset=latin1", None),
    ],
)
def test_a_page_names_its_encoding(page: bytes, named: str | None) -> None:
    assert html.charset(page) == named


def test_a_page_in_an_old_encoding_is_read_with_the_right_letters(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes("<meta charset=koi8-r><p>Бобы растут.".encode("koi8-r"))
    (tmp_path / "b.html").write_bytes("<meta charset=koi8-r><p>In truth UTF-8: größer.".encode())
    assert [document.text for document in read_notes([tmp_path]).documents] == ["Бобы растут.", "In truth UTF-8: größer."]


# Org and reStructuredText

ORG = """#+TITLE: Garden
#+STARTUP: overview
Before.
* TODO Beans :spring:
SCHEDULED: <2024-05-01 Wed>
:PROPERTIES:
:ID: 0123
:END:
:LOGBOOK:
- Note taken on [2024-05-01 Wed]
:END:
See [[https://example.org][the page]], [[file:bean.png]] and [[id:77][note]].
# a comment
#+BEGIN_SRC python
x = [[1]]  # :PROPERTIES:
:PROPERTIES:
#+END_SRC
** Deep
:PROPERTIES:
never closed
"""
ORG_TEXT = """# Garden

Before.

# TODO Beans

Tags: spring

See the page,  and note.
```python
x = [[1]]  # :PROPERTIES:
:PROPERTIES:
```

## Deep

:PROPERTIES:
never closed"""


def test_org_keeps_headings_and_code_and_drops_drawers() -> None:
    assert text_of(org.read(ORG.encode())) == ORG_TEXT


RST = """Garden
======

Sow *two* inches deep in ``rows``; see :ref:`beans`.

- one
- two

.. a comment

.. note:: Water well.

.. raw:: html

   <script>alert(1)</script>

.. include:: SECRET

.. csv-table:: t
   :file: SECRET

.. versionadded:: 2
   New here.

.. code-block:: python
   :linenos:

   def f():
       return 1

Later
-----

1. first
"""
RST_TEXT = """# Garden

Sow two inches deep in `rows`; see :ref:`beans`.

- one

- two

Water well.

New here.

```python
def f():
    return 1
```

## Later

1. first"""


def test_rst_keeps_words_and_code_and_never_reads_another_file(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a private key")
    source = RST.replace("SECRET", str(tmp_path / "secret.txt"))
    assert text_of(rst.read(source.encode())) == RST_TEXT


# PDF, Word, EPUB, ODT, Evernote


def test_the_text_of_a_pdf_is_read_by_page_and_pages_without_text_are_counted() -> None:
    found = pdf.read(made.pdf(["Sow in May.", "", "Water well."]))
    assert (found.texts, found.left_out) == (["Sow in May.\n\nWater well."], {PAGES: 1})


def test_a_scanned_an_encrypted_and_a_broken_pdf_are_told_apart() -> None:
    encrypted = f"/ID [<{'00' * 16}> <{'00' * 16}>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 "
    encrypted += f"/O <{'ab' * 32}> /U <{'cd' * 32}> >>"
    assert reason(pdf.read, made.pdf(["", ""])) is Reason.NO_TEXT
    assert reason(pdf.read, made.pdf(["Sow."], trailer=encrypted)) is Reason.ENCRYPTED
    assert reason(pdf.read, b"%PDF-1.7 and no more") is Reason.UNPARSED
    assert reason(pdf.read, b"") is Reason.UNPARSED


def test_word_keeps_headings_and_tables() -> None:
    cell = "<w:tc>{}</w:tc>"
    row = f"<w:tr>{cell.format(made.paragraph('Row'))}{cell.format(made.paragraph('Seeds'))}</w:tr>"
    body = made.paragraph("Beans", "Heading1") + made.paragraph("Sow in May.") + f"<w:tbl>{row}</w:tbl>"
    assert text_of(docx.read(made.docx(body))) == "# Beans\n\nSow in May.\n\nRow | Seeds"


def test_an_epub_is_read_in_the_order_of_its_spine() -> None:
    book = made.epub(
        {"b": "<h1>Two</h1><p>Water.</p>", "a": "<h1>One</h1><p>Sow.</p>", "cover": "<img src='x'/>"}, ["cover", "a", "b"]
    )
    assert text_of(epub.read(book)) == "# One\n\nSow.\n\n# Two\n\nWater."
    assert reason(epub.read, made.epub({"a": ""}, ["a"])) is Reason.NO_TEXT


def test_odt_keeps_structure_and_drops_comments_and_changes() -> None:
    body = (
        '<text:tracked-changes>was</text:tracked-changes><text:h text:outline-level="2">Beans</text:h>'
        "<text:p>Sow<text:s text:c='2'/>in<text:line-break/><text:span>May</text:span>.<office:annotation><text:p>no</text:p>"
        "</office:annotation></text:p><text:list><text:list-item><text:p>one</text:p><text:list><text:list-item>"
        "<text:p>in</text:p>"
        "</text:list-item></text:list></text:list-item></text:list>"
        "<table:table><table:table-row><table:table-cell><text:p>1</text:p>"
        "</table:table-cell><table:table-cell><text:p>12</text:p></table:table-cell></table:table-row></table:table>"
    )
    assert text_of(odt.read(made.odt(body))) == "## Beans\n\nSow  in\nMay.\n- one\n  - in\n1 | 12"
    locked = made.zipped_as({"META-INF/manifest.xml": "<x><encryption-data/></x>", "content.xml": b"\x00\x01"})
    assert reason(odt.read, locked) is Reason.ENCRYPTED


def test_evernote_gives_a_document_a_note_without_attachments() -> None:
    content = "<content><![CDATA[<en-note><div>Sow in May.</div><en-media hash='1'/></en-note>]]></content>"
    first = f"<note><title>Beans</title>{content}<tag>spring</tag><resource><data>QUJD</data></resource></note>"
    found = enex.read(made.enex(first, "<note><title>Empty</title></note>"))
    assert found.texts[0] == "# Beans\n\nTags: spring\n\nSow in May."
    assert (len(found.texts), found.left_out) == (2, {ATTACHMENTS: 1})


# Mail and notebooks

MESSAGE = """From: Marra <marra@example.org>
Subject: =?utf-8?q?B=C3=B6hnen?=
Date: Wed, 1 May 2024 10:00:00 +0000
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=x

--x
Content-Type: text/plain; charset=utf-8

Sow in May.

On Tue, 30 Apr 2024 at 09:00, Ana <ana@example.org>
wrote:
> When?
> Soon?

Above all, water.
--{space}
Marra, gardener
--x
Content-Type: image/png
Content-Disposition: attachment; filename=bean.png
Content-Transfer-Encoding: base64

AAAA
--x--
""".replace("{space}", " ")


def test_a_message_keeps_its_senders_words_alone() -> None:
    found = mail.read(MESSAGE.encode())
    assert (found.texts, found.left_out) == (["# Böhnen\n\nSow in May.\n\nAbove all, water."], {ATTACHMENTS: 1})


def test_a_mailbox_gives_a_document_a_message() -> None:
    box = (
        "From a@example.org Wed May  1 10:00:00 2024\nSubject: one\n\n>From the start\nFrom here on, text.\n\n"
        "From b@example.org Wed May  1 11:00:00 2024\nSubject: two\n\n> only a quotation\n\n"
        "From c@example.org Wed May  1 12:00:00 2024\nSubject: three\nContent-Type: text/html\n\n<p>Sow <b>deep</b>.</p>\n\n"
        "From d@example.org Wed May  1 12:00:00 2024\nSubject: four\nContent-Type: application/pkcs7-mime\n\nAAAA\n"
    )
    found = mail.read(box.encode())
    assert found.texts == ["# one\n\nFrom the start\nFrom here on, text.", "# three\n\nSow deep."]
    assert found.left_out == {WORDLESS: 2, PROTECTED: 1}


def test_what_is_no_mail_is_refused_and_a_charset_nobody_knows_is_survived() -> None:
    assert reason(mail.read, b"Just a text: with a colon.\n") is Reason.UNPARSED
    strange = b"From: a\nTo: b\nSubject: s\nContent-Type: text/plain; charset=klingon\n\nSow.\n"
    assert mail.read(strange).left_out or mail.read(strange).texts == ["# s\n\nSow."]


def test_a_notebook_keeps_text_and_code_and_drops_outputs() -> None:
    cells = (
        '{"cell_type": "markdown", "source": ["# Beans\\n", "Count them."]}',
        '{"cell_type": "code", "source": "1 + 1", "outputs": [{"text": "2"}, {}]}',
        '{"cell_type": "code", "source": ""}',
    )
    found = notebook.read(made.notebook(*cells))
    assert (found.texts, found.left_out) == (["# Beans\nCount them.\n\n```python\n1 + 1\n```"], {OUTPUTS: 2})
    for broken in (b"{}", b"[]", b'{"cells": 3', b'{"worksheets": 3}'):
        assert reason(notebook.read, broken) is Reason.UNPARSED


# Zip files of strangers


def test_a_zip_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.documents.formats.package.MAX_UNPACKED_BYTES", 1 << 20)
    bomb = made.docx(made.paragraph("a" * (2 << 20)))
    assert len(bomb) < 10_000
    for read in (docx.read, epub.read, odt.read):
        assert reason(read, bomb) is Reason.TOO_LARGE_UNPACKED


def test_a_zip_file_of_too_many_members_and_no_zip_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.documents.formats.package.MAX_ZIP_MEMBERS", 10)
    many = made.zipped_as({f"{number}": "" for number in range(11)})
    for read in (docx.read, epub.read, odt.read):
        assert reason(read, many) is Reason.TOO_LARGE_UNPACKED
        assert reason(read, b"no zip file") is Reason.UNPARSED
        assert reason(read, made.zipped(other="x")) is Reason.UNPARSED if read is not docx.read else True
