"""Keeps what `edgetune nightly install` was told in nightly.json of edgetune's data folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.config import DataConfig, NightlyConfig, TrainConfig
from edgetune.config_file import train_config
from edgetune.home import home, private_folder
from edgetune.runtime.errors import SettingError, UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import NIGHT_RECORD
from edgetune.settings import Setting, settings_of

FILE = "nightly.json"
FORMAT = 1
"""Version of nightly.json."""
FOR_EVER = "for ever"
"""Stands in nightly.json for a pause without an end."""
OF_THE_NIGHT = ("notes", "out", "steps", "epochs", "minutes", "until", "from_adapter")
"""Settings of training that a night decides itself, so that `install` has no flags for them."""


@dataclass(frozen=True)
class Job:
    """The notes to learn from each night, the settings of training that differ from the defaults, and the time allowed."""

    notes: tuple[str, ...]
    times: NightlyConfig
    scheduler: str
    """Name of the scheduler that starts the nights."""
    installed: float
    """Seconds since 1970."""
    settings: dict[str, Any] = field(default_factory=dict)
    paused_until: float | str | None = None
    """Seconds since 1970, FOR_EVER, or None if nights are not paused."""

    def is_paused(self, now: float) -> bool:
        """Return True if no night is to begin, or to go on, at this time (seconds since 1970)."""
        return self.paused_until == FOR_EVER or (isinstance(self.paused_until, float) and now < self.paused_until)

    def train_config(self) -> TrainConfig:
        """Return the settings of training: those given to `install`, then config.toml's, then the defaults."""
        return train_config({**self.settings, "notes": self.notes})

    def save(self) -> None:
        """Write the job, readable by its owner alone. Raises ResourceError when the disk is full."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        atomic_write(path_of_job(), json.dumps(record, indent=2) + "\n")


def path_of_job() -> Path:
    """Return the path of nightly.json."""
    return home() / FILE


def nights_folder() -> Path:
    """Return the folder of the nights' records."""
    return private_folder(home() / "nights")


def load_job() -> Job:
    """Return the job. Raises UsageError if there is none, or if its file cannot be used."""
    path = path_of_job()
    if not path.exists():
        raise UsageError("No nights are installed here. Type for example: edgetune nightly install notes/")
    record = read_object(path, NIGHT_RECORD)
    try:
        if record.pop("format") != FORMAT:
            raise ValueError
        times, settings = record.pop("times"), record.pop("settings")
        job = Job(**record, times=NightlyConfig(**times), settings=_checked(settings))
        notes, paused = DataConfig(notes=job.notes).notes, job.paused_until
        if not notes or not isinstance(job.installed, float) or not isinstance(job.scheduler, str):
            raise ValueError
        if not (paused is None or paused == FOR_EVER or isinstance(paused, float)):
            raise ValueError
    except (KeyError, TypeError, ValueError, SettingError) as error:
        raise UsageError(
            f"{path} is damaged or was written by another version of edgetune. Type `edgetune nightly install` again, with "
            "your folder of notes."
        ) from error
    return dataclasses.replace(job, notes=notes)


def training_settings() -> list[Setting]:
    """Return the settings of training that can be given to `install`."""
    declared = [*settings_of(TrainConfig), *settings_of(DataConfig)]
    return [setting for setting in declared if setting.flag and setting.name not in OF_THE_NIGHT]


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the stored settings of training in the form that their fields hold. Raises KeyError or SettingError."""
    declared = {setting.name: setting for setting in training_settings()}
    return {name: declared[name].checked(value, name) for name, value in dict(settings).items()}
