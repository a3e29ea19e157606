"""Reduces a note's front matter to its title and tags.

They say what the note is about, so they stay, as a heading and a line. Every other key (dates, ids, layouts) is bookkeeping
that a model would only learn to invent, so it goes.
"""

from __future__ import annotations

import re

_FRONT_CHARS = 1 << 16
"""Longest front matter that is recognised, in characters. Chosen by hand."""
_LINE_CHARS = 400
"""Characters of a line that are read for a title or a tag. Chosen by hand."""
_TITLE_CHARS, _TAG_CHARS, _TAGS = 300, 100, 50
"""Longest title and tag that are kept, in characters, and the largest number of tags. Chosen by hand."""
_BLOCK_SCALARS = {"", "|", ">", "|-", ">-", "|+", ">+"}
_YAML_LINE = re.compile(r"\s|#|- |-$|[^\s:#'\"\[\]{}|>*&!%@`,-][^:\n]{0,99}:(\s|$)|$")
_TOML_LINE = re.compile(r"\s|#|\[|\]|[A-Za-z0-9_\-.\"']{1,100}\s*=|$")
_KEY = {"---": re.compile(r"(title|tags)\s*:\s*(.*)", re.I), "+++": re.compile(r"(title|tags)\s*=\s*(.*)", re.I)}
_CLOSING = {"---": ("---", "..."), "+++": ("+++",)}
_ITEM = re.compile(r"\s*(?:-\s+)?(.*?),?\s*$")


def without_front_matter(text: str) -> str:
    """Return `text` with its YAML (`---`) or TOML (`+++`) front matter reduced to title and tags.

    The front matter is read line by line, not parsed, so that no note can make this slow. A block that is not closed within
    64 KiB, or that holds a line which is no setting (`---` may also be a ruler above prose), is left as it is.
    """
    fence = text[:3]
    if fence not in _CLOSING or text[3:4] not in ("\n", " ", "\t"):
        return text
    lines = text[:_FRONT_CHARS].split("\n")
    close = next((at for at, line in enumerate(lines) if at and line.rstrip() in _CLOSING[fence]), None)
    shape = _YAML_LINE if fence == "---" else _TOML_LINE
    if lines[0].strip() != fence or close is None or not all(shape.match(line) for line in lines[1:close]):
        return text
    body = text[sum(len(line) + 1 for line in lines[: close + 1]) :].lstrip("\n")
    title, tags = title_and_tags([line[:_LINE_CHARS] for line in lines[1:close]], fence)
    head = ""
    if title and body.split("\n", 1)[0].strip("# \t").casefold() != title.casefold():
        head += f"# {title}\n\n"
    if tags:
        head += f"Tags: {', '.join(tags)}\n\n"
    return head + body


def title_and_tags(lines: list[str], fence: str) -> tuple[str, list[str]]:
    """Return the top-level `title` and `tags` of front matter, each cut to its limit."""
    title, tags = "", []
    for at, line in enumerate(lines):
        if fence == "+++" and re.match(r"\[[\w.\[\]\- ]+\]\s*$", line):
            break  # a TOML table: the keys below belong to it
        found = _KEY[fence].match(line)
        if not found:
            continue
        value = found[2].strip()
        if found[1].lower() == "title":
            title = "" if value in _BLOCK_SCALARS else unquoted(value)[:_TITLE_CHARS]
        else:
            tags = read_list(value, lines[at + 1 :])
    return title, tags


def read_list(value: str, following: list[str]) -> list[str]:
    """Return the items of a list that is written on one line (`[a, b]` or `a, b`), or below its key with one item a line."""
    if value in ("", "["):
        items = []
        for line in following:
            if not re.match(r"\s*-\s|\s+[^-\s]", line):
                break
            items.append(_ITEM.sub(r"\1", line))
    else:
        items = value.strip("[]").split(",")
    return [item for item in (unquoted(item.strip())[:_TAG_CHARS].lstrip("#") for item in items[:_TAGS]) if item]


def unquoted(value: str) -> str:
    """Return `value` without its quotation marks; if it has none, without its comment."""
    if value[:1] in ("'", '"'):
        end = value.rfind(value[0])
        return value[1:end] if end > 0 else value[1:]
    return re.sub(r"\s+#.*", "", value)
