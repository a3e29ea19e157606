"""Opens the zip files that DOCX, ODT and EPUB are, within limits on members and on unpacked size."""

from __future__ import annotations

import io
import zipfile

from edgetune.documents.encoding import NotText
from edgetune.documents.limits import MAX_UNPACKED_BYTES, MAX_ZIP_MEMBERS
from edgetune.documents.reasons import Reason

_ENCRYPTED = 1
"""Bit of a member's flags that says that it is encrypted."""


class Package:
    """A zip file in memory. Members are never written anywhere, and an archive inside it is never opened."""

    def __init__(self, data: bytes) -> None:
        """Read the list of members. Raises NotText for what is no zip file, encrypted, or too large when unpacked.

        zipfile never unpacks more of a member than its declared size, so that the declared sizes bound all work.
        """
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            raise NotText(Reason.UNPARSED) from None
        members = self._zip.infolist()
        if len(members) > MAX_ZIP_MEMBERS or sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
            raise NotText(Reason.TOO_LARGE_UNPACKED)
        if any(member.flag_bits & _ENCRYPTED for member in members):
            raise NotText(Reason.ENCRYPTED)
        self.names = frozenset(member.filename for member in members)

    def read(self, name: str) -> bytes:
        """Return the bytes of a member. Raises NotText if there is none of this name."""
        if name not in self.names:
            raise NotText(Reason.UNPARSED)
        return self._zip.read(name)
