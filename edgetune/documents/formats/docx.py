"""Reads Word's DOCX with mammoth, which makes simple HTML of it. Pictures are dropped, and so are comments."""

from __future__ import annotations

import io

from edgetune.documents.formats import html
from edgetune.documents.formats.package import Package
from edgetune.documents.formats.parsed import Parsed

VERSION = 1


def read(data: bytes) -> Parsed:
    """Return the text of a document. Raises NotText for a damaged file, and for one that is too large when unpacked."""
    import defusedxml
    import mammoth

    Package(data)
    defusedxml.defuse_stdlib()  # mammoth parses XML with the standard library, and this process parses nothing else
    without_picture = mammoth.images.img_element(lambda image: {})
    found = mammoth.convert_to_html(io.BytesIO(data), convert_image=without_picture)
    return Parsed([html.to_text(found.value)])
