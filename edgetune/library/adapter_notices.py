"""Notices about an adapter that was made with another tokenizer, chat template or start token than its base has."""

from __future__ import annotations

from typing import Any

from edgetune.library import adapter_registry as registry
from edgetune.library.own_tokenizer import DIFFERENCES, RECORD, difference_notice, differences_from_base
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.tokenizer import Tokenizer


def adapter_notices(name: str | None, adapter: Adapter | None, base: Checkpoint, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return notices about the adapter that `--adapter NAME` stands for; `tokenizer` is the base's."""
    if adapter is None:
        return ()
    try:
        path = registry.find(name, base.digest)
    except AdapterError:  # an adapter inside the base's own folder
        path = None
    recorded = adapter.about.get(RECORD)
    if isinstance(recorded, list):
        differences = [part for part in DIFFERENCES if part in recorded]
    else:
        differences = [] if path is None else differences_from_base(path, base.folder)
    return (*difference_notice(differences), *_start_notice(adapter.about, tokenizer))


def _start_notice(about: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return a notice if edgetune trained the adapter on notes that began with another token than they do now.

    An adapter without a record of it is from the time when notes began with bos wherever the tokenizer names one.
    """
    if "best_step" not in about:
        return ()
    earlier = [tokenizer.bos_id] if tokenizer.bos_id is not None else tokenizer.start_ids
    if about.get("start_ids", earlier) == tokenizer.start_ids:
        return ()
    return (
        "This adapter was trained on notes that began with another token than edgetune puts before this model's texts now; "
        "train it again.",
    )
