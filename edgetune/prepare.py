"""Everything that is settled before step 1: what is read, what is held out, the model, and the plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune import registry
from edgetune.batches import Packer
from edgetune.config import TrainConfig, default_epochs, expand, parse_bytes
from edgetune.documents import Reading, read_notes
from edgetune.documents.document import Document
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.device import available_memory, process_memory
from edgetune.runtime.errors import DataError, ResourceError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.ops import backend_for
from edgetune.runtime.runner import Recompute, Runner
from edgetune.session import Loaded, load_base
from edgetune.split import Split, split
from edgetune.tokens import ChatFormat, TokenStore, TrainOn, tokenize

PLAN_FILE = "plan.json"
_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class Plan:
    """What a run will do. The same plan on the same machine gives the same bits."""

    steps: int
    steps_per_epoch: int
    batch_tokens: int
    row_tokens: int
    seq_len: int
    learning_rate: float
    warmup_steps: int
    evaluate_every: int
    recompute: str
    compute_dtype: str
    backend: str
    threads: int
    predicted_peak_bytes: int
    data_digest: str
    base: str
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its first step."""

    config: TrainConfig
    lora: LoraConfig
    plan: Plan
    loaded: Loaded
    runner: Runner
    packer: Packer
    held_out: TokenStore | None
    parted: Split
    folder: Path


def read(config: TrainConfig) -> tuple[Reading, Split]:
    """The notes and their two sides: all that --dry-run needs."""
    data = config.data
    if not data.notes:
        raise DataError("No notes were named; type the folder that holds them: edgetune train notes/")
    reading = read_notes(data.notes, data.exclude, keep_front_matter=data.recipe == "raw")
    if data.recipe == "chat":
        chats = [document for document in reading.documents if document.turns is not None]
        if not chats:
            raise DataError(
                f"--recipe chat found {len(reading.documents)} notes and no chats; expected .jsonl files of conversations. "
                "Type --recipe notes for notes."
            )
        reading = dataclasses.replace(reading, documents=chats)
    return reading, split(reading.documents)


def prepare(config: TrainConfig, folder: Path) -> Prepared:
    """Read the notes into `folder` as tokens, open the model, put a fresh (or named) adapter on it, write the plan."""
    if config.out is not None:
        adapters.refuse_foreign(expand(config.out))
    _, parted = read(config)
    loaded = load_base(config.model, config.device)
    _use_compute_dtype(config, loaded)
    store, held_out = _tokenize(config, parted, loaded, folder)
    lora = _attach(config, loaded)
    data = config.data
    packer = Packer(store, data.seq_len, data.batch_tokens, data.seed)
    recompute, row_tokens, estimate = _fit(config, lora, loaded)
    runner = Runner(loaded.model, recompute)
    steps = config.steps or max(1, round((config.epochs or default_epochs(packer.steps_per_epoch)) * packer.steps_per_epoch))
    plan = Plan(
        steps=steps,
        steps_per_epoch=packer.steps_per_epoch,
        batch_tokens=data.batch_tokens,
        row_tokens=row_tokens,
        seq_len=data.seq_len,
        learning_rate=config.learning_rate(loaded.model.config.hidden_size),
        warmup_steps=min(config.warmup_steps, steps // 4),
        evaluate_every=max(1, -(-steps // max(config.evaluations, 1))),
        recompute=str(recompute),
        compute_dtype=str(loaded.model.dtype).removeprefix("torch."),
        backend=backend_name(loaded.model.device),
        threads=torch.get_num_threads(),
        predicted_peak_bytes=estimate.total,
        data_digest=_digest(parted.train),
        base=loaded.checkpoint.digest,
        settings=config.as_dict(),
    )
    atomic_write(folder / PLAN_FILE, json.dumps(plan.as_dict(), indent=2, sort_keys=True) + "\n")
    return Prepared(config, lora, plan, loaded, runner, packer, held_out, parted, folder)


def backend_name(device: torch.device) -> str:
    """The back end and, for the C++ kernels, the instruction set in use."""
    module = backend_for(device)
    isa = getattr(module, "selected_isa", None)
    return f"{module.NAME}/{isa()}" if isa is not None else str(module.NAME)


def _use_compute_dtype(config: TrainConfig, loaded: Loaded) -> None:
    if config.compute != "auto":
        loaded.model.set_dtype(torch.float32 if config.compute == "fp32" else torch.bfloat16)


def _tokenize(config: TrainConfig, parted: Split, loaded: Loaded, folder: Path) -> tuple[TokenStore, TokenStore | None]:
    raw = config.data.recipe == "raw"  # the whole conversation in Guanaco's form: the QLoRA paper's own
    train_on: TrainOn = "all" if raw else "assistant"
    chat_format: ChatFormat = "guanaco" if raw else "auto"
    store = tokenize(parted.train, loaded.tokenizer, folder / "tokens", train_on, chat_format)
    if not parted.held_out:
        return store, None
    return store, tokenize(parted.held_out, loaded.tokenizer, folder / "held-out", train_on, chat_format)


def _attach(config: TrainConfig, loaded: Loaded) -> LoraConfig:
    """A fresh adapter, or the one named by --from, whose rank and targets then stand."""
    if config.from_adapter is None:
        lora = config.lora()
        adapters.attach_new(loaded.model, lora, config.data.seed)
        return lora
    base = loaded.checkpoint.digest
    path = registry.find(config.from_adapter, base)
    if path is None:
        return _attach(dataclasses.replace(config, from_adapter=None), loaded)
    stored = registry.load_for(path, base)
    lora = dataclasses.replace(stored.config, dropout=config.dropout)
    adapters.attach(loaded.model, Adapter(lora, stored.tensors, stored.about))
    return lora


def _fit(config: TrainConfig, lora: LoraConfig, loaded: Loaded) -> tuple[Recompute, int, budget.Parts]:
    """Recomputation and row length within --memory, or within most of what is free."""
    data, model = config.data, loaded.model
    memory = parse_bytes(config.memory) if config.memory else int(_SHARE_OF_FREE_MEMORY * available_memory()) + process_memory()
    wanted = list(Recompute) if config.recompute == "auto" else [Recompute(config.recompute)]
    chosen = budget.choose(
        model.config,
        lora,
        loaded.checkpoint.nbytes,
        data.batch_tokens,
        data.seq_len,
        model.dtype.itemsize,
        memory,
        wanted,
    )
    if chosen is None:
        least = budget.parts(model.config, lora, loaded.checkpoint.nbytes, data.seq_len, wanted[-1], model.dtype.itemsize).total
        raise ResourceError(
            f"Training needs {least / 1e9:.2f} GB and may use {memory / 1e9:.2f} GB; "
            f"type --memory {least / 1e9 + 0.01:.2f}GB, a shorter --seq-len, a lower --rank or a smaller --model."
        )
    return chosen


def _digest(documents: list[Document]) -> str:
    """What was trained on, by the documents' own digests."""
    return hashlib.sha256("\n".join(sorted(document.digest for document in documents)).encode()).hexdigest()
