"""Compare the tokenizer and chat template in an adapter's folder with those of its base.

Trainers such as TRL and Unsloth write both into the adapter's folder. edgetune uses the base's, so an adapter that was trained
in another chat format answers badly, and the user must be told why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.json_file import read_object, read_object_if_there
from edgetune.runtime.special_tokens import SpecialTokens
from edgetune.runtime.tokenizer import read_template
from edgetune.runtime.untrusted_file import TOKENIZER_CONFIG, TOKENIZER_JSON

RECORD = "own_tokenizer"
"""Key of edgetune.json under which an imported adapter keeps the differences that its source had."""
DIFFERENCES = ("chat template", "end-of-text token", "vocabulary")
"""The parts that are compared, as a notice names them."""


def difference_notice(differences: list[str]) -> tuple[str, ...]:
    """Return a notice about the parts in which an adapter's own tokenizer differs from its base's, if there are any."""
    if not differences:
        return ()
    parts = " and ".join([", ".join(differences[:-1]), differences[-1]] if differences[1:] else differences)
    return (
        f"The adapter was trained with its own {parts}, and edgetune uses the base model's: answers may be worse than in the "
        "program that it was trained with.",
    )


def differences_from_base(adapter: Path, base: Path) -> list[str]:
    """Return which of DIFFERENCES an adapter folder has in files of its own and otherwise than its base's folder.

    A file that cannot be read says nothing: edgetune does not use it.
    """
    checks = (_template, _end, _vocabulary) if adapter.is_dir() and adapter.resolve() != base.resolve() else ()
    found = []
    for part, check in zip(DIFFERENCES, checks, strict=False):
        try:
            own = check(adapter)
            if own is not None and own != check(base):
                found.append(part)
        except TokenizerError:
            continue
    return found


def _template(folder: Path) -> str | None:
    """Return a folder's chat template, without the white space at its ends."""
    template = read_template(folder)
    return None if template is None else template[0].strip()


def _end(folder: Path) -> str | None:
    """Return the spelling of a folder's end-of-text token."""
    config = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    return SpecialTokens.read(folder, config, "").spelled.get("eos_token")


def _vocabulary(folder: Path) -> set[str] | None:
    """Return the pieces and added tokens of a folder's tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        return None
    source = read_object(folder / "tokenizer.json", TOKENIZER_JSON)
    model, added = source.get("model"), source.get("added_tokens")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    pieces = vocabulary if isinstance(vocabulary, dict) else ()
    return {*pieces, *(str(token.get("content")) for token in added or () if isinstance(token, dict))}
