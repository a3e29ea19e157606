"""Writes text for people: untrusted text made safe for a terminal, and sizes and times in units that one can picture."""

from __future__ import annotations

from pathlib import Path

from edgetune.runtime.encrypted_file import is_encrypted

BITS_PER_BYTE = "lower is better; measured on notes the model has not seen"
"""Explains held-out bits per byte wherever a reader meets the term first."""

# Characters that move a terminal's cursor, start its escape sequences or turn its writing direction, with what is shown in
# their place. Each character is replaced on its own, so that a stream cut anywhere is as safe as the whole.
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROLS[ord("\r")] = ""  # part of a line end in text from Windows; alone it would overwrite the line
_CONTROLS[0x7F] = "\u2421"
_INVISIBLE = [*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_REPLACEMENTS = _CONTROLS | dict.fromkeys(_INVISIBLE, "\ufffd")

NAME_SHOWN = 200
"""Characters of a name that an error quotes. Chosen by hand."""


def sanitize(text: str) -> str:
    """Return `text` with no power over a terminal: control characters, except newline and tab, become visible signs.

    C1 controls, bidirectional embeddings, overrides and isolates, line separators and lone surrogates are replaced too. Each
    character is treated on its own: `sanitize(a + b) == sanitize(a) + sanitize(b)`.
    """
    return text.translate(_REPLACEMENTS)


def one_line(text: str) -> str:
    """Return a name fit for the middle of a sentence: sanitized, its line ends and tabs replaced by spaces."""
    return sanitize(text).replace("\n", " ").replace("\t", " ")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s unless there is one: 1 step, 2,000 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def human_bytes(count: float) -> str:
    """Return a number of bytes in decimal units with three digits: 912 B, 31.4 MB, 1.06 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    digits = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f} {unit}"


def human_time(seconds: float) -> str:
    """Return a duration in its two largest units: 0.4 s, 42 s, 3 min 05 s, 2 h 14 min, 1 d 3 h."""
    if seconds != seconds or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def place_of_report(path: str) -> str:
    """Return where a run's report is or, if it is encrypted, what to type to read it."""
    hidden = Path(path).is_file() and is_encrypted(Path(path))
    return "encrypted; to read it, type edgetune report --out report.html" if hidden else one_line(path)
