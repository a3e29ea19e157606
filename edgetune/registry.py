"""Adapters on this machine: where they lie, and which is current for a base model.

`adapters/<base digest, 12 letters>/<name>/` are PEFT folders; `current.json` names the one in use and the model it was
trained on. A name is the time it was made, so that names sort by age.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edgetune.runtime import adapter as peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import atomic_write, explain_full_disk
from edgetune.state import PRIVATE_FOLDER, home, private_folder

CURRENT = "current.json"
NONE = "none"


@dataclass(frozen=True)
class Current:
    """The adapter in use: its folder, and the model (as `--model` names it) and base digest it belongs to."""

    adapter: Path
    model: str
    base: str


def adapters_folder(base: str) -> Path:
    """Where adapters of the base with this digest are kept."""
    return private_folder(home() / "adapters" / base[:12])


def new_run(base: str) -> str:
    """A name by the clock for a run and its adapter, taken by making the run's folder."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        name = stamp if number == 1 else f"{stamp}-{number}"
        if not (adapters_folder(base) / name).exists():
            with explain_full_disk(run_folder(name)), contextlib.suppress(FileExistsError):
                run_folder(name).mkdir(mode=PRIVATE_FOLDER)
                return name
    raise AssertionError("numbers do not end")


def run_folder(name: str) -> Path:
    """Where the log and the report of a run lie."""
    return private_folder(home() / "runs") / name


def set_current(current: Current) -> None:
    """Make an adapter the current one."""
    record = {"adapter": str(current.adapter), "model": current.model, "base": current.base}
    atomic_write(private_folder(home()) / CURRENT, json.dumps(record, indent=2) + "\n")


def get_current() -> Current | None:
    """The current adapter; None where there is none, or its folder is gone."""
    try:
        record = json.loads((home() / CURRENT).read_text())
        current = Current(Path(record["adapter"]), str(record["model"]), str(record["base"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return current if (current.adapter / peft_folder.CONFIG_FILE).is_file() else None


def find(name: str | None, base: str) -> Path | None:
    """The folder for `--adapter NAME`: a path, a name under this base, "none", or None for the current one.

    Raises AdapterError when the name is not known. None means the bare base.
    """
    if name == NONE:
        return None
    if name is None:
        current = get_current()
        return current.adapter if current is not None and current.base == base else None
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    kept = adapters_folder(base) / name
    if "/" not in name and "\\" not in name and kept.is_dir():
        return kept
    raise AdapterError(
        f"No adapter {name!r}: it is neither a folder nor one of this base's; type --adapter none for the bare base."
    )


def load_for(path: Path, base: str) -> Adapter:
    """Read an adapter and check that it was made for the base with this digest, where it says so."""
    adapter = peft_folder.load(path)
    made_for = adapter.about.get("base")
    if made_for is not None and made_for != base:
        raise AdapterError(
            f"The adapter {path.name} was made for another base ({str(made_for)[:12]}, this one is {base[:12]}); "
            "name its model with --model, or type --adapter none."
        )
    return adapter
