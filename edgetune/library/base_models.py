"""The base models already on this machine: where they lie, what they are, whether edgetune can use them, and why not.

Read only, and from the local disk only: the Hugging Face cache, LM Studio's folders, Ollama's, and a folder that is
named. What lies there was written by others: an entry that is broken or hostile gets an answer like any other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from edgetune.config import TrainConfig
from edgetune.runtime import budget
from edgetune.runtime.budget import Setting, Stored
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.errors import EdgetuneError, ModelError
from edgetune.runtime.json_file import MODEL_CONFIG, read_object
from edgetune.runtime.memory import available_memory
from edgetune.runtime.runner import Recompute
from edgetune.runtime.tokenizer import read_template

DEMO = "demo"
DEMO_NOTICE = "Built-in 16M demo: it shows learning, not answers. For real use: edgetune models"
SUGGESTED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")
NOTHING_FOUND = (
    "No base model that edgetune can use was found on this machine. edgetune never downloads: fetch one yourself, "
    f"once, for example by `pip install huggingface_hub` and `hf download {SUGGESTED[0]}` (270 MB) or "
    f"`hf download {SUGGESTED[1]}` (2.2 GB, better answers); `edgetune models` will then list it."
)

Status = Literal["ready", "convert", "no"]
CONVERT_BYTES = 4_000_000_000  # beyond this, quantising anew at each start costs more patience than disk
MAX_ENTRIES = 2000  # of one folder


@dataclass(frozen=True)
class Found:
    """One find. `bytes` is what its weights take on disk; `reason` is one sentence, "" where nothing need be said."""

    name: str
    path: Path
    source: str
    bytes: int = 0
    parameters: int | None = None
    quantisation: str = "unknown"
    architecture: str = "unknown"
    template: bool = False
    fits: bool = False
    status: Status = "no"
    reason: str = ""


@dataclass(frozen=True)
class ModelChoice:
    """The model to use. `name` leads `resolve` back to it."""

    path: Path
    name: str


@dataclass(frozen=True)
class _Candidate:
    """Something that may be a model: a folder, or a find that is answered already (GGUF)."""

    name: str
    path: Path
    source: str
    answer: Found | None = None

    def found(self, memory: int) -> Found:
        try:
            find = self.answer or _inspect(self.path, self.name, self.source, memory)
        except EdgetuneError as error:
            find = replace(_outline(self.path, self.name, self.source), reason=str(error))
        except Exception as error:  # whatever a file by others brings about is an answer, not a crash
            reason = f"{self.path} could not be read ({type(error).__name__}); copy or download it again."
            find = Found(self.name, self.path, self.source, reason=reason)
        return replace(find, name=printable(find.name), reason=printable(find.reason))


def printable(text: str) -> str:
    """`text` without what could steer a terminal: names of files are written by others, too."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def scan(folder: Path | str | None = None) -> list[Found]:
    """Every model in the usual places, and in `folder` (a model, or a folder of them); usable and large ones first."""
    memory = available_memory()
    seen: set[Path] = set()
    finds = []
    for candidate in _candidates(folder):
        path = candidate.path.resolve()
        if path not in seen:
            seen.add(path)
            finds.append(candidate.found(memory))
    order = {"ready": 0, "convert": 1, "no": 2}
    return sorted(finds, key=lambda find: (order[find.status], not find.fits, -(find.parameters or 0), find.name))


def resolve(name: str | None = None) -> ModelChoice:
    """The model that a user's words stand for.

    A folder, an id in the local Hugging Face cache, an LM Studio or Ollama name, "demo"; None is the best ready model
    that fits in memory, else the demo. Raises ModelError, one sentence, for what is not there or cannot be used.
    """
    if name is None:
        return best(scan()) or _demo()
    if name == DEMO:
        return _demo()
    path = Path(name).expanduser()
    if path.exists():
        return _resolve_path(path)
    for match in (str.__eq__, _same_name):
        for candidate in _candidates():
            if match(printable(candidate.name), name):
                find = candidate.found(memory=0)
                if find.status == "no":
                    raise ModelError(find.reason)
                return ModelChoice(find.path, find.name)
    raise ModelError(
        f"There is no model {name[:200]!r} on this machine; expected a folder, the id of a model in the Hugging Face "
        "cache, an LM Studio or Ollama name, or 'demo'. Type `edgetune models` to see what is here; edgetune never "
        "downloads."
    )


def best(finds: list[Found]) -> ModelChoice | None:
    """The largest ready model that fits, one with a chat template before one without."""
    usable = [find for find in finds if find.status == "ready" and find.fits]
    if not usable:
        return None
    chosen = max(usable, key=lambda find: (find.parameters or 0, find.template, find.name))
    return ModelChoice(chosen.path, chosen.name)


def _demo() -> ModelChoice:
    return ModelChoice(Path(__file__).resolve().parent.parent / "demo", DEMO)


