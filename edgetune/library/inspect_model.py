"""Says what a model folder or file holds, whether edgetune can train on it, and why not.

Everything inspected was written by others, so nothing here trusts it: JSON is read up to a limit, names are checked, and no
weights are loaded.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgetune.config import TrainConfig
from edgetune.memory_settings import least_memory_to_train
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.errors import EdgetuneError, ModelError
from edgetune.runtime.json_file import read_object
from edgetune.runtime.tokenizer import read_template
from edgetune.runtime.untrusted_file import MODEL_CONFIG

SUGGESTED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")
"""Hugging Face ids of two models that edgetune can train on: a small one and a better one."""
CONVERT_BYTES = 4_000_000_000
"""Size of an unquantised model, in bytes, from which `edgetune models` asks for `edgetune quantize`: quantising it anew at
each start would take too long. Chosen by hand."""
MAX_ENTRIES = 2000
"""Largest number of entries that are looked at in one folder. Chosen by hand."""

Status = Literal["ready", "convert", "no"]
"""ready: train on it now. convert: quantise it first. no: edgetune cannot use it."""


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
    needed = 0 if room is None else least_memory_to_train(checkpoint, room.train, room.device)
    found = replace(
        outline,
        bytes=checkpoint.nbytes,
        parameters=checkpoint.config.parameters,
        quantisation=_quantisation(checkpoint),
        fits=None if room is None else needed <= room.memory,
        status="ready",
    )
    if room is not None and not found.fits:
        short = f"Training it takes at least {needed / 1e9:.2f} GB of memory, and {room.memory / 1e9:.2f} GB may be used."
        found = replace(found, reason=short)
    if checkpoint.quant is None and checkpoint.nbytes > CONVERT_BYTES:
        command = f"Quantise it once, so that it does not have to be quantised at every start: edgetune quantize {name} DEST"
        return replace(found, status="convert", reason=f"{command}. {found.reason}".strip())
    return found


def inspect_gguf(
    path: Path,
    name: str,
    source: str,
    size: int | None = None,
    quantisation: str | None = None,
    architecture: str = "unknown",
    template: bool = False,
) -> FoundModel:
    """Return the answer for a GGUF file: edgetune cannot train on it. Its quantisation is read from its name unless given."""
    if quantisation is None:
        kind = re.search(r"(?i)(?<![a-z0-9])(I?Q\d\w*|B?F16|F32)(?=\W|$)", path.name)
        quantisation = kind[1].upper() if kind else "GGUF"
    reason = (
        f"{name} is a GGUF file ({quantisation}): its weights are rounded for llama.cpp, and edgetune cannot train on them; "
        f"fetch the original safetensors folder of this model, for example with `hf download {SUGGESTED[0]}`."
    )
    size = file_size(path) if size is None else size
    return FoundModel(name, path, source, size, None, quantisation, architecture, template, reason=reason)


def outline_of(folder: Path, name: str, source: str) -> FoundModel:
    """Return what can be said of a model folder without opening its weights."""
    config = config_of(folder)
    files = [path for path in list_folder(folder) if path.suffix in (".safetensors", ".bin", ".pth", ".pt")]
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
