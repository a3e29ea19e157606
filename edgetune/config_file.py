"""Settings of training from the command line and from config.toml: a flag overrides a line, which overrides the default.

`$EDGETUNE_HOME/config.toml` may hold a `[train]` table with any field of TrainConfig or DataConfig by its name.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from edgetune.config import DataConfig, TrainConfig
from edgetune.home import home
from edgetune.runtime.errors import SettingError, UsageError
from edgetune.runtime.untrusted_file import SETTINGS_FILE, read_untrusted
from edgetune.settings import Setting, as_toml, settings_of, shown

CONFIG_FILE = "config.toml"


def train_config(flags: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run from defaults, config.toml and `flags` (those given, by field name), later ones winning."""
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    stored = _from_file()
    for name, other in (("steps", "epochs"), ("epochs", "steps")):  # a flag also overrides a line that it would contradict
        if name in given and other not in given:
            stored.pop(other, None)
    return _configuration({**stored, **given})


def _configuration(values: dict[str, Any]) -> TrainConfig:
    data_names = {declared.name for declared in settings_of(DataConfig)}
    data = {name: value for name, value in values.items() if name in data_names}
    return TrainConfig(DataConfig(**data), **{name: value for name, value in values.items() if name not in data_names})


def _from_file() -> dict[str, Any]:
    """Return the [train] table of config.toml, checked as flags are; empty if there is no such file.

    Raises UsageError, which names the file, for a file that is not TOML, an unknown setting, and a value that is not taken.
    """
    path = home() / CONFIG_FILE
    if not os.path.lexists(path):
        return {}
    try:
        content = tomllib.loads(read_untrusted(path, SETTINGS_FILE).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        fault = "its brackets are nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UsageError(f"{path} is not valid TOML in UTF-8 ({fault}). Correct it or delete it.") from error
    table = content.get("train", {})
    if not isinstance(table, dict):
        raise UsageError(f"In {path}, train is no table; expected a line [train], and settings of training below it.")
    if strangers := [name for name in content if name != "train"]:
        raise UsageError(
            f"{path} holds {shown(strangers[0])} outside of its table [train]; expected only that table. Put settings of "
            "training below a line [train], and delete the rest."
        )
    declared = {found.name: found for owner in (TrainConfig, DataConfig) for found in settings_of(owner)}
    values = {name: _line(path, declared, name, value) for name, value in table.items()}
    try:
        _configuration(values)
    except SettingError as error:  # two lines that exclude each other
        raise UsageError(f"{path} cannot be used. {error}") from error
    return values


def _line(path: Path, declared: dict[str, Setting], name: str, value: Any) -> Any:
    """Return the value of one line of config.toml, checked. Raises UsageError."""
    if name not in declared:
        called = {found.flag.lstrip("-").replace("-", "_"): found.name for found in declared.values() if found.flag}
        near = difflib.get_close_matches(name.replace("-", "_"), [*declared, *called], n=1)
        advice = f"did you mean {called.get(near[0], near[0])}?" if near else f"expected one of {', '.join(sorted(declared))}."
        raise UsageError(f"{path} sets {shown(name)}, which edgetune does not know; {advice}")
    try:
        return declared[name].checked(value, name)
    except SettingError as error:
        example = f"{name} = {as_toml(declared[name].example)}"
        raise UsageError(f"In {path}, {str(error).rstrip('.')}. Write for example: {example}") from error
