"""What one night has settled before it trains, kept until the night has ended: a killed night goes on with the same."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from edgetune.config import TrainConfig
from edgetune.documents.reasons import Reason
from edgetune.nights.job import Job, nights_folder
from edgetune.nights.vault import PENDING
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import NIGHT_RECORD

FILE = "tonight.json"


@dataclass
class Tonight:
    """The choices of one night."""

    night: str
    parent: str | None
    """Folder of the adapter that training starts from."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Absolute paths of notes that are not read tonight, each with its reason."""
    steps: int | None = None
    """Steps that fit into the time allowed; None: as many as the settings say."""
    only_new: bool = True
    """False for a trial, which trains although nothing may be new."""
    begun: bool = False
    """True once training has begun, so that it is to be resumed."""
    run: str = ""
    """Name of the run, once it has started, and so of the adapter that it will write."""

    def save(self) -> None:
        """Write the choices, readable by their owner alone. Raises ResourceError when the disk is full."""
        atomic_write(nights_folder() / FILE, json.dumps(dataclasses.asdict(self)) + "\n")

    def config(self, job: Job, minutes: float | None = None) -> TrainConfig:
        """Return the settings of tonight's training, which stops after so many minutes. They name the same run every time."""
        config = job.train_config()
        if self.steps is not None:
            config = dataclasses.replace(config, steps=self.steps, epochs=None)
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, left_out=self.left_out),
            out=None,
            minutes=minutes,
            until=None,
            from_adapter=self.parent,
            only_new=self.only_new,
        )


def load_tonight() -> Tonight | None:
    """Return the choices of the night that has not ended, or None if there is none or the file is damaged."""
    path = nights_folder() / FILE
    if not path.exists():
        return None
    try:
        found = Tonight(**read_object(path, NIGHT_RECORD))
    except (UsageError, TypeError):
        return None
    pairs: list[Any] = found.left_out if isinstance(found.left_out, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and pair[1] in list(Reason) for pair in pairs):
        return None
    found.left_out = tuple((str(path), str(why)) for path, why in pairs)
    texts = isinstance(found.night, str) and isinstance(found.parent, str | None) and isinstance(found.run, str)
    switches = isinstance(found.begun, bool) and isinstance(found.only_new, bool)
    return found if texts and switches and isinstance(found.steps, int | None) else None


def forget_tonight() -> None:
    """Delete the choices of the night that has ended, and what it would have remembered of the notes."""
    for name in (FILE, PENDING):
        (nights_folder() / name).unlink(missing_ok=True)
