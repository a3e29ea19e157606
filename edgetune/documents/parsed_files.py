"""Gives the texts of files that a parser reads: from the cache if they have not changed, else from the parser's process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from edgetune.documents.encoding import NotText
from edgetune.documents.formats.parsed import Parsed
from edgetune.documents.parsed_cache import ParsedCache
from edgetune.documents.parser_process import NotStarted, ParserProcess
from edgetune.documents.private_notes import PRIVATE_TEXT, is_marked_private
from edgetune.documents.readers import Format
from edgetune.documents.reasons import Reason


class ParsedFiles:
    """Parses files one after another. Use it as a context manager, which ends the parser's process."""

    def __init__(self, cache: ParsedCache, parser: ParserProcess) -> None:
        self._cache, self._parser = cache, parser
        self._lacks: dict[Format, bool] = {}
        self._versions: dict[Format, str] = {}
        self.lacking: Counter[str] = Counter()
        """Files by the name of a format whose packages are not installed."""
        self.as_plain: Counter[str] = Counter()
        """Those of them that were read as plain text."""

    @property
    def unlimited(self) -> tuple[str, ...]:
        """Return the limits on the parser that this system does not enforce, if it was started."""
        return tuple(sorted(self._parser.unlimited))

    def can_read(self, format: Format) -> bool:
        """Return True if the format's packages are here, False if a file is to be read as plain text. Raises NotText."""
        lacks = self._lacks.setdefault(format, format.lacks())
        if lacks and format.readable:
            self.as_plain[format.name] += 1
        elif lacks:
            self.lacking[format.name] += 1
            raise NotText(Reason.NEEDS_EXTRA)
        return not lacks

    def read(self, format: Format, data: bytes, waiting: Callable[[], None]) -> Parsed:
        """Return what is in a file with these bytes. waiting: as in ParserProcess.parse. Raises NotText.

        A text that is marked private is not kept: PRIVATE_TEXT stands in its place. What fails is kept too, with its reason.
        """
        if format not in self._versions:
            self._versions[format] = format.version()
        key = self._cache.key(data, self._versions[format])
        found = self._cache.get(key)
        if found is None:
            try:
                found = self._parser.parse(format.module, data, waiting)
            except NotStarted:
                raise
            except NotText as problem:
                self._cache.put_failure(key, problem.reason)
                raise
            found.texts = [PRIVATE_TEXT if is_marked_private(text) else text for text in found.texts]
            self._cache.put(key, found)
        return found
