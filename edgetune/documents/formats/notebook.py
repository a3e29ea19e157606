"""Reads Jupyter notebooks: the text of Markdown cells, and code between fences. Outputs are dropped."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgetune.documents.encoding import NotText
from edgetune.documents.formats.parsed import OUTPUTS, Parsed
from edgetune.documents.reasons import Reason
from edgetune.runtime import json_file

VERSION = 1


def read(data: bytes) -> Parsed:
    """Return the text of a notebook, of version 3 or 4 of its format. Raises NotText for anything else."""
    try:
        notebook = json_file.parse(data)
    except ValueError:
        raise NotText(Reason.UNPARSED) from None
    sheets = _list(notebook, "worksheets")
    cells = _list(notebook, "cells") + [cell for sheet in sheets for cell in _list(sheet, "cells")]
    if not isinstance(notebook, dict) or not ("cells" in notebook or sheets):
        raise NotText(Reason.UNPARSED)
    language = _language(notebook)
    outputs = sum(len(_list(cell, "outputs")) for cell in cells)
    texts = [_cell(cell, language) for cell in cells if isinstance(cell, dict)]
    return Parsed(["\n\n".join(text for text in texts if text)], +Counter({OUTPUTS: outputs}))


def _cell(cell: dict[str, Any], language: str) -> str:
    """Return the text of a cell; code stands between fences."""
    source = cell.get("source", cell.get("input", ""))
    lines = source if isinstance(source, list) else [source]
    text = "".join(line for line in lines if isinstance(line, str)).strip("\n")
    if cell.get("cell_type") != "code" or not text.strip():
        return text
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{text}\n{fence}"


def _language(notebook: dict[str, Any]) -> str:
    """Return the name of the notebook's language for the fences; empty if it names none."""
    metadata = notebook.get("metadata")
    for key, name in (("language_info", "name"), ("kernelspec", "language")):
        found = metadata.get(key) if isinstance(metadata, dict) else None
        value = found.get(name) if isinstance(found, dict) else None
        if isinstance(value, str) and value.isalnum():
            return value.lower()
    return ""


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []
