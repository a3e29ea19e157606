"""Lists what may be a model in the places where other programs keep them: Hugging Face, LM Studio, Ollama, a named folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.home import expand
from edgetune.library.inspect_model import (
    MAX_ENTRIES,
    FoundModel,
    Room,
    inspect_folder,
    inspect_gguf,
    list_folder,
    modified,
    outline_of,
    plain_word,
    printable,
    read_config,
)
from edgetune.runtime.errors import EdgetuneError, ModelError
from edgetune.runtime.untrusted_file import HUB_REFERENCE, read_untrusted


@dataclass(frozen=True)
class Candidate:
    """Something that may be a model: a folder still to be inspected, or one whose `answer` is known already (GGUF)."""

    name: str
    path: Path
    source: str
    answer: FoundModel | None = None

    def inspect(self, room: Room | None = None) -> FoundModel:
        """Return what this candidate is, and whether training it fits into `room`, if that is given.

        Never raises: a fault becomes the answer's `reason`.
        """
        found = FoundModel(self.name, self.path, self.source)
        try:
            try:
                found = self.answer or inspect_folder(self.path, self.name, self.source, room)
            except EdgetuneError as error:
                found = replace(found, reason=str(error))
                found = replace(outline_of(self.path, self.name, self.source), reason=str(error))
        except Exception as error:  # a hostile file may provoke anything: the list of models must survive it
            reason = f"{self.path} could not be read ({type(error).__name__}); copy or download it again."
            found = replace(found, reason=found.reason or reason)
        return replace(found, name=printable(found.name), reason=printable(found.reason))


def candidates(folder: Path | str | None = None) -> Iterator[Candidate]:
    """Yield the candidates in `folder`, if one is given, then those in the Hugging Face cache, LM Studio and Ollama.

    Raises ModelError for a `folder` that does not exist.
    """
    if folder is not None:
        named = expand(str(folder))
        if not os.path.lexists(named):
            raise ModelError(f"There is no folder {named}; name one that holds models, or none for the usual places alone.")
        yield from _unreadable(named, "folder")
        yield from candidates_in(named, "folder", depth=2)
    hub, ollama = _hub_cache(), Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    yield from _unreadable(hub, "Hugging Face")
    yield from _hugging_face(hub)
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        yield from _unreadable(root, "LM Studio")
        yield from candidates_in(root, "LM Studio", depth=3)
    yield from _unreadable(ollama, "Ollama")
    yield from _ollama(ollama)


def _unreadable(place: Path, source: str) -> Iterator[Candidate]:
    """Yield a candidate that says why a place where models may be cannot be listed; none if it can, or is not there."""
    try:
        if not os.path.isfile(place):
            os.scandir(place).close()
    except FileNotFoundError:
        return
    except OSError as error:
        reason = f"{place} cannot be listed ({error.strerror}); check who owns it and its permissions."
        yield Candidate(str(place), place, source, FoundModel(str(place), place, source, reason=reason))


def candidates_in(folder: Path, source: str, depth: int, name: str = "") -> Iterator[Candidate]:
    """Yield the models in `folder`: the folder itself, its GGUF files, and those of its subfolders down to `depth` levels."""
    if folder.suffix == ".gguf" and os.path.isfile(folder):
        yield _gguf(folder, name or folder.stem, source)
        return
    if os.path.isfile(folder / "config.json"):
        yield Candidate(name or (os.path.realpath(folder) if source == "folder" else folder.name), folder, source)
        return
    entries = list_folder(folder)
    files = [path for path in entries if path.suffix == ".gguf" and not path.name.startswith("mmproj") and os.path.isfile(path)]
    # A model split into several GGUF files is one model: only its first part is listed.
    first = [path for path in files if not re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) or "-00001-of-" in path.name]
    for path in first:
        yield _gguf(path, name if len(first) == 1 and name else f"{name}/{path.stem}".lstrip("/"), source)
    if depth > 0:
        for path in entries:
            if os.path.isdir(path) and not path.name.startswith("."):
                inner = f"{name}/{path.name}".lstrip("/") if source != "folder" else ""
                yield from candidates_in(path, source, depth - 1, inner)


def _gguf(path: Path, name: str, source: str) -> Candidate:
    return Candidate(name, path, source, inspect_gguf(path, name, source))


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


# --- Ollama -----------------------------------------------------------------------------------------------------------


def _ollama(root: Path) -> Iterator[Candidate]:
    """Yield Ollama's models. It keeps manifests/HOST/NAMESPACE/MODEL/TAG, each a JSON object that names blobs by digest."""
    manifests = root / "manifests"
    found = [manifests]
    for _ in range(4):
        found = [path for folder in found for path in list_folder(folder)][:MAX_ENTRIES]
    for path in found:
        if os.path.isfile(path):
            host, namespace, model, tag = path.relative_to(manifests).parts
            # `ollama` itself leaves its default host and namespace out of a name.
            parts = [host] * (host != "registry.ollama.ai") + [namespace] * (namespace != "library") + [f"{model}:{tag}"]
            yield _ollama_model(root, path, "/".join(parts))


def _ollama_model(root: Path, manifest: Path, name: str) -> Candidate:
    content = read_config(manifest)
    listed = content.get("layers")
    layers = [layer for layer in listed if isinstance(layer, dict)] if isinstance(listed, list) else []
    by_kind = {str(layer.get("mediaType")).rpartition(".")[2]: layer for layer in layers}
    weights = by_kind.get("model", {})
    blob = _blob(root, weights)
    if blob is None:
        reason = f"{manifest} names no model; type `ollama pull {name}` if you use it there, but edgetune needs safetensors."
        return Candidate(name, manifest, "Ollama", FoundModel(name, manifest, "Ollama", reason=reason))
    config = _blob(root, content.get("config"))
    about = read_config(config) if config is not None else {}
    size = weights.get("size")
    answer = inspect_gguf(
        blob,
        name,
        "Ollama",
        size=size if type(size) is int and size >= 0 else None,
        quantisation=plain_word(about.get("file_type")),
        architecture=plain_word(about.get("model_family")) or "unknown",
        template="template" in by_kind,
    )
    return Candidate(name, blob, "Ollama", answer)


def _blob(root: Path, layer: Any) -> Path | None:
    """Return the file of a manifest's layer. Only a well-formed digest becomes a path, so none can point elsewhere."""
    digest = layer.get("digest") if isinstance(layer, dict) else None
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", digest) if isinstance(digest, str) else None
    return root / "blobs" / f"sha256-{match[1]}" if match else None
