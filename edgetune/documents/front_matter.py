"""Reduces a note's front matter to its title and tags.

They say what the note is about, so they stay, as a heading and a line. Every other key (dates, ids, layouts) is bookkeeping
that a model would only learn to invent, so it goes.

Text between two rulers is not front matter, and is kept. The rule: a block between `---` and `---` (or `...`) at the very top
is front matter if it is a YAML mapping and at least one of its keys is one that programs for notes and blogs write (KEYS). A
diary whose lines begin with `Monday:` has no such key. A block between `+++` and `+++` is front matter if it is TOML.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import Any

import yaml

from edgetune.documents.limits import (
    MAX_FRONT_MATTER_CHARS,
    MAX_TAG,
    MAX_TAGS,
    MAX_TITLE,
    MAX_TOML_DOTS,
    MAX_YAML_DEPTH,
    MAX_YAML_NODES,
)

KEYS = frozenset(
    {"title", "Title", "TITLE", "subtitle", "tag", "tags", "Tags", "TAGS", "alias", "aliases", "Aliases", "date", "created"}
    | {"created_at", "created-at", "date-created", "modified", "modified_at", "date-modified", "updated", "updated_at"}
    | {"updated-at", "last-modified", "lastmod", "published", "published_at", "pubdate", "id", "uid", "uuid", "guid", "slug"}
    | {"url", "permalink", "layout", "draft", "publish", "author", "authors", "category", "categories", "keywords", "lang"}
    | {"cssclass", "cssclasses", "sidebar_position", "sidebar_label", "toc", "excerpt", "redirect_from", "markup", "jupyter"}
    | {
        "bibliography",
        "kanban-plugin",
        "excalidraw-plugin",
        "tldraw-file",
        "dg-publish",
        "zotero-key",
        "citekey",
        "doi",
        "edgetune",
        "isbn",
    }
)
"""Keys by which YAML front matter is recognised. Capitals make a difference: a diary may well begin with `Date:`."""
DRAWING_KEYS = frozenset({"excalidraw-plugin", "tldraw-file"})
"""Keys that say that the note is a drawing, whose text is compressed data."""
FENCES = ("---", "+++")
"""Beginnings of front matter: of YAML, and of TOML."""
_NO = frozenset({"false", "no", "off", "0", "never"})
"""Values of the key edgetune, in any capitals, that keep a note out of training."""
_NULL = "tag:yaml.org,2002:null"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE = re.compile(r"^([^\s:#'\"\[\]{}|>*&!%@`,-][^:\n]{0,99}:[ \t]+)([^'\"\s][^\n]*)$", re.MULTILINE)


@dataclass(frozen=True)
class FrontMatter:
    """The title and tags that front matter gives a note, all its keys, and the text below it."""

    title: str
    tags: tuple[str, ...]
    keys: frozenset[str]
    body: str
    opted_out: bool = False
    """True if it says `edgetune: false`."""

    @property
    def is_drawing(self) -> bool:
        """Return True if the note is a drawing of Excalidraw's or tldraw's."""
        return bool(self.keys & DRAWING_KEYS)

    def reduced(self) -> str:
        """Return the note with its title as a heading and its tags as a line."""
        head = ""
        if self.title and self.body.split("\n", 1)[0].strip("# \t").casefold() != self.title.casefold():
            head += f"# {self.title}\n\n"
        if self.tags:
            separator = "; " if any("," in tag for tag in self.tags) else ", "
            head += f"Tags: {separator.join(self.tags)}\n\n"
        return head + self.body


def split_front_matter(text: str) -> FrontMatter | None:
    """Return the front matter at the beginning of `text`, or None if there is none. See this module's docstring."""
    fence = text[:3]
    if fence not in FENCES or text[3:4] not in ("\n", " ", "\t"):
        return None
    lines = text[:MAX_FRONT_MATTER_CHARS].split("\n")
    ends = ("---", "...") if fence == "---" else ("+++",)
    close = next((at for at, line in enumerate(lines) if at and line.rstrip() in ends), None)
    if lines[0].strip() != fence or close is None:
        return None
    inside = "\n".join(lines[1:close])
    values = yaml_values(inside) if fence == "---" else toml_values(inside)
    if values is None:
        return None
    body = text[sum(len(line) + 1 for line in lines[: close + 1]) :].lstrip("\n")
    opted_out = str(values.get("edgetune")).strip().lower() in _NO
    return FrontMatter(
        title_of(values.get("title")), tags_of(values.get("tags") or values.get("tag")), frozenset(values), body, opted_out
    )


def title_of(value: Any) -> str:
    """Return a title on one line, cut to its limit; empty if the value is no text."""
    return " ".join(value.split())[:MAX_TITLE] if isinstance(value, str) else ""


def tags_of(value: Any) -> tuple[str, ...]:
    """Return the tags in a list, or in a text with commas between them, each cut to its limit."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    tags = (" ".join(item.split()).lstrip("#")[:MAX_TAG] for item in items[:MAX_TAGS] if isinstance(item, str))
    return tuple(tag for tag in tags if tag)


def yaml_values(text: str) -> dict[str, Any] | None:
    """Return the keys of a YAML mapping, made lower case, each with its text or list of texts (None for anything else).

    Return None if the text is no mapping, or has none of KEYS. Nothing is constructed from the values: a date or a huge
    number stays the text that it is, and a tag such as `!python/object` means nothing.
    """
    if not text.strip():
        return {}
    # A title may hold a colon, or begin with a sign that means something in YAML: try once more with such values quoted.
    for attempt in (text, _LINE.sub(lambda line: line[1] + quoted(line[2].rstrip()), text)):
        try:
            root = bounded_root(attempt)
            break
        except (yaml.YAMLError, ValueError, RecursionError):
            root = None
    if not isinstance(root, yaml.MappingNode):
        return {} if root is None and _only_comments(text) else None
    values = {key.value: plain(value) for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    return {key.lower(): value for key, value in values.items()} if values.keys() & KEYS else None


def bounded_root(text: str) -> yaml.Node | None:
    """Return the root node of a YAML document. Raises ValueError for one that is too large or too deep."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if count > MAX_YAML_NODES or depth > MAX_YAML_DEPTH:
            raise ValueError("too large or too deep")
    root: yaml.Node | None = yaml.compose(text, Loader=_LOADER)
    return root


def plain(node: yaml.Node) -> str | list[str] | None:
    """Return a node's text or the texts in its list; None for null and for a mapping."""
    if isinstance(node, yaml.SequenceNode):  # only its own texts: aliases may nest lists without end
        return [text for text in map(_scalar, node.value) if text is not None]
    return _scalar(node)


def toml_values(text: str) -> dict[str, Any] | None:
    """Return the top-level keys of a TOML document and their values, or None if the text is not TOML."""
    if text.count(".") + text.count("[") + text.count("{") > MAX_TOML_DOTS:
        return None
    try:
        return {key.lower(): value for key, value in tomllib.loads(text).items()}
    except (ValueError, RecursionError):
        return None


def quoted(value: str) -> str:
    """Return a value of YAML in quotation marks. A list stays a list, with its tags' number signs quoted."""
    if value.startswith("[") and value.endswith("]"):
        return (
            "[" + ", ".join(quoted(item.strip()) if item.strip()[:1] == "#" else item for item in value[1:-1].split(",")) + "]"
        )
    return "'" + value.replace("'", "''") + "'"


def _scalar(node: yaml.Node) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) and node.tag != _NULL else None


def _only_comments(text: str) -> bool:
    return all(line.strip()[:1] in ("", "#") for line in text.split("\n"))
