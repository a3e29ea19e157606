"""Keeps the adapters on this machine: finds, reads, imports and deletes them, and remembers which one is current.

Each adapter is a PEFT folder at `adapters/<first 12 digits of the base's digest>/<name>/`. `current.json` names the current
adapter and the model it was trained on. Training names an adapter by the time at which it began, so that names sort by age.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

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
from edgetune.runtime.files import atomic_write, explain_full_disk
from edgetune.runtime.json_file import parse

CURRENT = "current.json"
"""File in edgetune's home that names the current adapter."""
NONE = "none"
"""Name that stands for no adapter: the bare base model."""
GGUF = ".gguf"
"""Suffix of a GGUF file."""
_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Current:
    """The current adapter: its folder, its base model (as `--model` names it) and that model's digest.

    `demo_alone` is True if no other model than the demo was ready when this adapter became the current one.
    """

    adapter: Path
    model: str
    base: str
    demo_alone: bool = True


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
    """Make an adapter the current one, for every command that is given no --adapter."""
    record = {**dataclasses.asdict(current), "adapter": str(current.adapter)}
    atomic_write(private_folder(home()) / CURRENT, json.dumps(record, indent=2) + "\n")


def get_current() -> Current | None:
    """Return the current adapter, or None if none was made current or its folder is gone."""
    try:
        record = parse((home() / CURRENT).read_bytes())
        alone = record.get("demo_alone") is not False
        current = Current(Path(record["adapter"]), str(record["model"]), str(record["base"]), alone)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return current if (current.adapter / peft_folder.CONFIG_FILE).is_file() else None


def find(name: str | None, base: str) -> Path | None:
    """Return the folder or file that `--adapter NAME` names; None for the bare base model.

    name: a folder, a GGUF file, the name of an adapter of this base, "none", or None for the current adapter.
    Raises AdapterError for a name that is not known.
    """
    if name == NONE:
        return None
    if name is None:
        current = get_current()
        return current.adapter if current is not None and current.base == base else None
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


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter kept on this machine. Figures that its training did not record are None."""

    name: str
    path: str
    base: str
    current: bool
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    bytes: int
    heldout_bits_per_byte_before: float | None
    heldout_bits_per_byte_after: float | None


def list_adapters() -> list[KeptAdapter]:
    """Return all adapters on this machine, by base model, oldest name first. Folders that are no adapters are left out."""
    found = []
    for folder in (adapter for parent in sorted((home() / "adapters").glob("*")) for adapter in sorted(parent.glob("[!.]*"))):
        with contextlib.suppress(AdapterError):
            found.append(describe(folder))
    return found


def describe(folder: Path) -> KeptAdapter:
    """Return what an adapter's own files say about it, without reading its tensors. Raises AdapterError for other folders."""
    adapter, current = peft_folder.load_config(folder), get_current()
    config, about = adapter.config, adapter.about
    scores = [about.get(f"heldout_bits_per_byte_{when}") for when in ("before", "after")]
    before, after = (_score(score) for score in scores)
    return KeptAdapter(
        name=folder.name,
        path=str(folder),
        base=folder.parent.name,
        current=current is not None and current.adapter == folder.resolve(),
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        layers=adapter.layers,
        bytes=sum(file.stat().st_size for file in folder.iterdir()),
        heldout_bits_per_byte_before=before,
        heldout_bits_per_byte_after=after,
    )


def _score(found: object) -> float | None:
    """Return a figure measured by training, from edgetune.json; None for anything that cannot be a measurement."""
    return float(found) if isinstance(found, int | float) and abs(found) < 1e9 else None


def import_adapter(source: Path, base: Checkpoint, base_name: str, name: str | None = None) -> Path:
    """Store a copy of an adapter, in any form that `read` takes, as a PEFT folder called `name`; return that folder.

    name: None takes the source's own name. Raises AdapterError for an adapter that does not fit the base (all mismatches are
    named), and for a name that is taken or not allowed.
    """
    adapter = load_for(source, base)
    check_fits(adapter, base.config)
    name = re.sub(r"[^\w.-]+", "-", source.stem if source.suffix == GGUF else source.name).strip(".-") if name is None else name
    if not _NAME.fullmatch(name) or name == NONE:
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


def delete(folder: Path) -> None:
    """Delete an adapter. Raises AdapterError for the current one, unless its base has no other that could be promoted."""
    current = get_current()
    if current is not None and current.adapter == folder.resolve():
        if any(other.base == folder.parent.name and other.name != folder.name for other in list_adapters()):
            raise AdapterError(
                f"The adapter {folder.name} is the current one; first make another one current with "
                "`edgetune adapters promote NAME`."
            )
        (home() / CURRENT).unlink(missing_ok=True)
    shutil.rmtree(folder)
