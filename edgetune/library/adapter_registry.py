"""Adapters on this machine: where they lie, and which is current for a base model.

`adapters/<base digest, 12 letters>/<name>/` are PEFT folders; `current.json` names the one in use and the model it was
trained on. A name is the time it was made, so that names sort by age.
"""

from __future__ import annotations

import contextlib
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
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter, check_fits
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import atomic_write, explain_full_disk

CURRENT = "current.json"
NONE = "none"
GGUF = ".gguf"
_NAME = re.compile(r"\w[\w.-]{0,99}")


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
    """What `--adapter NAME` names: a folder, a GGUF file, a name under this base, "none", or None for the current one.

    Raises AdapterError when the name is not known. None means the bare base.
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
        f"No adapter {name!r}: it is neither a folder, nor a {GGUF} file, nor one of this base's (`edgetune adapters list` "
        "names them); type --adapter none for the bare base."
    )


def adapter_for(name: str | None, base: Checkpoint) -> tuple[str, Adapter | None]:
    """The adapter that `--adapter NAME` stands for, and what to call it; None is the one that lies in the base's own folder
    (a bundle of `edgetune export mps`), else the current one. Raises AdapterError."""
    bundled = bundle.read_adapter(base.folder) if name is None else None
    if bundled is not None:
        return bundle.ADAPTER, bundled
    path = find(name, base.digest)
    if path is None:
        return NONE, None
    return path.stem if path.is_file() else path.name, load_for(path, base)


def kept_folder(name: str, base: str) -> Path | None:
    """The folder of an adapter that is kept here under this base; None where there is none of that name."""
    kept = adapters_folder(base) / name
    return kept if _NAME.fullmatch(name) and kept.is_dir() else None


def read(path: Path, base: LlamaConfig) -> Adapter:
    """An adapter for `base` in whatever form it lies there: a PEFT folder, an mlx-lm folder, a GGUF file or our folder of one.

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
            return mlx_adapter.read_adapter(path)
        return peft_folder.load(path)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); name an adapter that is yours to read.") from error


def load_for(path: Path, base: Checkpoint) -> Adapter:
    """Read an adapter and check that it was made for this base, where it says so."""
    adapter = read(path, base.config)
    made_for = adapter.about.get("base")
    if made_for is not None and made_for != base.digest:
        raise AdapterError(
            f"The adapter {path.name} was made for another base ({str(made_for)[:12]}, this one is {base.digest[:12]}); "
            "name its model with --model."
        )
    return adapter


@dataclass(frozen=True)
class Kept:
    """An adapter that is kept here; what training did not write about it is None."""

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


def kept() -> list[Kept]:
    """All adapters under this home, by base, oldest name first. Folders that are no adapters are left out."""
    found = []
    for folder in (adapter for parent in sorted((home() / "adapters").glob("*")) for adapter in sorted(parent.glob("[!.]*"))):
        with contextlib.suppress(AdapterError):
            found.append(describe(folder))
    return found


def describe(folder: Path) -> Kept:
    """What a kept adapter says of itself; its tensors are not read. Raises AdapterError where it is none."""
    adapter, current = peft_folder.load_config(folder), get_current()
    config, about = adapter.config, adapter.about
    scores = [about.get(f"heldout_bits_per_byte_{when}") for when in ("before", "after")]
    before, after = (_score(score) for score in scores)
    return Kept(
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
    """A measured figure of edgetune.json; None where it is none, or larger than any measurement."""
    return float(found) if isinstance(found, int | float) and abs(found) < 1e9 else None


def keep(source: Path, base: Checkpoint, base_name: str, name: str | None = None) -> Path:
    """Store a copy of an adapter, in any form that is read, as a PEFT folder under `name` (default: the source's own).

    Raises AdapterError where it does not fit the base, every mismatch named, or where the name is taken or none.
    """
    adapter = load_for(source, base)
    check_fits(adapter, base.config)
    name = re.sub(r"[^\w.-]+", "-", source.stem if source.suffix == GGUF else source.name).strip(".-") if name is None else name
    if not _NAME.fullmatch(name) or name == NONE:
        raise AdapterError(
            f"{name!r} is no name for an adapter; expected letters, digits, dots, dashes, and not {NONE!r}: --name my-adapter."
        )
    if kept_folder(name, base.digest) is not None:
        raise AdapterError(f"There is an adapter {name} of this base already; name another: --name {name}-2.")
    folder = adapters_folder(base.digest) / name
    peft_folder.save(replace(adapter, about={**adapter.about, "base": base.digest}), folder, base_name)
    return folder


def delete(folder: Path) -> None:
    """Remove a kept adapter. Raises AdapterError for the current one, unless its base has no other to promote."""
    current = get_current()
    if current is not None and current.adapter == folder.resolve():
        if any(other.base == folder.parent.name and other.name != folder.name for other in kept()):
            raise AdapterError(
                f"The adapter {folder.name} is the current one; type `edgetune adapters promote NAME` for another first."
            )
        (home() / CURRENT).unlink(missing_ok=True)
    shutil.rmtree(folder)
