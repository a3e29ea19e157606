"""Lists, describes and deletes the adapters on this machine, and follows each back to the adapters that it was trained from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edgetune.home import home
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger
from edgetune.reports.text import NAME_SHOWN
from edgetune.reports.verdicts import promise
from edgetune.runtime import peft_folder
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG

LEAKS, AUDIT = "leaks", "audit"
"""Keys of edgetune.json: figures of the leaks that training measured, and of those that the latest `edgetune audit` did."""


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter kept on this machine. What its training did not record is None.

    base, base_name: digest (its first 12 digits) and name of the base model. created: local time. parent: name of the adapter
    that its training started from. compared_with: name of the adapter that was the current one then. verdict, reason: the
    decision about it (library/gate.py). data, configuration: digests of the notes and of the settings. private: what private
    training promises and has spent, in words. leaks, audit: the figures of LEAKS and AUDIT, by name.
    """

    name: str
    path: str
    base: str
    base_name: str | None
    created: str
    current: bool
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    bytes: int
    heldout_bits_per_byte_before: float | None
    heldout_bits_per_byte_after: float | None
    parent: str | None
    compared_with: str | None
    verdict: str | None
    reason: str | None
    data: str | None
    configuration: str | None
    leaks: dict[str, float]
    audit: dict[str, float]
    private: str | None


def list_adapters() -> list[KeptAdapter]:
    """Return all adapters on this machine, by base model, oldest name first. Folders that are no adapters are left out."""
    found = []
    for folder in (adapter for parent in sorted((home() / "adapters").glob("*")) for adapter in sorted(parent.glob("[!.]*"))):
        with contextlib.suppress(AdapterError):
            found.append(describe(folder))
    return found


def describe(folder: Path) -> KeptAdapter:
    """Return what an adapter's own files say about it, without reading its tensors. Raises AdapterError for other folders."""
    adapter = peft_folder.load_config(folder)
    config, about = adapter.config, adapter.about
    scores = [about.get(f"heldout_bits_per_byte_{when}") for when in ("before", "after")]
    before, after = (_score(score) for score in scores)
    changed = (folder / peft_folder.CONFIG_FILE).stat().st_mtime
    return KeptAdapter(
        name=folder.name,
        path=str(folder),
        base=folder.parent.name,
        base_name=_text(read_object(folder / peft_folder.CONFIG_FILE, ADAPTER_CONFIG).get("base_model_name_or_path")),
        created=datetime.fromtimestamp(changed).isoformat(sep=" ", timespec="minutes"),
        current=is_current(folder),
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        layers=adapter.layers,
        bytes=sum(file.lstat().st_size for file in folder.iterdir()),
        heldout_bits_per_byte_before=before,
        heldout_bits_per_byte_after=after,
        private=promise(about.get("private")),
        **{name: _text(about.get(name)) for name in ("parent", "compared_with", "verdict", "reason", "data", "configuration")},
        leaks=_figures(about.get(LEAKS)),
        audit=_figures(about.get(AUDIT)),
    )


def is_current(folder: Path) -> bool:
    """Return True if an adapter of edgetune's own folder is the current one of its base."""
    current = registry.current_in(folder.parent)
    return current is not None and current.adapter == folder.resolve()


def is_in_use(adapter: Path) -> bool:
    """Return True if an adapter, wherever its folder lies, is the current one of any base model."""
    found = (registry.current_in(folder) for folder in (home() / "adapters").glob("*"))
    return any(current is not None and current.adapter == adapter.resolve() for current in found)


def ancestors(adapter: KeptAdapter) -> list[KeptAdapter]:
    """Return the adapters that one was trained from, its parent first, as far back as they are on this machine."""
    chain: list[KeptAdapter] = []
    seen = {adapter.name}
    while adapter.parent is not None and adapter.parent not in seen:
        folder = registry.kept_folder(adapter.parent, adapter.base)
        if folder is None or not registry.is_adapter(folder):
            break
        adapter = describe(folder)
        seen.add(adapter.name)
        chain.append(adapter)
    return chain


def delete(folder: Path) -> None:
    """Delete an adapter, and what the ledger has of its run unless another adapter descends from it.

    Raises AdapterError for the current one of its base.
    """
    if is_current(folder):
        raise AdapterError(
            f"The adapter {folder.name} is the current one. Go back to the one before it with `edgetune adapters rollback`, or "
            "make another one current with `edgetune adapters promote NAME`, and then delete it."
        )
    shutil.rmtree(folder)
    ledger.tidy()


def record_audit(folder: Path, figures: Mapping[str, float]) -> None:
    """Write the figures of an audit into an adapter's edgetune.json, in place of those of an earlier one."""
    about = peft_folder.load_config(folder).about
    text = json.dumps({**about, AUDIT: dict(figures)}, indent=2, sort_keys=True, allow_nan=False)
    atomic_write(folder / peft_folder.EDGETUNE_FILE, text + "\n")


def _figures(found: object) -> dict[str, float]:
    """Return the figures in an adapter's edgetune.json, which anybody may have written: the numbers, by short names."""
    items = found.items() if isinstance(found, dict) else ()
    scores = {name: _score(value) for name, value in items if len(name) <= NAME_SHOWN and not isinstance(value, bool)}
    return {name: value for name, value in scores.items() if value is not None}


def _score(found: object) -> float | None:
    """Return a figure measured by training, from edgetune.json; None for anything that cannot be a measurement."""
    return float(found) if isinstance(found, int | float) and abs(found) < 1e9 else None


def _text(found: object) -> str | None:
    """Return a text from an adapter's files, which anybody may have written; None for anything else and for a long one."""
    return found if isinstance(found, str) and len(found) <= 4 * NAME_SHOWN else None
