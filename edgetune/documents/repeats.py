"""Keeps one of several notes with the same text or nearly the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgetune.documents.copies import original_path
from edgetune.documents.document import Document, Skipped
from edgetune.documents.near_duplicates import NearDuplicates, without_near_duplicates
from edgetune.documents.reasons import Reason


def without_repeats(
    documents: Sequence[Document], before_each: Callable[[], None] = lambda: None
) -> tuple[list[Document], list[Skipped], NearDuplicates]:
    """Return each text once and nearly equal ones once, the others as skips, and the account of those much alike.

    before_each: called before each note that is compared, and may raise to end the work.
    """
    documents, twins = without_duplicates(documents)
    documents, near = without_near_duplicates(documents, before_each)
    return documents, twins + near.skipped, near


def without_duplicates(documents: Sequence[Document]) -> tuple[list[Document], list[Skipped]]:
    """Return each text once, and the others as skips. Texts are equal if their words are.

    The one that is kept is the original rather than its copy ("note.md" and not "note (1).md"), or else the first.
    """
    kept: dict[str, Document] = {}
    for document in documents:
        first = kept.setdefault(document.words, document)
        if original_path(first.path) != first.path and original_path(document.path) == document.path:
            kept[document.words] = document
    chosen = {id(document) for document in kept.values()}  # two names that are not UTF-8 may be shown alike
    return (
        [document for document in documents if id(document) in chosen],
        [Skipped(document.path, Reason.DUPLICATE) for document in documents if id(document) not in chosen],
    )
