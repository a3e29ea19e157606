"""The table of limits for notes and chats, which may be hostile. All are chosen by hand, far above what people write."""

MAX_FILE_BYTES = 256 << 20
"""Largest file that is read, in bytes."""
MAX_RECORD_CHARS = 4 << 20
"""Longest line or value of a file of chats, in characters."""
MAX_BROKEN_VALUES = 1000
"""Most broken values over several lines before the rest of a file of chats is left unread."""

MAX_EXPORT_BYTES = 1 << 30
"""Largest export of a chat app that is read, in bytes, also as a member of an archive. It is read value by value."""
MAX_ARCHIVE_BYTES, MAX_UNPACKED_EXPORT_BYTES = (1 << 32) - 1, 2 << 30
"""Largest .zip that is looked into, and most bytes of its members that are unpacked in all. An archive may hold pictures, which
are never unpacked."""
MAX_ARCHIVE_MEMBERS, MAX_ARCHIVE_DIRECTORY_BYTES = (1 << 16) - 2, 32 << 20
"""Most members of an archive, and largest list of them in bytes. Python holds about 500 bytes for each."""
MAX_MESSAGE_CHARS = 1 << 18
"""Longest message of a text export, in characters. WhatsApp allows 65,536."""
MAX_SESSION_MESSAGES, MAX_SESSION_CHARS = 512, 1 << 16
"""Messages and characters after which a conversation goes on as another document, however short its silences are."""
MAX_IGNORE_BYTES = 1 << 16
"""Largest .edgetuneignore that is read, in bytes."""

MAX_FRONT_MATTER_CHARS = 1 << 15
"""Longest front matter that is parsed, in characters."""
MAX_YAML_NODES, MAX_YAML_DEPTH = 5000, 30
"""Largest number of YAML nodes, and the deepest nesting. Aliases are never expanded, so they cannot multiply."""
MAX_TOML_DOTS = 300
"""Largest number of dots and brackets in TOML, each of which may open a table."""
MAX_TITLE, MAX_TAG, MAX_TAGS = 300, 100, 50
"""Longest title and tag that are kept, in characters, and the largest number of tags."""

BLOCK_BYTES = 1 << 20
"""Bytes of a text that are read, decoded or hashed at a time."""

MAX_PARSED_BYTES = 128 << 20
"""Largest file that is handed to a parser, in bytes."""
MAX_UNPACKED_BYTES, MAX_ZIP_MEMBERS = 256 << 20, 10_000
"""Largest size of a zip file's members when unpacked, in bytes, and their largest number."""
MAX_TEXT_BYTES = 64 << 20
"""Most text that a parser may return for a file, in bytes of UTF-8 as JSON."""
MAX_PDF_PAGES, MAX_MAIL_PARTS, MAX_SPACES = 10_000, 1000, 1000
"""Most pages of a PDF, parts of a message, and spaces that one element of an ODT may stand for."""
PARSE_SECONDS, PARSER_MEMORY, PARSER_FILES = 60, 2 << 30, 64
"""Longest time for a file in seconds, largest address space in bytes beyond that at the start, and most open files of the
process that parses."""
