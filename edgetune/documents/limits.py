"""The table of limits for notes and chats, which may be hostile. All are chosen by hand, far above what people write."""

MAX_FILE_BYTES = 256 << 20
"""Largest file that is read, in bytes."""
MAX_RECORD_CHARS = 4 << 20
"""Longest line or value of a file of chats, in characters."""
MAX_BROKEN_VALUES = 1000
"""Most broken values over several lines before the rest of a file of chats is left unread."""

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
