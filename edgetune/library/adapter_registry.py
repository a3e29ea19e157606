"""Keeps the adapters on this machine: finds, reads, imports and deletes them, and remembers which one is current.

Each adapter is a PEFT folder at `adapters/<first 12 digits of the base's digest>/<name>/`. `current.json` beside those folders
names the base's current adapter, and the ones that were current before it. `current.json` in edgetune's home names the base
whose adapter was made current last: the model of every command that is not given one. Training names an adapter by the time at
which it began, so that names sort by age.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from edgetune.export import mps as bundle
from edgetune.export.gguf import adapter as gguf_adapter
from edgetune.export.mlx import adapter as mlx_adapter
from edgetune.home import PRIVATE_FOLDER, expand, home, private_folder
from edgetune.library.own_tokenizer import RECORD, differences_from_base
from edgetune.reports.text import NAME_SHOWN
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter, check_fits
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import atomic_write, explain_full_disk, read_own
from edgetune.runtime.json_file import parse

CURRENT = "current.json"
"""File that names the current adapter of a base model, and in edgetune's home the base model that is used by default."""
MOST_EARLIER = 100
"""Adapters that a base model remembers to have been current before the present one. Chosen by hand: a season of nights."""
NONE = "none"
"""Name that stands for no adapter: the bare base model."""
GGUF = ".gguf"
"""Suffix of a GGUF file."""
_NAME = re.compile(r"\w[\w.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True)
class Current:
    """The current adapter of a base model: its folder, the model (as `--model` names it) and that model's digest.

    `demo_alone` is True if no other model than the demo was ready when this adapter became the current one. `earlier` are the
    folders of the adapters that were current before it, the last one at the end.
    """

    adapter: Path
    model: str
    base: str
    demo_alone: bool = True
    earlier: tuple[Path, ...] = ()


def adapters_folder(base: str) -> Path:
    """Return the folder that holds the adapters of the base model with this digest."""
    return private_folder(home() / "adapters" / base[:12])


def new_run(base: str) -> str:
    """Return a new name, from the clock, for a run and its adapter. Making the run's folder reserves it."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        name = stamp if number == 1 else f"{stamp}-{number}"
        if not (adapters_folder(base) / name).exists():
            with explain_full_disk(run_folder(name)), contextlib.suppress(FileExistsError):
                run_folder(name).mkdir(mode=PRIVATE_FOLDER)
                return name
    raise AssertionError("itertools.count never ends")


def run_folder(name: str) -> Path:
    """Return the folder of a run's log and report."""
    return private_folder(home() / "runs") / name


def set_current(current: Current) -> None:
    """Make an adapter the current one of its base, and its base the model of every command that is not given one.

    Each of the two files is replaced in one step. A crash between them leaves the adapter current for its base, and the default
    model as it was.
    """
    earlier = [str(path) for path in current.earlier[-MOST_EARLIER:]]
    record = {**dataclasses.asdict(current), "adapter": str(current.adapter), "earlier": earlier}
    atomic_write(adapters_folder(current.base) / CURRENT, json.dumps(record, indent=2) + "\n")
    default = {name: record[name] for name in ("model", "base", "demo_alone")}
    atomic_write(private_folder(home()) / CURRENT, json.dumps(default, indent=2) + "\n")


def forget_current(base: str) -> None:
    """Leave a base model without a current adapter."""
    (adapters_folder(base) / CURRENT).unlink(missing_ok=True)


def get_current(base: str | None = None) -> Current | None:
    """Return the current adapter of the base model with this digest; None if it has none, or that one's folder is gone.

    base: None stands for the base model whose adapter was made current last.
    """
    if base is None:
        base = default_base()
    if base is None or not _DIGEST.fullmatch(base):
        return None
    current = current_in(home() / "adapters" / base[:12])
    return current if current is not None and current.base == base else None


def current_in(folder: Path) -> Current | None:
    """Return the current adapter of the base model whose adapters are in `folder`; None as in `get_current`."""
    record = _read_record(folder / CURRENT)
    try:
        current = Current(
            Path(record["adapter"]),
            str(record["model"]),
            str(record["base"]),
            record.get("demo_alone") is not False,
            tuple(Path(path) for path in record.get("earlier", ())),
        )
    except (KeyError, TypeError):
        return None
    return current if is_adapter(current.adapter) else None


def default_base() -> str | None:
    """Return the digest of the base model whose adapter was made current last; None if there never was one."""
    base = _read_record(home() / CURRENT).get("base")
    return base if isinstance(base, str) else None


def default_model() -> str | None:
    """Return the name of that base model, which may have no current adapter any more; None as in `default_base`."""
    model = _read_record(home() / CURRENT).get("model")
    return model if isinstance(model, str) and model.isprintable() else None


def _read_record(path: Path) -> dict[str, Any]:
    """Return one of the records that `set_current` writes; empty where it is missing or damaged."""
    try:
        record = parse(read_own(path))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_adapter(folder: Path) -> bool:
    """Return True if a folder that was an adapter's is there still."""
    with contextlib.suppress(OSError, ValueError):  # a damaged record may name what can be no path
        return (folder / peft_folder.CONFIG_FILE).is_file()
    return False


def find(name: str | None, base: str) -> Path | None:
    """Return the folder or file that `--adapter NAME` names; None for the bare base model.

    name: a folder, a GGUF file, the name of an adapter of this base, "none", or None for the current adapter.
    Raises AdapterError for a name that is not known.
    """
    if name == NONE:
        return None
    if name is None:
        current = get_current(base)
        return None if current is None else current.adapter
    path = expand(name)
    with contextlib.suppress(OSError):  # a name too long for a file
        if path.is_dir() or (path.is_file() and path.suffix == GGUF):
            return path
    kept = kept_folder(name, base)
    if kept is not None:
        return kept
    raise AdapterError(
        f"There is no adapter {name[:NAME_SHOWN]!r}: it is neither a folder, nor a {GGUF} file, nor an adapter of this base "
        "model (`edgetune adapters list` names them). Type none in its place for the base model alone."
    )


def adapter_for(name: str | None, base: Checkpoint) -> tuple[str, Adapter | None]:
    """Return what to call the adapter that `--adapter NAME` stands for, and the adapter itself.

    name: as in `find`, but None prefers an adapter inside the base's own folder (a bundle of `edgetune export mps`) to the
    current one. Raises AdapterError.
    """
    bundled = bundle.read_adapter(base.folder, base.config) if name is None else None
    if bundled is not None:
        return bundle.ADAPTER, bundled
    path = find(name, base.digest)
    if path is None:
        return NONE, None
    return path.stem if path.is_file() else path.name, load_for(path, base)


def kept_folder(name: str, base: str) -> Path | None:
    """Return the folder of this base's adapter `name`; None if it has no adapter of that name."""
    kept = adapters_folder(base) / name
    return kept if _NAME.fullmatch(name) and kept.is_dir() else None


def read(path: Path, base: LlamaConfig) -> Adapter:
    """Read an adapter for `base` from a PEFT folder, an mlx-lm folder, a GGUF file or the folder of `edgetune export gguf`.

    Raises AdapterError for anything else.
    """
    try:
        if not path.exists():
            raise AdapterError(f"There is nothing at {path}; expected a PEFT folder, an mlx-lm folder or a {GGUF} file.")
        if path.suffix == GGUF and path.is_file():
            return gguf_adapter.read_adapter(path, base)
        if (path / gguf_adapter.ADAPTER_FILE).is_file():
            return gguf_adapter.read_adapter(path / gguf_adapter.ADAPTER_FILE, base)
        if mlx_adapter.is_adapter(path):
            return mlx_adapter.read_adapter(path, base)
        return peft_folder.load(path, base)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); name an adapter that you may read.") from error


