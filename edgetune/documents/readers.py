"""The table of formats that a parser reads, by suffix, and of suffixes that are source code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format of documents: its name in sentences, the module with its `read`, and the packages of the extra that it needs.

    A file that `is_text` is decoded before it is parsed. One that is `readable` is read as plain text where packages lack.
    """

    name: str
    module: str
    packages: tuple[str, ...] = ()
    is_text: bool = False
    readable: bool = False

    def lacks(self) -> bool:
        """Return True if a package that this format needs is not installed."""
        return any(importlib.util.find_spec(package) is None for package in self.packages)

    def version(self) -> str:
        """Return the versions of the format's module and packages: another one may give another text."""
        module = importlib.import_module(self.module)
        packages = [f"{package} {importlib.metadata.version(package)}" for package in self.packages]
        return ", ".join([f"{self.module} {module.VERSION}", *packages])


def _format(name: str, module: str, *packages: str, is_text: bool = False, readable: bool = False) -> Format:
    return Format(name, f"edgetune.documents.formats.{module}", packages, is_text, readable)


_HTML = _format("HTML", "html", "selectolax", is_text=True)
_MAIL = _format("mail", "mail", "selectolax")
READERS = {
    ".org": _format("Org", "org", "orgparse", is_text=True, readable=True),
    ".rst": _format("reStructuredText", "rst", "docutils", is_text=True, readable=True),
    ".html": _HTML,
    ".htm": _HTML,
    ".pdf": _format("PDF", "pdf", "pypdfium2"),
    ".docx": _format("Word", "docx", "mammoth", "selectolax", "defusedxml"),
    ".epub": _format("EPUB", "epub", "selectolax", "defusedxml"),
    ".odt": _format("ODT", "odt", "defusedxml"),
    ".enex": _format("Evernote", "enex", "selectolax", "defusedxml"),
    ".eml": _MAIL,
    ".mbox": _MAIL,
    ".ipynb": _format("Jupyter", "notebook"),
}
"""The format of each suffix that a parser reads."""
CODE_SUFFIXES = frozenset({
    ".py", ".pyi", ".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".inl",
    ".cu", ".m", ".mm", ".metal", ".cs", ".java", ".kt", ".kts", ".scala", ".go", ".rs", ".rb", ".php", ".pl", ".pm",
    ".swift", ".dart", ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".fs", ".ex", ".exs", ".erl", ".clj", ".cljs", ".lisp",
    ".el", ".scm", ".sql", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".bat", ".vim", ".nim", ".zig", ".v", ".vhd", ".f90",
    ".f", ".pas", ".asm", ".s", ".css", ".scss", ".less", ".vue", ".svelte", ".gradle", ".cmake", ".tf", ".proto",
    ".graphql",
})  # fmt: skip
"""Suffixes of source code, which is read as it stands, with --code alone."""


def format_of(name: str) -> Format | None:
    """Return the format in which a parser reads a file of this name, or None for one that is plain text, a chat, or no note.

    The mail of Apple Mail and Thunderbird lies in files called mbox.
    """
    return _MAIL if name.lower() == "mbox" else READERS.get(os.path.splitext(name)[1].lower())
