"""Reads Markdown as Obsidian, Logseq and Joplin write it: their links become words, their bookkeeping goes.

    [[note|words]], [[note#heading]]     words, note          ![[photo.png]], ![[note]]     nothing, note
    > [!tip] Title                       > Title              %%comment%%, a block's ^id    nothing
    key:: value, ((id of a block))       key: value, nothing  :LOGBOOK: ... :END:           nothing
    [words](:/id), ![](:/id)             words, nothing       Joplin's last paragraph       nothing

Code stays as it is, and so does everything that merely resembles one of these forms: bash's `[[ -f x ]]`, `std::vector`, 100%%.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TRIGGER = re.compile(r"\[\[|\]\(:/|\(\(|%%|::|\[!\w|[ \t]\^[\w-]|^[ \t]*:LOGBOOK:|\nid: |^id: ", re.MULTILINE | re.IGNORECASE)
"""Found in every text that has one of the forms, so that most blocks are passed on as they are."""
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"(?:[ \t]*(?:>|[-*+] |\d{1,9}[.)] ))*[ \t]*(`{3,}|~{3,})(.*)")
_INDENTED = re.compile(r"(?: {4}|\t)")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?:[ \t]|$)")
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_LINK = re.compile(
    r"""(?<![A-Za-z0-9_\]\)`\\$\[])(!?)\[\[(?![\s:"'])"""  # not bash's [[ -f x ]], R's x[["name"]] or [[:alpha:]]
    r"""([^\[\]\n|]{0,300}?)(?:\\?\|([^\[\]\n]{0,300}))?(?<!\s)\]\](?![\[(\]:])"""
)
_NUMBERS = re.compile(r"[\d\s.,;+-]*")
_DATE = re.compile(r"\d{4}(?:-\d\d){0,2}|\d{6,}")
_FILE = re.compile(
    r"\.(?:png|jpe?g|gif|svg|webp|avif|bmp|heic|tiff?|pdf|mp[34]|m4[av]|mov|mkv|webm|ogv|wav|ogg|flac|3gp|"
    r"canvas|excalidraw(?:\.md)?|base|zip|docx|xlsx|pptx|csv)$",
    re.IGNORECASE,
)
_CALLOUT = re.compile(r"([ \t]*(?:>[ \t]?)+)\[!([\w-]{1,40})(?:\|[^\]\n]{0,80})?\][+-]?[ \t]*(.*)")
_COMMENT = re.compile(r"(?<!\S)%%(?=\S|[ \t]\S)[^%\n]*(?:%[^%\n]+)*%%(?![\w%])")
_COMMENT_BEGINS, _COMMENT_ENDS = re.compile(r"[ \t]*%%(?:[ \t]+\S.*)?"), re.compile(r"(?:.*\S[ \t]+|[ \t]*)%%[ \t]*")
_BLOCK_ID = re.compile(r"(?:(?<=\S)[ \t]+|^[ \t]*)\^(?=[\w-]*[A-Za-z])[A-Za-z0-9-]{3,60}[ \t]*$")
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_BLOCK_LINK = re.compile(rf"\[([^\[\]\n]{{1,300}})\]\(\(\({_UUID}\)\)\)")
_BLOCK_REF = re.compile(rf"\{{\{{embed[ ]+\(\({_UUID}\)\)[ ]*\}}\}}|\(\({_UUID}\)\)")
_EMBED = re.compile(r"\{\{embed[ ]+\[\[([^\[\]\n]{1,300})\]\][ ]*\}\}")
_PROPERTY = re.compile(r"([ \t]*(?:[-*][ \t]+)?)([A-Za-z][\w.-]{0,40})::[ \t]+(\S.*)")
_OWN_KEYS = frozenset({
    "id", "collapsed", "created-at", "updated-at", "heading", "background-color", "query-table", "query-properties",
    "query-sort-by", "query-sort-desc", "file", "file-path", "ls-type", "hl-type", "hl-page", "hl-color", "hl-stamp",
    "card-repeats", "card-last-interval", "card-ease-factor", "card-next-schedule", "card-last-reviewed",
    "card-last-score", "icon", "public", "exclude-from-graph-view",
})  # fmt: skip
"""Properties in which Logseq keeps its own state."""
_DRAWER, _DRAWER_END = re.compile(r"[ \t]*:LOGBOOK:[ \t]*", re.IGNORECASE), re.compile(r"[ \t]*:END:[ \t]*", re.IGNORECASE)
_JOPLIN_PICTURE = re.compile(r"!\[[^\[\]\n]{0,300}\]\(:/[0-9a-f]{32}(?:[ \t][^()\n]{0,100})?\)")
_JOPLIN_LINK = re.compile(r"\[([^\[\]\n]{1,300})\]\(:/[0-9a-f]{32}(?:#[^()\s]{0,200})?\)")
_JOPLIN_END = re.compile(r"(?:\A|\n)id: [0-9a-f]{32}\n(?:[a-z_]{2,40}:(?: [^\n]*)?\n)+type_: \d{1,2}\s*\Z")
_LAST_PARAGRAPH = re.compile(r"^id: [0-9a-f]{32}$", re.MULTILINE)
_LONGEST_END = 1 << 13
"""Most characters of Joplin's last paragraph. Chosen by hand: it has about 900."""
_LONGEST_LINE = 1 << 16
"""Most characters of a line in which the forms are looked for. Chosen by hand."""
_LONGEST_HELD = 1 << 16
"""Most characters of a comment or a drawer over several lines; one that is longer, or not closed, is text. Chosen by hand."""


class VaultText:
    """Filters the text of one note block by block; a block should end where a line does."""

    def __init__(self) -> None:
        self._fence = ""  # the fence of the block of code that the last line was in
        self._in_list = False
        self._blank = True  # the last line was empty, so that an indented one begins a block of code
        self._indented = False
        self._held: list[str] = []  # lines of a comment or a drawer whose end was not seen yet
        self._held_chars = 0
        self._unseen = ""  # the last block if it was passed on: its lines tell whether the next one begins in a list
        self._end = ""  # what may be Joplin's last paragraph

    def add(self, block: str) -> str:
        """Return what is to be learnt of the next block, and of what was held before."""
        block, self._end = self._end + block, ""
        if found := _LAST_PARAGRAPH.search(block, max(len(block) - _LONGEST_END, 0)):
            block, self._end = block[: found.start()], block[found.start() :]
        return self._filtered(block)

    def finish(self) -> str:
        """Return what is left to be learnt of the note's end."""
        end = "" if not self._end or _JOPLIN_END.match(self._end) else self._filtered(self._end)
        rest, self._held = "".join(self._held), []
        return end + rest

    def _filtered(self, block: str) -> str:
        for line in _LINE.findall(self._unseen):
            self._is_code(line)
        self._unseen = ""
        plain = not (self._fence or self._held or "```" in block or "~~~" in block)
        if plain and not _TRIGGER.search(block):
            self._unseen = block
            return block
        return "".join(self._lines(block))

    def _lines(self, block: str) -> Iterator[str]:
        """Yield the lines of a block that are kept."""
        for line in _LINE.findall(block):
            if self._held:
                yield from self._hold(line)
            elif self._is_code(line):
                yield line
            elif _DRAWER.fullmatch(line.rstrip("\n")) or _COMMENT_BEGINS.fullmatch(line.rstrip("\n")):
                yield from self._begin(line)
            else:
                yield _changed(line)

    def _is_code(self, line: str) -> bool:
        """Return True for a line that belongs to a block of code, or is its fence."""
        fence, blank = _FENCE.match(line.rstrip("\n")), not line.strip()
        if self._fence:
            if fence and fence[1].startswith(self._fence) and not fence[2].strip():
                self._fence = ""
            return True
        if fence and not (fence[1][0] == "`" and "`" in fence[2]):
            self._fence = fence[1]
            return True
        item, deep = bool(_ITEM.match(line)), bool(_INDENTED.match(line))
        self._indented = deep and (self._indented or (self._blank and not self._in_list)) if not blank else self._indented
        if item and not self._indented:
            self._in_list = True
        elif not blank and not line[0].isspace():
            self._in_list = False
        self._blank = blank
        return self._indented and not blank

    def _begin(self, line: str) -> Iterator[str]:
        """Hold the first line of a comment or a drawer, unless the comment ends on it."""
        without = _COMMENT.sub("", line)
        if without != line:
            yield _changed(line)
        else:
            self._held, self._held_chars = [line], len(line)

    def _hold(self, line: str) -> Iterator[str]:
        """Drop what is held at its end; give it back as text when it grows too long."""
        self._held.append(line)
        self._held_chars += len(line)
        ends = _DRAWER_END if _DRAWER.match(self._held[0]) else _COMMENT_ENDS
        if ends.fullmatch(line.rstrip("\n")):
            self._held = []
        elif self._held_chars > _LONGEST_HELD:
            yield from self._held
            self._held = []


