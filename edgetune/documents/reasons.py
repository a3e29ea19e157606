"""Lists the reasons why something was not read, as users see them."""

from __future__ import annotations

import re
from enum import StrEnum

from edgetune.documents.limits import (
    MAX_EXPORT_BYTES,
    MAX_FILE_BYTES,
    MAX_MESSAGE_CHARS,
    MAX_PARSED_BYTES,
    MAX_RECORD_CHARS,
    PARSE_SECONDS,
    PARSER_MEMORY,
)


class Reason(StrEnum):
    """A reason why something was not read. Its value is what --dry-run shows, and a key in its JSON.

    That of a reason for records (from BAD_LINE on) begins with their plural, of which `counted` makes the singular.
    """

    HIDDEN = "hidden"
    EXCLUDED = "excluded by --exclude"
    UNKNOWN_KIND = "not a note (by its suffix)"
    NOT_DOWNLOADED = "not downloaded (in iCloud or another cloud)"
    APP_SETTINGS = "settings of an app"
    OLD_VERSION = "old version kept by an app"
    TRASH = "in the trash"
    OWN_FILE = "written by edgetune"
    MODEL_FOLDER = "folder of a model, adapter or export"
    PAGE_FOLDER = "pictures and scripts of a saved web page"
    DRAWING = "drawing (Excalidraw or tldraw)"
    LINK_OUTSIDE = "link that leaves the folder"
    LINK_INSIDE = "link to something read where it lies"
    LINK_BROKEN = "broken or looping link"
    NOT_A_FILE = "neither file nor folder"
    UNREADABLE = "unreadable"
    CHANGED = "replaced by another file while notes were read"
    TOO_LARGE = f"over {MAX_FILE_BYTES >> 20} MiB"
    BINARY = "binary"
    UNKNOWN_ENCODING = "encoding not recognised (save it as UTF-8, or name it with --encoding)"
    OTHER_ENCODING = "not in the encoding that --encoding names"
    CANVAS = "canvas (a board of Obsidian's)"
    CODE = "source code (read with --code)"
    UNPARSED = "could not be parsed"
    TOO_SLOW = f"took over {PARSE_SECONDS} s to parse"
    TOO_MUCH_MEMORY = f"needs over {PARSER_MEMORY >> 30} GiB of memory to parse"
    TOO_LARGE_TO_PARSE = f"over {MAX_PARSED_BYTES >> 20} MiB, the limit of its format"
    TOO_LARGE_UNPACKED = "too large when unpacked"
    NEEDS_EXTRA = "needs the extra documents"
    ENCRYPTED = "encrypted"
    NO_TEXT = "no text (scanned?)"
    IGNORED = "excluded by .edgetuneignore"
    BEING_WRITTEN = "written within the last minute (left for the next night)"
    CONFLICT_COPY = "conflict copy of another note"
    IGNORE_UNREADABLE = "beside or below a .edgetuneignore that cannot be read"
    PRIVATE = "marked private (edgetune: false, or the tag #private)"
    EMPTY = "empty"
    NO_CHAT = "not a chat (left out by --recipe chat)"
    FORGOTTEN = "forgotten (edgetune forget)"
    DUPLICATE = "same text as another note"
    NEAR_DUPLICATE = "nearly the same text as another note"
    BAD_LINE = "lines that are not JSON"
    LONG_LINE = f"lines over {MAX_RECORD_CHARS >> 20} MiB"
    NOT_UTF8 = "lines that are not UTF-8"
    NOT_A_CHAT = "records that are neither a text nor a chat"
    UNKNOWN_ROLE = "chats with an unknown role"
    BAD_MESSAGE = "chats with a message without text"
    NOT_TEXT = "chats with images or other parts that are not text"
    OLD_TOOLS = "chats with function calls in an old form"
    NO_ANSWER = "chats without an answer"
    NOT_TRAINED = "chats whose answers are all marked as not to be trained"
    WHO_IS_ME = "chat exports in which --me does not say who you are"
    NO_ANSWER_OF_MINE = "stretches of chats in which you answer nobody"
    MEDIA = "files in chats, such as pictures and voice messages"
    NOTICE = "notices of chat apps"
    DELETED_MESSAGE = "deleted messages"
    FORWARDED = "forwarded messages"
    BOT = "messages of bots"
    TOOL_MESSAGE = "messages that are hidden, or to or from tools"
    LONG_MESSAGE = f"messages over {MAX_MESSAGE_CHARS >> 10} KiB"
    LONG_VALUE = f"chat exports with a value over {MAX_RECORD_CHARS >> 20} MiB, unread from there"
    BAD_EXPORT = "damaged places of chat exports, unread from there"
    NOT_A_CONVERSATION = "entries of chat exports that are no conversation"
    LARGE_EXPORT = f"chat exports over {MAX_EXPORT_BYTES >> 20} MiB"
    LARGE_ARCHIVE = "archives that are too large, or too full"
    BAD_ARCHIVE = "damaged or encrypted archives"

    def counted(self, count: int) -> str:
        """Return a number of things with this reason: 1 line that is not JSON, 2 lines that are not JSON, 2 empty."""
        plural = _PLURAL.match(self.value) if count == 1 and self in OF_RECORDS else None
        if plural is None:
            return f"{count:,} {self.value}"
        return f"1 {plural[1]}{'y' * (plural[2] == 'ies')}{' that is' * bool(plural[3])}{self.value[plural.end() :]}"


OF_RECORDS = frozenset(list(Reason)[list(Reason).index(Reason.BAD_LINE) :])
"""Reasons for records, which begin with their plural."""
_PLURAL = re.compile(r"(.*?\w)(ies|(?<=h)es|s)\b( that are)?")
EXPECTED = {
    Reason.BAD_LINE: "one JSON object a line, or a JSON array of objects",
    Reason.LONG_LINE: "one chat a line",
    Reason.NOT_UTF8: "a file saved as UTF-8",
    Reason.NOT_A_CHAT: (
        "messages or conversations (lists of role and content, or from and value), instruction and output, "
        "prompt and completion or response, or text"
    ),
    Reason.UNKNOWN_ROLE: "system, developer, user, human, assistant, gpt, ai, model or tool",
    Reason.BAD_MESSAGE: "a role and a text in every message",
    Reason.NOT_TEXT: "text alone",
    Reason.OLD_TOOLS: "a list of tools, tool_calls in the assistant's message, and the role tool for their results",
    Reason.NO_ANSWER: "a message of the assistant after one of the user",
    Reason.NOT_TRAINED: "an answer without weight 0 or train false",
}
"""The form that is expected, for each reason why a record of a file of chats is not read."""