def load_for(path: Path, base: Checkpoint) -> Adapter:
    """Read an adapter and, if it names the base it was made for, check that it is this one. Raises AdapterError."""
    adapter = read(path, base.config)
    made_for = adapter.about.get("base")
    if made_for is not None and made_for != base.digest:
        raise AdapterError(
            f"The adapter {path.name} was made for another base model (digest {str(made_for)[:12]}, this one has "
            f"{base.digest[:12]}); name its model with --model."
        )
    return adapter


def import_adapter(source: Path, base: Checkpoint, base_name: str, name: str | None = None) -> Path:
    """Store a copy of an adapter, in any form that `read` takes, as a PEFT folder called `name`; return that folder.

    name: None takes the source's own name. Raises AdapterError for an adapter that does not fit the base (all mismatches are
    named), and for a name that is taken or not allowed.
    """
    adapter = load_for(source, base)
    check_fits(adapter, base.config)
    name = re.sub(r"[^\w.-]+", "-", source.stem if source.suffix == GGUF else source.name).strip(".-") if name is None else name
    if not _NAME.fullmatch(name) or name in (NONE, CURRENT):
        raise AdapterError(
            f"{name!r} cannot be the name of an adapter; expected letters, digits, dots and dashes, and not {NONE!r}. Type for "
            "example --name my-adapter."
        )
    if kept_folder(name, base.digest) is not None:
        raise AdapterError(f"This base model already has an adapter {name}; choose another name, for example --name {name}-2.")
    folder = adapters_folder(base.digest) / name
    about = {**adapter.about, "base": base.digest}
    if differences := differences_from_base(source, base.folder):
        about[RECORD] = differences
    peft_folder.save(replace(adapter, about=about), folder, base_name)
    return folder
