"""Keeps GGUF models as the model folders that edgetune works with: each is converted once, when it is first opened.

A conversion lies in models/ of edgetune's own folder and remembers its file (conversion/origin.py). It is found by that file's
path, size and time of change, so a file that has changed is converted again, and its earlier conversion deleted. So is one that
an earlier version of the converter made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune import events
from edgetune.conversion.convert import convert
from edgetune.conversion.gguf_file import GgufFile, parts_of, stem_of
from edgetune.conversion.origin import CONVERTER, Origin
from edgetune.conversion.tokenizer import tokenizer_notices
from edgetune.home import home, private_folder, unfinished_folder
from edgetune.lock import Lock
from edgetune.progress import Show, Stages
from edgetune.reports.text import NAME_SHOWN
from edgetune.runtime.errors import BusyError, ModelError
from edgetune.runtime.files import is_ours

_FOLDER = "models"
_NAME_KEPT = 48
"""Characters of a model's name that its folder's name keeps: most file systems allow 255 bytes, and a character takes up to 4.
Chosen by hand."""
_WAIT_SECONDS = 0.2
"""Seconds between two looks at a lock that another process holds. Chosen by hand."""


@dataclass(frozen=True)
class Conversion:
    """A converted model: its folder, and the GGUF file that it was made from."""

    folder: Path
    origin: Origin

    @property
    def bytes(self) -> int:
        """Return the size of the folder's files, which it takes on the disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def is_of(self, path: Path) -> bool:
        """Return True if this was made from the file at `path`, changed since or not."""
        return os.path.realpath(self.origin.path) == os.path.realpath(path)


def conversions() -> list[Conversion]:
    """Return all converted models, in the order of their folders' names. A folder without a sound record is left out."""
    found = []
    for folder in sorted((home() / _FOLDER).glob("[!.]*")):
        with contextlib.suppress(ModelError, OSError):
            origin = Origin.read(folder) if is_ours(folder) else None
            if origin is not None:
                found.append(Conversion(folder, origin))
    return found


def conversion_of(path: Path) -> Conversion | None:
    """Return the conversion of the GGUF file at `path`; None if there is none, or file or converter changed since."""
    made = [found for found in conversions() if found.is_of(path) and found.origin.converter == CONVERTER]
    now = _stamp(path) if made else None
    return next((found for found in made if (found.origin.bytes, found.origin.modified) == now), None)


def converted_folder(path: Path, name: str, show: Show, notices: tuple[str, ...] = ()) -> Path:
    """Return the model folder of the GGUF file at `path`, which is converted now unless it was before.

    name: as the user calls the model. show: receives the progress, and an events.Converted with `notices` at the end.
    Waits while another process converts. Raises ModelError for a file that cannot be used, ResourceError for a full disk.
    """
    found = conversion_of(path)
    if found is None:
        with _alone(show):
            found = conversion_of(path)  # another process may have converted it meanwhile
            return _convert(path, name, show, notices) if found is None else found.folder
    return found.folder


def delete_conversions(name: str, paths: Sequence[Path], short_for: Sequence[Path] = ()) -> int:
    """Delete what the GGUF model of this name, or any file of `paths`, was converted to; return how many bytes that frees.

    Where there is none, `name` may be short for the one converted model that is among `short_for`, or whose name contains it.
    Raises ModelError for a name that no converted model has, or several have in short.
    """
    with _alone(lambda event: None):
        kept = conversions()
        made = [found for found in kept if name == found.origin.name or any(map(found.is_of, paths))]
        if not made and name:
            part = name.lower()
            made = [found for found in kept if part in found.origin.name.lower() or any(map(found.is_of, short_for))]
            names = sorted({found.origin.name for found in made})
            if len(names) > 1:
                raise ModelError(f"{name[:NAME_SHOWN]!r} may be any of {', '.join(names)}; type the whole name of one.")
        if not made:
            names = sorted({found.origin.name for found in kept}) or ["none"]
            raise ModelError(f"No converted model is called {name[:NAME_SHOWN]!r}; those that are kept: {', '.join(names)}.")
        freed = sum(found.bytes for found in made)
        for found in made:
            _delete(found.folder)
    return freed


@contextlib.contextmanager
def forgetting_named(folder: Path, name: str) -> Iterator[None]:
    """Add to a ModelError about `folder` what mends it, if it is what the GGUF model `name` was converted to."""
    try:
        yield
    except ModelError as error:
        if folder.parent.resolve() != (home() / _FOLDER).resolve():
            raise
        again = f"type `edgetune models --forget {name}`, and it is converted again when it is used"
        raise ModelError(f"{str(error).rstrip('.')}; {again}.") from error


def _convert(path: Path, name: str, show: Show, notices: tuple[str, ...]) -> Path:
    """Convert the GGUF file at `path`, and delete the conversion of what it was before."""
    gguf = GgufFile.open(path)
    folder = private_folder(home() / _FOLDER) / _folder_name(path, name, gguf.digest)
    _delete_leftovers(folder)
    if os.path.lexists(folder):  # its record is damaged, or an earlier version of the converter made it
        _delete(folder)
    made = convert(path, folder, name, progress=Stages(show).of("converting"))
    notices += tuple(tokenizer_notices(gguf.metadata))
    show(events.Converted(name, gguf.quantisation, gguf.bytes, made.form, made.bytes, made.seconds, notices))
    for old in conversions():
        if old.is_of(path) and old.folder != folder:
            with contextlib.suppress(OSError):  # on Windows, another process may be using it
                _delete(old.folder)
    return folder


def _delete(folder: Path) -> None:
    """Delete a conversion. It is hidden first, so that a killed deletion leaves nothing behind that looks whole."""
    hidden = folder.with_name(f".deleted-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _folder_name(path: Path, name: str, digest: str) -> str:
    """Return the name of a conversion's folder; equal headers of different files have different ones.

    It has no dot: Windows takes CON.x for the console.
    """
    plain = re.sub(r"[^\w-]+", "-", stem_of(Path(name).name) if os.path.isabs(name) else name).strip("-")[-_NAME_KEPT:]
    identity = f"{os.path.realpath(path)}\n{_stamp(path)}\n{digest}"
    return f"{plain or 'model'}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]}"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return the size of all parts and the time of the last change of any in nanoseconds; None if one is not there."""
    try:
        files = [part.stat() for part in parts_of(path)]
    except OSError:
        return None
    return sum(file.st_size for file in files), max(file.st_mtime_ns for file in files)


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed conversions left behind, except those of `folder`, which its own conversion takes up or deletes."""
    for entry in folder.parent.glob(".*"):
        if not entry.name.startswith(f".{folder.name}") and is_ours(entry):
            shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _alone(show: Show) -> Iterator[None]:
    """Run the block while no other process converts or deletes a model; wait for one that does."""
    waiting = Stages(show).of("waiting")
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(Lock(unfinished_folder() / "conversion.lock", "the converted models"))
                break
            except BusyError:
                waiting(0, 1)
                time.sleep(_WAIT_SECONDS)
        yield
