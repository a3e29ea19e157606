"""What one night has settled before it trains, kept until the night has ended: a killed night goes on with the same."""

from __future__ import annotations

import dataclasses
import glob
import json
from dataclasses import dataclass

from edgetune.config import TrainConfig
from edgetune.nights.job import Job, nights_folder
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
    left_out: tuple[str, ...] = ()
    """Absolute paths of notes that are not read tonight."""
    steps: int | None = None
    """Steps that fit into the time allowed; None: as many as the settings say."""
    begun: bool = False
    """True once training has begun, so that it is to be resumed."""

    def save(self) -> None:
        """Write the choices, readable by their owner alone. Raises ResourceError when the disk is full."""
        atomic_write(nights_folder() / FILE, json.dumps(dataclasses.asdict(self)) + "\n")

    def config(self, job: Job, minutes: float | None = None) -> TrainConfig:
        """Return the settings of tonight's training, which stops after so many minutes. They name the same run every time."""
        config = job.train_config()
        # An absolute path with its wildcards escaped is a pattern that leaves out this one file.
        exclude = (*config.data.exclude, *(glob.escape(path) for path in self.left_out))
        if self.steps is not None:
            config = dataclasses.replace(config, steps=self.steps, epochs=None)
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, exclude=exclude),
            out=None,
            minutes=minutes,
            until=None,
            from_adapter=self.parent,
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
    found.left_out = tuple(map(str, found.left_out)) if isinstance(found.left_out, list) else ()
    texts = isinstance(found.night, str) and isinstance(found.parent, str | None)
    return found if texts and isinstance(found.steps, int | None) and isinstance(found.begun, bool) else None


def forget_tonight() -> None:
    """Delete the choices of the night that has ended."""
    (nights_folder() / FILE).unlink(missing_ok=True)
