"""Everything that is settled before step 1: what is read, what is held out, the model, and the plan. And settled again
from its record, when a run is gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.config import TrainConfig
from edgetune.dataset.packing import Packer
from edgetune.dataset.token_store import ChatFormat, TokenStore, TrainOn, tokenize
from edgetune.documents.document import Document, Reading
from edgetune.documents.heldout import Split, split
from edgetune.documents.reading import read_notes
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import Base, Loaded, load_base
from edgetune.memory_settings import choose_or_refuse, number_format, planned_steps
from edgetune.runtime import adapter as adapters
from edgetune.runtime import ops
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.budget import Setting, Stored, Vocabulary
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import AdapterError, DataError, ModelError, UsageError
from edgetune.runtime.files import sha256_file
from edgetune.runtime.heap import compact_heap, steady_heap
from edgetune.runtime.runner import Recompute, Runner
from edgetune.runtime.tokenizer import Tokenizer

TOKENS, HELD_OUT = "tokens", "held-out"
_PROMPTS, _PROMPT_FROM, _PROMPT_CHARS = 3, 4000, 60


@dataclass(frozen=True)
class Plan:
    """What a run will do. The same plan on the same machine gives the same bits."""

    steps: int
    steps_per_epoch: int
    batch_tokens: int
    setting: Setting
    seq_len: int
    learning_rate: float
    warmup_steps: int
    evaluate_every: int
    compute_dtype: str
    int8: bool
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
class Record:
    """A run's plan, and what else about its beginning cannot be found out again: the notes may change or go."""

    run: str
    plan: Plan
    lora: LoraConfig
    documents: int
    heldout_paths: tuple[str, ...]
    prompts: tuple[str, ...]
    notes: str  # digest over both sides of the split
    torch: str
    files: dict[str, str]  # sha256 of the token files

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def shared(self) -> Record:
        """What another process of the run needs to know: no path, no text, nothing of the held-out notes."""
        files = {name: digest for name, digest in self.files.items() if name.startswith(f"{TOKENS}/")}
        plan = dataclasses.replace(self.plan, settings={})
        return dataclasses.replace(self, run="", plan=plan, heldout_paths=(), prompts=(), notes="", files=files)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Record:
        """What `as_dict` gave, as JSON returns it."""
        lora = LoraConfig(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
        paths, prompts = tuple(values["heldout_paths"]), tuple(values["prompts"])
        setting = values["plan"]["setting"]
        enums = {"recompute": Recompute(setting["recompute"]), "in_file": Vocabulary(setting["in_file"])}
        setting = Setting(**{**setting, **enums})
        plan = Plan(**{**values["plan"], "setting": setting})
        return cls(**{**values, "plan": plan, "lora": lora, "heldout_paths": paths, "prompts": prompts})


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step."""

    config: TrainConfig
    record: Record
    loaded: Loaded
    runner: Runner
    packer: Packer
    held_out: TokenStore | None
    folder: Path
    """The unfinished run's own: tokens, and what is paged to files."""

    @property
    def plan(self) -> Plan:
        """What the run will do."""
        return self.record.plan

    @property
    def lora(self) -> LoraConfig:
        """The shape of its adapter."""
        return self.record.lora


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


def prepare(config: TrainConfig, base: Base, folder: Path, run: str = "", processes: int = 1, here: int = 1) -> Prepared:
    """Read the notes into `folder` as tokens, load the model, put a fresh (or named) adapter on it, make the plan.

    The plan is for so many processes, `here` of them on this machine.
    """
    _, parted = read(config)
    choice, checkpoint = base
    device = pick_device(config.device)
    store, held_out = tokenize_notes(config, parted, Tokenizer.load(choice.path), folder)
    data, (dtype, int8) = config.data, number_format(config.compute, device)
    adapter = named_adapter(config, checkpoint)
    lora = config.lora() if adapter is None else adapter.config
    stored = Stored.of(checkpoint)
    chosen = choose_or_refuse(checkpoint.config, lora, stored, config, dtype, device.type, processes, here)
    loaded = _load(config, base, dtype, chosen.setting)
    if adapter is None:
        adapters.attach_new(loaded.model, lora, data.seed)
    else:
        adapters.attach(loaded.model, adapter)
    packer = Packer(store, data.seq_len, data.batch_tokens, data.seed)
    steps = planned_steps(config, packer.steps_per_epoch)
    plan = Plan(
        steps=steps,
        steps_per_epoch=packer.steps_per_epoch,
        batch_tokens=data.batch_tokens,
        setting=chosen.setting,
        seq_len=data.seq_len,
        learning_rate=config.learning_rate(loaded.model.config.hidden_size),
        warmup_steps=min(config.warmup_steps, steps // 4),
        evaluate_every=max(1, -(-steps // max(config.evaluations, 1))),
        compute_dtype=str(loaded.model.dtype).removeprefix("torch."),
        int8=int8,
        backend=ops.backend_name(loaded.model.device),
        threads=torch.get_num_threads(),
        predicted_peak_bytes=chosen.parts.total,
        data_digest=_digest(parted.train),
        base=checkpoint.digest,
        settings=config.as_dict(),
    )
    record = Record(
        run=run,
        plan=plan,
        lora=lora,
        documents=len(parted.train),
        heldout_paths=tuple(document.path for document in parted.held_out),
        prompts=tuple(beginning(document) for document in (parted.held_out or parted.train)[:_PROMPTS]),
        notes=_digest(parted.train + parted.held_out),
        torch=torch.__version__,
        files=_token_files(folder),
    )
    return Prepared(config, record, loaded, _runner(loaded, plan, folder), packer, held_out, folder)


def prepare_again(config: TrainConfig, base: Base, folder: Path, record: Record, begun: bool) -> Prepared:
    """The run of `record` with the tokens in `folder`. One that has `begun` brings its adapter's values with it.

    Raises DataError where the tokens are not those of the record.
    """
    plan = record.plan
    if _token_files(folder) != record.files:
        raise DataError(f"The tokens in {folder} are damaged; type the same command with --fresh.")
    loaded = _load(config, base, getattr(torch, plan.compute_dtype), plan.setting)
    adapter = None if begun else named_adapter(config, loaded.checkpoint)
    if adapter is None:
        adapters.attach_new(loaded.model, record.lora, config.data.seed)
    else:
        adapters.attach(loaded.model, adapter)
    if plan.threads != torch.get_num_threads():
        torch.set_num_threads(plan.threads)
    packer = Packer(TokenStore.open(folder / TOKENS), plan.seq_len, plan.batch_tokens, config.data.seed)
    held_out = TokenStore.open(folder / HELD_OUT) if record.heldout_paths else None
    return Prepared(config, record, loaded, _runner(loaded, plan, folder), packer, held_out, folder)


def prepare_beside(config: TrainConfig, base: Base, folder: Path, record: Record) -> Prepared:
    """A follower's side of the run whose leader shared `record`: its own notes, as tokens in `folder`, and its own model.

    Raises ModelError or DataError where they are not the leader's, and UsageError where this machine cannot multiply as the
    leader does. The adapter's values are the leader's to give.
    """
    choice, checkpoint = base
    if checkpoint.digest != record.plan.base:
        raise ModelError("The model here is not that of process 0; copy the same folder to every machine.")
    if record.plan.int8 and not ops.fuses(pick_device(config.device), getattr(torch, record.plan.compute_dtype)):
        raise UsageError(
            "Process 0 multiplies in 8 bits, and the machine of another process has no AMX or no kernels for it; type "
            "--compute bf16, the same for all processes."
        )
    _, parted = read(config)
    tokenize_notes(config, Split(parted.train, []), Tokenizer.load(choice.path), folder)
    if _token_files(folder) != record.files:
        raise DataError(
            "The notes here are not those of this run; copy the same folder to every machine, and type --fresh where they "
            "have changed since it began."
        )
    plan = dataclasses.replace(record.plan, threads=torch.get_num_threads())
    return prepare_again(config, base, folder, dataclasses.replace(record, plan=plan), begun=True)


def changes_since(prepared: Prepared) -> list[str]:
    """What is no longer as it was when this run began: a sentence each."""
    record, told = prepared.record, []
    try:
        _, parted = read(prepared.config)
        if _digest(parted.train + parted.held_out) != record.notes:
            told.append(
                "The notes have changed since this run began; it goes on with them as they were, "
                "and --fresh starts over with the new ones."
            )
    except DataError:
        told.append("The notes cannot be read any more; the run goes on with them as they were when it began.")
    then, now = (record.torch, record.plan.backend), (torch.__version__, ops.backend_name(prepared.loaded.model.device))
    if then != now:
        told.append(
            f"The run began with torch {then[0]} on {then[1]} and goes on with torch {now[0]} on {now[1]}: "
            "the last bits of the adapter may differ from those of a run in one piece."
        )
    model = prepared.loaded.model
    if record.plan.int8 and not ops.fuses(model.device, model.dtype):
        told.append(
            "The run began with products in 8 bits, which nothing here makes; it goes on in bf16, and the adapter will not be "
            "that of a run in one piece."
        )
    return told


def beginning(document: Document) -> str:
    """The first words of a note's first paragraph, its heading and tags left out: a prompt that invites the note's voice."""
    lines = (line.strip() for line in document.text[:_PROMPT_FROM].splitlines())
    body = next((line for line in lines if line and not line.startswith(("#", "Tags:"))), document.text[:_PROMPT_CHARS])
    return body if len(body) <= _PROMPT_CHARS else body[:_PROMPT_CHARS].rsplit(" ", 1)[0]


def _token_files(folder: Path) -> dict[str, str]:
    """Digests of the token files, by their places in `folder`."""
    files = sorted(path for side in (TOKENS, HELD_OUT) for path in (folder / side).glob("*"))
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _load(config: TrainConfig, base: Base, dtype: torch.dtype, setting: Setting) -> Loaded:
    steady_heap()  # before any thread of the kernels'
    if setting.compact:
        compact_heap()
    loaded = load_base(base, config.device, layer_memory=setting.layer_memory, in_file=setting.in_file)
    loaded.model.set_dtype(dtype)
    return loaded


def _runner(loaded: Loaded, plan: Plan, folder: Path) -> Runner:
    setting = plan.setting
    return Runner(loaded.model, setting.recompute, setting.loss_rows, folder if setting.offload else None, plan.int8)


def tokenize_notes(
    config: TrainConfig, parted: Split, tokenizer: Tokenizer, folder: Path
) -> tuple[TokenStore, TokenStore | None]:
    """Both sides of the split as tokens, in `folder`."""
    raw = config.data.recipe == "raw"  # the whole conversation in Guanaco's form: the QLoRA paper's own
    train_on: TrainOn = "all" if raw else "assistant"
    chat_format: ChatFormat = "guanaco" if raw else "auto"
    store = tokenize(parted.train, tokenizer, folder / TOKENS, train_on, chat_format)
    if not parted.held_out:
        return store, None
    return store, tokenize(parted.held_out, tokenizer, folder / HELD_OUT, train_on, chat_format)


def named_adapter(config: TrainConfig, base: Checkpoint) -> Adapter | None:
    """The adapter named by --from, whose rank and targets then stand."""
    path = registry.find(config.from_adapter, base.digest) if config.from_adapter is not None else None
    if path is None:
        return None
    stored = registry.load_for(path, base)
    if stored.layers is not None:
        raise AdapterError(
            f"The adapter {path.name} is on {len(stored.layers)} layers alone; name one with --from that is on all."
        )
    return Adapter(dataclasses.replace(stored.config, dropout=config.dropout), stored.tensors, stored.about)


def _digest(documents: list[Document]) -> str:
    """What was trained on, by the documents' own digests."""
    return hashlib.sha256("\n".join(sorted(document.digest for document in documents)).encode()).hexdigest()