def _resolve_path(path: Path) -> ModelChoice:
    path = _snapshot(path) or path
    for candidate in _in_folder(path, "folder", depth=0):
        if candidate.answer is not None or _is_mlx(_config_of(path)):
            raise ModelError(candidate.found(memory=0).reason)
    if not path.is_dir():
        raise ModelError(f"{path} is a file; expected a model's folder. Type `edgetune models` to see what is here.")
    path = path.resolve()
    return ModelChoice(path, str(path))


def _same_name(name: str, asked: str) -> bool:
    """`tinyllama-1.1b-chat` for TinyLlama/TinyLlama-1.1B-Chat, `llama3.2` for llama3.2:latest."""
    name, asked = name.lower(), asked.lower()
    return asked in (
        name,
        name.rpartition("/")[2],
        name.removesuffix(":latest"),
        name.rpartition("/")[2].removesuffix(":latest"),
    )


# --- the usual places -------------------------------------------------------------------------------------------------


def _candidates(folder: Path | str | None = None) -> Iterator[_Candidate]:
    if folder is not None:
        yield from _in_folder(Path(folder).expanduser(), "folder", depth=2)
    yield from _hugging_face(_hub_cache())
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        yield from _in_folder(root, "LM Studio", depth=3)
    yield from _ollama(Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models"))


def _hub_cache() -> Path:
    """Where huggingface_hub keeps its cache, by the variables it reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "huggingface" / "hub"


def _listed(folder: Path) -> list[Path]:
    """Entries of a folder in a stable order; [] where it cannot be listed."""
    try:
        return sorted(folder.iterdir())[:MAX_ENTRIES]
    except OSError:
        return []


def _hugging_face(root: Path) -> Iterator[_Candidate]:
    for folder in _listed(root):
        if folder.name.startswith("models--"):
            snapshot = _snapshot(folder)
            name = folder.name.removeprefix("models--").replace("--", "/", 1)
            if snapshot is not None:
                yield from _in_folder(snapshot, "Hugging Face", depth=0, name=name)


def _snapshot(folder: Path) -> Path | None:
    """The revision that refs/main names, or else the newest, of a cache entry `models--org--name`."""
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8")[:64].strip()
    except (OSError, ValueError):
        revision = ""
    if re.fullmatch(r"[0-9a-f]{8,64}", revision) and (folder / "snapshots" / revision).is_dir():
        return folder / "snapshots" / revision
    there = [path for path in _listed(folder / "snapshots") if path.is_dir()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def _in_folder(folder: Path, source: str, depth: int, name: str = "") -> Iterator[_Candidate]:
    """The models in `folder`: itself, its GGUF files, and those of its subfolders down to `depth`."""
    if folder.suffix == ".gguf" and folder.is_file():
        yield _gguf(folder, name or folder.stem, source)
        return
    if (folder / "config.json").is_file():
        yield _Candidate(name or (str(folder.resolve()) if source == "folder" else folder.name), folder, source)
        return
    entries = _listed(folder)
    files = [path for path in entries if path.suffix == ".gguf" and not path.name.startswith("mmproj") and path.is_file()]
    first = [path for path in files if not re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) or "-00001-of-" in path.name]
    for path in first:
        yield _gguf(path, name if len(first) == 1 and name else f"{name}/{path.stem}".lstrip("/"), source)
    if depth > 0:
        for path in entries:
            if path.is_dir() and not path.name.startswith("."):
                inner = f"{name}/{path.name}".lstrip("/") if source != "folder" else ""
                yield from _in_folder(path, source, depth - 1, inner)


def _gguf(path: Path, name: str, source: str, **known: Any) -> _Candidate:
    kind = re.search(r"(?i)(?<![a-z0-9])(I?Q\d\w*|B?F16|F32)(?=\W|$)", path.name)
    quantisation = known.pop("quantisation", None) or (kind[1].upper() if kind else "GGUF")
    reason = (
        f"{name} is a GGUF file ({quantisation}), whose weights are rounded for llama.cpp and cannot be trained on; "
        f"fetch the original safetensors folder of this model, for example by `hf download {SUGGESTED[0]}`."
    )
    size = known.pop("bytes", None)
    answer = Found(name, path, source, size if size is not None else _size(path), quantisation=quantisation, reason=reason)
    return _Candidate(name, path, source, replace(answer, **known))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _ollama(root: Path) -> Iterator[_Candidate]:
    """Ollama keeps manifests/HOST/NAMESPACE/MODEL/TAG, each a JSON that names blobs by digest."""
    manifests = root / "manifests"
    for count, path in enumerate(sorted(manifests.glob("*/*/*/*")) if manifests.is_dir() else []):
        if count >= MAX_ENTRIES:
            return
        if path.is_file():
            host, namespace, model, tag = path.relative_to(manifests).parts
            parts = [host] * (host != "registry.ollama.ai") + [namespace] * (namespace != "library") + [f"{model}:{tag}"]
            yield _ollama_model(root, path, "/".join(parts))


def _ollama_model(root: Path, manifest: Path, name: str) -> _Candidate:
    content = _read_object(manifest)
    layers = [layer for layer in _list(content.get("layers")) if isinstance(layer, dict)]
    kinds = {str(layer.get("mediaType")).rpartition(".")[2]: layer for layer in layers}
    weights = kinds.get("model", {})
    blob = _blob(root, weights)
    if blob is None:
        reason = f"{manifest} names no model; type `ollama pull {name}` if you use it, edgetune needs safetensors."
        return _Candidate(name, manifest, "Ollama", Found(name, manifest, "Ollama", reason=reason))
    config = _blob(root, content.get("config"))
    about = _read_object(config) if config is not None else {}
    size = weights.get("size")
    return _gguf(
        blob,
        name,
        "Ollama",
        bytes=size if type(size) is int and size >= 0 else None,
        quantisation=_word(about.get("file_type")),
        architecture=_word(about.get("model_family")) or "unknown",
        template="template" in kinds,
    )


def _blob(root: Path, layer: Any) -> Path | None:
    digest = layer.get("digest") if isinstance(layer, dict) else None
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", digest) if isinstance(digest, str) else None
    return root / "blobs" / f"sha256-{match[1]}" if match else None


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,40}", value) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        return read_object(path, MODEL_CONFIG)
    except ModelError:
        return {}


# --- one folder -------------------------------------------------------------------------------------------------------


def _config_of(folder: Path) -> dict[str, Any]:
    return _read_object(folder / "config.json")


def _is_mlx(config: dict[str, Any]) -> bool:
    """mlx-lm writes its own `quantization` (and repeats it as quantization_config, without a method)."""
    return isinstance(config.get("quantization"), dict) and "group_size" in config["quantization"]


def _outline(folder: Path, name: str, source: str) -> Found:
    """What can be said of a folder without opening its weights."""
    config = _config_of(folder)
    files = [path for path in _listed(folder) if path.suffix in (".safetensors", ".bin", ".pth", ".pt")]
    architecture = _word(next(iter(_list(config.get("architectures"))), None)) or _word(config.get("model_type"))
    return Found(
        name, folder, source, sum(map(_size, files)), None, "unknown", architecture or "unknown", _has_template(folder)
    )


def _has_template(folder: Path) -> bool:
    try:
        return read_template(folder) is not None
    except EdgetuneError:
        return False


def _inspect(folder: Path, name: str, source: str, memory: int) -> Found:
    """The answer for a folder with a config.json. Raises what opening it raises."""
    outline = _outline(folder, name, source)
    config = _config_of(folder)
    if _is_mlx(config):
        bits = config["quantization"].get("bits")
        return replace(
            outline,
            quantisation=f"MLX {bits}-bit" if type(bits) is int else "MLX",
            reason=f"{name} is quantised by MLX, in a form that edgetune cannot train on; fetch what it was made from.",
        )
    checkpoint = open_model(folder)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(f"{folder} has neither tokenizer.json nor tokenizer.model; copy one from the model's publisher.")
    needed = _training_bytes(checkpoint)
    known = replace(
        outline,
        bytes=checkpoint.nbytes,
        parameters=checkpoint.config.parameters,
        quantisation=_quantisation(checkpoint),
        fits=needed <= memory,
        status="ready",
    )
    if not known.fits:
        short = f"Training it takes about {needed / 1e9:.1f} GB of memory, and {memory / 1e9:.1f} GB are free."
        known = replace(known, reason=short)
    if checkpoint.quant is None and checkpoint.nbytes > CONVERT_BYTES:
        command = f"Quantise it once, since doing so at each start takes long: edgetune quantize {name} DEST"
        return replace(known, status="convert", reason=f"{command}. {known.reason}".strip())
    return known


def _quantisation(checkpoint: Checkpoint) -> str:
    if checkpoint.quant is not None:
        double = " double" if checkpoint.quant.double_quant else ""
        return checkpoint.quant.quant_type + double + (", head too" if checkpoint.quantized_head else "")
    largest = max(checkpoint.stored.values(), key=lambda tensor: tensor.nbytes)
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    kind = str(largest.dtype).removeprefix("torch.")
    return names.get(kind, kind)


def _training_bytes(checkpoint: Checkpoint) -> int:
    """Peak memory of training with the default adapter on short rows, every layer in memory."""
    setting = Setting(512, Recompute.FULL, paged_optimizer=True)
    stored, lora = Stored.of(checkpoint), TrainConfig().lora()
    return budget.parts(checkpoint.config, lora, stored, setting, torch.bfloat16, budget.TORCH_BYTES).total
