"""A folder of notes and chats becomes Documents: in a stable order, each text once, every skip accounted for."""

from edgetune.documents.document import Document, Reading, Reason, Skipped, Turn
from edgetune.documents.reading import MAX_FILE_BYTES, read_notes
from edgetune.documents.walk import CHAT_SUFFIXES, NOTE_SUFFIXES

__all__ = [
    "CHAT_SUFFIXES",
    "MAX_FILE_BYTES",
    "NOTE_SUFFIXES",
    "Document",
    "Reading",
    "Reason",
    "Skipped",
    "Turn",
    "read_notes",
]
