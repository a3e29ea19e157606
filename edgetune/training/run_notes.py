"""Reads a run's notes, splits off the held-out ones, and chooses those to train on.

A run that starts from an adapter trains on all notes that are new or changed since, and replays a share of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edgetune.config import DataConfig, TrainConfig
from edgetune.documents.document import Document, Reading, Skipped
from edgetune.documents.heldout import HeldOutSplit, split_held_out
from edgetune.documents.lineage import Known, Lineage, NothingNew, new_and_changed, replayed
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.home import keyed_digest
from edgetune.privacy.rules import rules
from edgetune.progress import Progress, ignore
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.errors import DataError

NO_LINEAGE = Lineage()
"""The marks of a run that starts from no adapter."""


@dataclass(frozen=True)
class ChosenNotes:
    """The notes of a run."""

    reading: Reading
    split: HeldOutSplit
    """Those to train on, and those held out."""
    lineage: Lineage
    """The marks of the adapter that the run starts from."""
    new: int
    """Documents that this adapter does not know, held-out ones included."""
    changed: int
    """Documents that have another text than it knows, held-out ones included."""
    notices: tuple[str, ...]
    """Sentences for the user about what is not trained again."""

    def with_documents(self, documents: Sequence[Document]) -> ChosenNotes:
        """Return the same notes with more documents to train on."""
        split = dataclasses.replace(self.split, train=[*self.split.train, *documents])
        return dataclasses.replace(self, split=split)


def choose_notes(
    config: TrainConfig,
    adapter: Adapter | None,
    processes: int = 1,
    progress: Progress = ignore,
    read: Callable[[Progress], Reading] | None = None,
) -> ChosenNotes:
    """Read the notes of a run that starts from `adapter`, if any, and choose what it trains on and what it holds out.

    With several processes, the adapter's marks do not count: they are keyed with a secret of this machine, so other machines
    could not make the same choice. read: as in `read_and_split`. Raises NothingNew where the settings ask for new notes and
    there is none to train on.
    """
    lineage = Lineage.of_adapter(adapter.about) if adapter is not None and processes == 1 else NO_LINEAGE
    reading, split = read_and_split(config, progress, lineage, read)
    if config.only_new and lineage.nights:
        learnt = learnt_paths(reading.documents, lineage)
        if all(document.path in learnt for document in split.train):
            raise NothingNew("The notes that changed read as before, or are among those that are held out to judge by.")
    new, changed = new_and_changed(reading.documents, lineage)
    # Private training samples from all notes: a choice among them would depend on each of them.
    if config.private is not None:
        return ChosenNotes(reading, split, lineage, new, changed, ())
    split, notices = notes_to_train(split, reading.documents, lineage, config.replay, config.data.seed)
    return ChosenNotes(reading, split, lineage, new, changed, notices)


def read_and_split(
    config: TrainConfig,
    progress: Progress = ignore,
    lineage: Lineage = NO_LINEAGE,
    read: Callable[[Progress], Reading] | None = None,
) -> tuple[Reading, HeldOutSplit]:
    """Read the notes and split off the held-out ones. This is all that --dry-run does.

    lineage: the marks of the adapter to start from. read: returns the notes in place of those on the disk.
    """
    data = config.data
    if not data.notes:
        raise DataError("No notes were named. Type the folder that holds them: edgetune train notes/")
    reading = read_notes(data.notes, data, progress) if read is None else read(progress)
    if data.recipe == "chat":
        chats = [document for document in reading.documents if document.is_chat]
        if not chats:
            raise DataError(
                f"--recipe chat found {len(reading.documents)} notes and no chats; expected .jsonl files of conversations, "
                "or exports of chat apps. Type --recipe notes for notes."
            )
        notes = [Skipped(document.path, Reason.NO_CHAT) for document in reading.documents if not document.is_chat]
        reading = dataclasses.replace(reading, documents=chats, skipped=[*reading.skipped, *notes])
    return reading, split_held_out(reading.documents, Known.among(reading.documents, lineage))


def learnt_paths(documents: Sequence[Document], lineage: Lineage) -> set[str]:
    """Return the paths of the documents whose very text an adapter with these marks has learnt."""
    unchanged = Known.among(documents, lineage).unchanged
    return {document.path for document in documents if document.digest in unchanged}


def notes_to_train(
    split: HeldOutSplit, documents: Sequence[Document], lineage: Lineage, share: float, seed: int
) -> tuple[HeldOutSplit, tuple[str, ...]]:
    """Return the split with the notes that a run trains on, and a sentence for the user where those are not all.

    documents: those that were split. share: part of the text, in bytes, that comes from notes which are learnt already. All
    notes are trained where none is new, and where none is known.
    """
    learnt = learnt_paths(documents, lineage)
    new = [document for document in split.train if document.path not in learnt]
    old = [document for document in split.train if document.path in learnt]
    if not new or not old:
        return split, ()
    wanted = sum(document.size for document in new) * share / (1 - share)
    again = {document.path for document in replayed(old, wanted, seed, lineage.nights)}
    train = [document for document in split.train if document.path not in learnt or document.path in again]
    count = f"{len(new):,} new or changed {'note' if len(new) == 1 else 'notes'}"
    sentence = f"This run trains on {count} and on {len(again):,} of the {len(old):,} that the adapter has learnt already."
    return dataclasses.replace(split, train=train), (sentence,)


def documents_digest(documents: Iterable[Document], data: DataConfig) -> str:
    """Return one digest for a set of documents, whatever their order, and for the rules by which they were masked.

    It is keyed, because adapters are given away with it.
    """
    masking = f"mask {data.mask} {rules().version}"
    return keyed_digest("\n".join([masking, *sorted(document.digest for document in documents)]))