def _changed(line: str) -> str:
    """Return a line outside of blocks of code with the forms of vaults changed; empty if only bookkeeping stood on it."""
    if len(line) > _LONGEST_LINE or not _TRIGGER.search(line):
        return line
    text, end = line.rstrip("\n"), "\n" if line.endswith("\n") else ""
    own = _PROPERTY.fullmatch(text)
    if own and own[2].lower() in _OWN_KEYS:
        return f"{own[1]}{end}" if own[1].strip() else ""
    if callout := _CALLOUT.fullmatch(text):
        text = callout[1] + (callout[3] or callout[2].capitalize())
    elif own:
        text = f"{own[1]}{own[2]}: {own[3]}"
    pieces, at = [], 0
    for span in _CODE_SPAN.finditer(text):
        pieces += [_words(text[at : span.start()]), span[0]]
        at = span.end()
    changed = "".join([*pieces, _words(text[at:])])
    changed = _BLOCK_ID.sub("", changed)
    return changed + end if changed.strip() or not text.strip() else ""


def _words(text: str) -> str:
    """Return text without code with links as their words, and without comments and references to blocks."""
    text = _COMMENT.sub("", text)
    text = _BLOCK_REF.sub("", _EMBED.sub(r"\1", _BLOCK_LINK.sub(r"\1", text)))
    return _LINK.sub(_link, _JOPLIN_LINK.sub(r"\1", _JOPLIN_PICTURE.sub("", text)))


def _link(found: re.Match[str]) -> str:
    """Return the words of a link or an embedded note; a nested list of numbers as it stands."""
    target, words = found[2].strip(), found[3]
    if not words and _NUMBERS.fullmatch(target) and not _DATE.fullmatch(target):
        return found[0]
    note, _, heading = target.partition("#")
    if found[1]:
        return "" if _FILE.search(note) else note or heading
    return (words or note or heading.lstrip("#^")).strip()
