"""Finds the base models on this machine, and the one that a name stands for. Reads the local disk only, never writes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgetune.config import train_config
from edgetune.home import expand
from edgetune.library.inspect_model import SUGGESTED, FoundModel, Room, config_of, is_mlx, printable
from edgetune.library.places import candidates, candidates_in, newest_snapshot
from edgetune.memory_settings import memory_allowed
from edgetune.reports.text import NAME_SHOWN
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import ModelError

DEMO = "demo"
"""Name of the model that ships inside edgetune."""
DEMO_NOTICE = "Built-in 16M-parameter demo: it shows learning, but cannot answer questions. For real use: edgetune models"
"""The notice that is shown wherever the demo was chosen because no other model is ready."""
NOTHING_FOUND = (
    "No base model that edgetune can use was found on this machine. edgetune never downloads: fetch one yourself, "
    f"once, for example with `pip install huggingface_hub` and `hf download {SUGGESTED[0]}` (270 MB) or "
    f"`hf download {SUGGESTED[1]}` (2.2 GB, better answers); `edgetune models` will then list it."
)
"""The sentence that `edgetune models` prints if there is no base model but the demo."""

_WHERE = {
    "Hugging Face": "in your Hugging Face cache",
    "LM Studio": "in LM Studio's folder",
    "Ollama": "in Ollama's folder",
    "folder": "in the folder that you named",
}
"""Words for the place where a model was found, by its source."""


@dataclass(frozen=True)
class ModelChoice:
    """The base model to use: its folder, and a name that leads `resolve` back to it.

    `why` says why it was chosen where nobody named it, in words that follow its name in brackets.
    """

    path: Path
    name: str
    why: str = field(default="", compare=False)

    @property
    def public_name(self) -> str:
        """Return the name without the folders above it, which may tell whose machine this is: for adapters and exports."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name


def scan(folder: Path | str | None = None) -> list[FoundModel]:
    """Return every model in the usual places, and in `folder` (a model, or a folder of them); usable and large ones first."""
    train = train_config({})  # what `edgetune plan` and `edgetune train` take without options
    device = pick_device(train.device).type
    room = Room(memory_allowed(train, device), device, train)
    seen: set[str] = set()
    found = []
    for candidate in candidates(folder):
        path = os.path.realpath(candidate.path)
        if path not in seen:
            seen.add(path)
            found.append(candidate.inspect(room))
    order = {"ready": 0, "convert": 1, "no": 2}
    return sorted(found, key=lambda model: (order[model.status], not model.fits, -(model.parameters or 0), model.name))


def best(found: list[FoundModel]) -> ModelChoice | None:
    """Return the largest ready model that fits in memory, one with a chat template before one without; None without any."""
    usable = [model for model in found if model.status == "ready" and model.fits]
    if not usable:
        return None
    chosen = max(usable, key=lambda model: (model.parameters or 0, model.template, model.name))
    rank = "the only one that is ready" if len(usable) == 1 else f"the largest of {len(usable)} that are ready"
    return ModelChoice(chosen.path, chosen.name, f"{rank}, {_WHERE[chosen.source]}")


def resolve(name: str | None = None) -> ModelChoice:
    """Return the model that `name` stands for.

    name: a folder, an id in the local Hugging Face cache, an LM Studio or Ollama name, "demo", or None for the best ready
    model that fits in memory, else the demo. Raises ModelError for a model that is not here or cannot be used.
    """
    if name is None:
        return best(scan()) or replace(_demo(), why="built in, since no other model is ready here")
    if name == DEMO:
        return _demo()
    path = expand(name)
    if os.path.lexists(path):
        return _resolve_path(path)
    # An exact name anywhere goes before a shortened one; of two that have it, the one that can be used.
    for matches in (str.__eq__, _is_short_for):
        refused = None
        for candidate in candidates():
            if matches(printable(candidate.name), name):
                found = candidate.inspect()
                if found.status != "no":
                    return ModelChoice(found.path, found.name)
                refused = refused or found
        if refused is not None:
            raise ModelError(refused.reason)
    raise ModelError(
        f"There is no model {name[:NAME_SHOWN]!r} on this machine; expected a folder, the id of a model in the Hugging Face "
        "cache, an LM Studio or Ollama name, or 'demo'. Type `edgetune models` to see what is here; edgetune never "
        "downloads."
    )


def _demo() -> ModelChoice:
    return ModelChoice(Path(__file__).resolve().parent.parent / "demo", DEMO)


def _resolve_path(path: Path) -> ModelChoice:
    path = newest_snapshot(path) or path
    for candidate in candidates_in(path, "folder", depth=0):
        if candidate.answer is not None or is_mlx(config_of(path)):
            raise ModelError(candidate.inspect().reason)
    if not os.path.isdir(path):
        raise ModelError(f"{path} is no folder; expected that of a model. Type `edgetune models` to see what is here.")
    path = path.resolve()
    return ModelChoice(path, str(path))


def _is_short_for(name: str, asked: str) -> bool:
    """Return True where `asked` is `name` in short: `tinyllama-1.1b-chat` for TinyLlama/TinyLlama-1.1B-Chat, `llama3.2` for
    llama3.2:latest."""
    name, asked = name.lower(), asked.lower()
    return asked in (
        name,
        name.rpartition("/")[2],
        name.removesuffix(":latest"),
        name.rpartition("/")[2].removesuffix(":latest"),
    )
