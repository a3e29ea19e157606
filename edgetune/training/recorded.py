"""Records a run for the ledger, and says what a run that is repeated from it takes over instead of finding it out anew.

A repeated run reads the notes of the record without the forgotten ones, and splits, chooses, tokenizes, plans, trains and
judges as any run does. What depended on the machine at the time is taken from the record: the memory setting, the form of the
weights, the threads, and where a deadline ended the run and the questions for its anchor.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.config import DataConfig, TrainConfig
from edgetune.documents.document import Document, Reading
from edgetune.documents.heldout import HeldOutSplit
from edgetune.home import expand
from edgetune.library import adapter_registry as registry
from edgetune.library import ledger
from edgetune.library.ledger import Cut, Entry, SeenNote, Side
from edgetune.memory_settings import Choice
from edgetune.progress import Progress
from edgetune.runtime import budget, peft_folder
from edgetune.runtime.budget import Setting, Stored, WeightForm
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import explain_full_disk, private_file, sha256_file

OUTSIDE = "(outside)"
"""Stands for an adapter outside edgetune's own folder, since the name of its folder might tell whose it is."""
TEXTS_FILE = "ledger.notes"
"""File of the unfinished run's folder that holds the texts that were not in the ledger when it began."""


@dataclass(frozen=True)
class Recorded:
    """The part of a run's record that a run which repeats it takes over."""

    run: str
    read: Callable[[Progress], Reading]
    """Returns the notes that the run read, without those that are forgotten."""
    setting: Setting
    weights: WeightForm
    threads: int
    published_scores: int
    asked: int | None
    """Questions for the anchor after which a deadline ended them; None for all that the run could afford."""
    cut: Cut | None
    rival: Path | None
    """The adapter that it is compared with."""
    ended: float
    key: str
    """Stands for the record and for what is forgotten: 16 hexadecimal digits."""

    def choice(self, model: LlamaConfig, lora: LoraConfig, forms: list[Stored], dtype: torch.dtype, device: str) -> Choice:
        """Return the memory setting of the record, and the memory that it takes. Without the form, the best one is taken."""
        stored = next((form for form in forms if form.form is self.weights), forms[0])
        return Choice(self.setting, budget.parts(model, lora, stored, self.setting, dtype, 0, device), stored)


def begin_entry(
    config: TrainConfig, base: str, model: str, plan: Mapping[str, Any], run: str, processes: int, reading: Reading,
    split: HeldOutSplit, folder: Path,
) -> None:  # fmt: skip
    """Write the run's entry so far, and the texts that the ledger does not have, to the unfinished run's folder."""
    ids = ledger.ids_of(reading.everything)
    trained = {document.path for document in split.train}
    used = {document.path for document in reading.documents}
    notes = []
    for document, name, words in zip(reading.everything, ids, ledger.words_of(reading.everything), strict=True):
        source = next(iter(reading.sources.get(document.path, ())), document.path)
        side = _side(document, split, trained, used)
        notes.append(SeenNote(name, words, document.path, reading.places.get(source, ""), side))
    entry = Entry(
        run=run,
        base=base,
        model=model,
        config=_config_as_dict(config, base),
        plan=dict(plan),
        torch=torch.__version__,
        processes=processes,
        parent=name_of(config.from_adapter, base),
        notes=tuple(notes),
    )
    texts = folder / TEXTS_FILE
    texts.unlink(missing_ok=True)
    with explain_full_disk(texts), private_file(texts) as file:
        ledger.write_texts(file, reading.everything, ids, ledger.known_ids())
    entry.save(folder / ledger.UNFINISHED_RECORD)


def finish_entry(
    folder: Path, adapter: Path, cut: Cut | None, rival: Path | None, promoted: bool, seconds: float, ended: float | None
) -> Entry | None:
    """Add the finished run to the ledger and return its entry; None if it has none (--out, or its record is damaged)."""
    entry = Entry.load(folder / ledger.UNFINISHED_RECORD)
    if entry is None:
        return None
    entry = dataclasses.replace(
        entry,
        adapter=sha256_file(adapter / peft_folder.WEIGHTS_FILE),
        cut=cut,
        rival=None if rival is None else name_of(str(rival), entry.base),
        promoted=promoted,
        seconds=seconds,
        ended=time.time() if ended is None else ended,
    )
    ledger.keep(entry, folder / TEXTS_FILE)
    return entry


def gone_notice(config: TrainConfig, base: str, reading: Reading) -> tuple[str, ...]:
    """Return a sentence for the user where notes are gone that the adapter to start from has learnt."""
    parent = name_of(config.from_adapter, base)
    path = ledger.ledger_folder() / f"{parent}{ledger.RECORD}"
    entry = Entry.load(path) if parent not in (None, OUTSIDE) and path.exists() else None
    if entry is None or entry.base != base or set(entry.config["data"]["notes"]) != set(_folders(config)):
        return ()
    words, files = set(ledger.words_of(reading.everything)), set(reading.places.values())
    learnt = (note for note in entry.notes if note.side in (Side.TRAINED, Side.CUT, Side.LEARNT))
    gone = sum(note.words not in words and note.file not in files for note in learnt)
    if not gone:
        return ()
    notes = "1 note that the adapter has learnt is" if gone == 1 else f"{gone:,} notes that the adapter has learnt are"
    return (f"{notes} gone or excluded, and not trained again. To make it forget them, type: edgetune forget --gone",)


def name_of(adapter: str | None, base: str) -> str | None:
    """Return the name of the adapter that `--from` names; None for none."""
    if adapter is None:
        return None
    try:
        path = registry.find(adapter, base)
    except AdapterError:  # it was there when the run began
        return OUTSIDE
    inside = path is not None and path.resolve().parent == registry.adapters_folder(base).resolve()
    return None if path is None else path.name if inside else OUTSIDE


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Return the settings that an entry holds. Raises SettingError or TypeError for what no run could use."""
    return TrainConfig(**{**values, "data": DataConfig(**values["data"])})


def _config_as_dict(config: TrainConfig, base: str) -> dict[str, Any]:
    """Return all settings, JSON-ready, with absolute paths and without a deadline."""
    values = dataclasses.asdict(config)
    values["data"]["notes"] = _folders(config)
    if config.from_adapter is not None:
        path = registry.find(config.from_adapter, base)
        values["from_adapter"] = registry.NONE if path is None else str(path.absolute())
    return {**values, "minutes": None, "until": None}


def _folders(config: TrainConfig) -> list[str]:
    """Return the absolute paths of the notes that were named."""
    return [os.path.abspath(expand(path)) for path in config.data.notes]


def _side(document: Document, split: HeldOutSplit, trained: set[str], used: set[str]) -> Side:
    cut = split.cuts.get(document.digest)
    if document.path not in used:
        return Side.REPEAT
    if cut is not None:
        return Side.CUT if cut else Side.HELD_OUT
    return Side.TRAINED if document.path in trained else Side.LEARNT
