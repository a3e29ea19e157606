"""Sets a run up: reads and tokenizes the notes, loads the model, and makes the plan or takes it from the record."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.dataset.packing import Packer
from edgetune.dataset.token_store import TokenStore
from edgetune.documents.document import Document
from edgetune.documents.lineage import Lineage
from edgetune.documents.summary import sentences
from edgetune.library import adapter_registry as registry
from edgetune.library.adapter_notices import adapter_notices
from edgetune.library.loading import Base, Loaded, load_base, load_tokenizer
from edgetune.memory_settings import Choice, choose_or_refuse, memory_allowed, number_format, planned_steps
from edgetune.privacy.secret_source import new_key
from edgetune.progress import SILENT, Progress, Stages, ignore
from edgetune.runtime import adapter as adapters
from edgetune.runtime import ops
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.budget import Setting, Stored, WeightForm
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import AdapterError, DataError, ModelError, UsageError
from edgetune.runtime.files import sha256_file
from edgetune.runtime.heap import compact_heap, steady_heap
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training import leak_evidence
from edgetune.training.anchor import ANCHOR, REPLIES, AnchorPlan, make_anchor, open_anchor
from edgetune.training.plan import HELD_OUT, TOKENS, Plan, RunRecord
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.private_plan import PrivatePlan, check_parent, in_words, packer_for, peak_rate, plan_private
from edgetune.training.recorded import Recorded, begin_entry, gone_notice
from edgetune.training.run_notes import ChosenNotes, choose_notes, documents_digest, read_and_split
from edgetune.training.samples import sample_prompts
from edgetune.training.schedule import Schedule, evaluation_schedule, trained_tokens
from edgetune.training.tokenized_notes import TokenizedNotes, tokenize_notes
from edgetune.weight_forms import forms_for_training


def prepare_new(
    config: TrainConfig,
    base: Base,
    folder: Path,
    run: str = "",
    processes: int = 1,
    local_processes: int = 1,
    stages: Stages = SILENT,
    also: Sequence[Document] = (),
    recorded: Recorded | None = None,
) -> PreparedRun:
    """Set up a new run: tokenize the notes into `folder`, load the model, attach a fresh (or the named) adapter, make the plan.

    run: name of the run. The plan is for `processes` processes, `local_processes` of them on this machine. also: documents to
    train on beside the notes. recorded: the run that it repeats.
    """
    choice, checkpoint = base
    settings, given, config = config.as_dict(), config, fit_rows(config, checkpoint.config)
    adapter = named_adapter(config, checkpoint)
    check_parent(config, adapter, processes)
    read = choose_notes(config, adapter, processes, stages.of("reading"), None if recorded is None else recorded.read)
    read = read.with_documents(also)
    device = pick_device(config.device)
    tokenizer = load_tokenizer(choice)
    notes = tokenize_notes(config, read.split, tokenizer, folder, stages.of("tokenizing"))
    store, held_out = notes.train, notes.held_out
    data, (dtype, multiplies_int8) = config.data, number_format(config.compute, device)
    lora = config.lora() if adapter is None else adapter.config
    # Memory is planned before any weight is read: a run that does not fit must fail at once.
    forms = _forms(config, checkpoint, adapter)
    if recorded is None:
        chosen = choose_or_refuse(checkpoint.config, lora, forms, config, dtype, device.type, processes, local_processes)
    else:
        chosen = recorded.choice(checkpoint.config, lora, forms, dtype, device.type)
        torch.set_num_threads(recorded.threads)
    int8 = multiplies_int8 and chosen.stored.form is WeightForm.NF4
    packer = packer_for(config, store, data.seq_len)
    steps = planned_steps(config, packer.steps_per_epoch)
    private = plan_private(config, packer, steps, adapter, run)
    loaded = _load(config, base, dtype, chosen.setting, chosen.stored.form, stages)
    # Before an adapter is attached: the anchor is what the bare base says.
    asked = None if recorded is None else recorded.asked
    anchor = make_anchor(config, loaded, folder, chosen.setting.row_tokens, trained_tokens(packer, steps), stages, asked)
    _attach(loaded, adapter, lora, data.seed)
    memory = memory_allowed(config, device.type, local_processes)
    has_replies = (folder / REPLIES).exists()
    schedule = evaluation_schedule(config, packer, steps, held_out, int8, loaded, chosen, memory, has_replies, recorded)
    digest = documents_digest(notes.split.train, data)
    plan = _plan(config, settings, loaded, chosen, packer, schedule, int8, anchor, digest, private)
    record = RunRecord(
        run=run,
        plan=plan,
        lora=lora,
        documents=len(store.documents),
        heldout_paths=tuple(document.path for document in held_out.documents) if held_out is not None else (),
        # A report of private training quotes no note that was trained on.
        prompts=sample_prompts(
            notes.split.held_out or ([] if private else notes.split.train), tokenizer, _uses_template(config, tokenizer)
        ),
        notices=(
            *_notices(config, read, notes, adapter, checkpoint, tokenizer),
            *gone_notice(config, plan.base, read.reading),
            *((in_words(private),) if private else ()),
        ),
        notes=documents_digest(read.reading.documents, data),
        torch=torch.__version__,
        files=_token_files(folder),
        lineage=Lineage.after(read.reading.documents, notes.split.cuts, read.lineage).as_dict(),
        masked=read.reading.masked,
        new_documents=read.new,
        changed_documents=read.changed,
        noise_key=new_key() if private else "",
    )
    if config.out is None:
        name, split = loaded.choice.name, notes.split
        begin_entry(given, plan.base, name, plan.as_dict(), run, processes, read.reading, split, folder)
    return _prepared(config, record, loaded, packer, held_out, folder)


def _forms(config: TrainConfig, checkpoint: Checkpoint, adapter: Adapter | None) -> list[Stored]:
    """Return the sizes of the base in each form that its weights may take, the preferred form first."""
    about = None if adapter is None else adapter.about
    return [Stored.of(checkpoint, form) for form in forms_for_training(config.weights, config.compute, checkpoint, about)]


def _notices(
    config: TrainConfig,
    read: ChosenNotes,
    notes: TokenizedNotes,
    adapter: Adapter | None,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
) -> tuple[str, ...]:
    """Return sentences for the user about the notes and about the adapter to start from."""
    about_adapter = adapter_notices(config.from_adapter, adapter, checkpoint, tokenizer)
    return (*sentences(read.reading), *read.notices, *notes.notices, *about_adapter)


def _plan(
    config: TrainConfig,
    settings: dict[str, Any],
    loaded: Loaded,
    chosen: Choice,
    packer: Packer,
    schedule: Schedule,
    int8: bool,
    anchor: AnchorPlan | None,
    data_digest: str,
    private: PrivatePlan | None,
) -> Plan:
    """Write down the plan of a run. settings: those of `config` as they were asked for, JSON-ready."""
    data, steps = config.data, planned_steps(config, packer.steps_per_epoch)
    return Plan(
        steps=steps,
        steps_per_epoch=packer.steps_per_epoch,
        batch_tokens=data.batch_tokens,
        setting=chosen.setting,
        weights=chosen.stored.form,
        base_bytes=chosen.parts.weights + chosen.parts.embeddings,
        seq_len=data.seq_len,
        learning_rate=peak_rate(config, loaded.model.config.hidden_size),
        warmup_steps=min(config.warmup_steps, steps // 4),
        evaluate_every=schedule.every,
        evaluate_tokens=schedule.tokens,
        published_scores=schedule.published_scores,
        gate_scores=schedule.gate_scores,
        leak_tokens=leak_evidence.planned_tokens(config, trained_tokens(packer, steps), int8),
        compute_dtype=str(loaded.model.dtype).removeprefix("torch."),
        int8=int8,
        backend=ops.backend_name(loaded.model.device),
        threads=torch.get_num_threads(),
        predicted_peak_bytes=chosen.parts.total,
        data_digest=data_digest,
        base=loaded.checkpoint.digest,
        settings=settings,
        anchor=anchor,
        private=private,
    )


def _attach(loaded: Loaded, adapter: Adapter | None, lora: LoraConfig, seed: int) -> None:
    """Attach a stored adapter to the model or, where there is none, a fresh one of the shape `lora`."""
    if adapter is None:
        adapters.attach_new(loaded.model, lora, seed)
    else:
        adapters.attach(loaded.model, adapter)


def prepare_resumed(
    config: TrainConfig, base: Base, folder: Path, record: RunRecord, has_steps: bool, stages: Stages = SILENT
) -> PreparedRun:
    """Set up the run of `record` again, from the token stores in `folder`.

    has_steps: a checkpoint will bring the adapter's values, so the adapter named by --from is not read again.
    Raises DataError where the token files are not those of the record.
    """
    plan = record.plan
    if _token_files(folder) != record.files:
        raise DataError(f"The tokens in {folder} are damaged. Type the same command with --fresh.")
    loaded = _load(config, base, getattr(torch, plan.compute_dtype), plan.setting, plan.weights, stages)
    adapter = None if has_steps else named_adapter(config, loaded.checkpoint)
    _attach(loaded, adapter, record.lora, config.data.seed)
    # Another number of threads sums in another order, and so gives other bits.
    if plan.threads != torch.get_num_threads():
        torch.set_num_threads(plan.threads)
    packer = packer_for(config, TokenStore.open(folder / TOKENS), plan.seq_len)
    held_out = TokenStore.open(folder / HELD_OUT) if record.heldout_paths else None
    return _prepared(config, record, loaded, packer, held_out, folder)


def prepare_follower(config: TrainConfig, base: Base, folder: Path, record: RunRecord) -> PreparedRun:
    """Set up a follower of the run whose leader sent `record`, with this machine's own notes and model.

    The notes are tokenized into `folder`, where the leader's anchor lies already; the adapter's values come from the leader
    later. Raises ModelError or DataError where the model or the notes differ from the leader's, and UsageError where this
    machine cannot multiply as the leader does.
    """
    choice, checkpoint = base
    config = fit_rows(config, checkpoint.config)
    if checkpoint.digest != record.plan.base:
        raise ModelError("The model on this machine is not the model of process 0. Copy the same folder to every machine.")
    if record.plan.int8 and not ops.fuses(pick_device(config.device), getattr(torch, record.plan.compute_dtype)):
        raise UsageError(
            "Process 0 multiplies in 8 bits, and the machine of another process has no kernels for it. Type "
            "--compute bf16 or fp32, the same for all processes."
        )
    _, split = read_and_split(config)
    tokenize_notes(config, split, load_tokenizer(choice), folder)
    shutil.rmtree(folder / HELD_OUT, ignore_errors=True)  # process 0 alone evaluates
    if _token_files(folder) != record.files:
        raise DataError(
            "The notes on this machine are not the notes of this run. Copy the same folder to every machine, and type --fresh "
            "if they have changed since the run began."
        )
    # Threads are each machine's own: the leader's copies keep the processes together (see TrainStep.sync_with_leader).
    plan = dataclasses.replace(record.plan, threads=torch.get_num_threads())
    return prepare_resumed(config, base, folder, dataclasses.replace(record, plan=plan), has_steps=True)


def changes_since_start(run: PreparedRun, progress: Progress = ignore) -> list[str]:
    """Return a sentence for everything that has changed since an interrupted run began: notes, torch, kernels."""
    record, model, changes = run.record, run.loaded.model, []
    try:
        reading, _ = read_and_split(run.config, progress)
        if documents_digest(reading.documents, run.config.data) != record.notes:
            changes.append(
                "The notes have changed since this run began. It continues with the notes as they were then; "
                "type --fresh to start over with the new ones."
            )
    except DataError:
        changes.append("The notes can no longer be read. The run continues with the notes as they were when it began.")
    then, now = (record.torch, record.plan.backend), (torch.__version__, ops.backend_name(model.device))
    if then != now:
        changes.append(
            f"The run began with torch {then[0]} on {then[1]} and continues with torch {now[0]} on {now[1]}: "
            "the last bits of the adapter may differ from those of an uninterrupted run."
        )
    if record.plan.int8 and not ops.fuses(model.device, model.dtype):
        changes.append(
            "The run began with products in 8 bits, which are not available here. It continues with products in "
            f"{record.plan.compute_dtype}, so the adapter will differ from that of an uninterrupted run."
        )
    return changes


def fit_rows(config: TrainConfig, model: LlamaConfig) -> TrainConfig:
    """Return the settings with rows that the model has positions for: the default row length is cut, another is refused.

    Beyond its positions a model was never trained and predicts badly, but nothing fails. Raises UsageError.
    """
    data, longest = config.data, model.longest_row
    if data.seq_len <= longest:
        return config
    if data.seq_len != DataConfig.seq_len:
        raise UsageError(
            f"--seq-len is {data.seq_len}, and this model has {longest} positions. Type --seq-len {longest} or less."
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, seq_len=longest))


def _evaluation_set(held_out: TokenStore | None, plan: Plan) -> EvaluationSet | None:
    """Return what the plan's evaluations score; None if nothing is held out, or no token of it can be scored."""
    whole = None if held_out is None else EvaluationSet.of(held_out, plan.seq_len)
    return whole.limited(plan.evaluate_tokens) if whole is not None and len(whole.order) else None


def _token_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of tokens and of the anchor, by its path in `folder`."""
    files = sorted(path for side in (TOKENS, HELD_OUT, ANCHOR, REPLIES) for path in (folder / side).glob("*"))
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _load(config: TrainConfig, base: Base, dtype: torch.dtype, setting: Setting, form: WeightForm, stages: Stages) -> Loaded:
    """Load the model as `setting` says, its linears in `form` and its activations in `dtype`."""
    steady_heap()  # must come before the kernels start any thread
    if setting.compact:
        compact_heap()
    progress = stages.of("loading")
    loaded = load_base(
        base, config.device, layer_memory=setting.layer_memory, in_file=setting.in_file, progress=progress, form=form
    )
    loaded.model.set_dtype(dtype)
    return loaded


def _prepared(
    config: TrainConfig, record: RunRecord, loaded: Loaded, packer: Packer, held_out: TokenStore | None, folder: Path
) -> PreparedRun:
    """Put a run together from what its setup has made. Raises DataError for a damaged anchor."""
    plan, setting = record.plan, record.plan.setting
    runner = Runner(loaded.model, setting.recompute, setting.loss_rows, folder if setting.offload else None, plan.int8)
    anchor = open_anchor(folder, plan.anchor, plan.seq_len)
    kept = folder / REPLIES
    replies = _evaluation_set(TokenStore.open(kept) if kept.exists() else None, plan)
    return PreparedRun(config, record, loaded, runner, packer, _evaluation_set(held_out, plan), anchor, replies, folder)


def _uses_template(config: TrainConfig, tokenizer: Tokenizer) -> bool:
    """Return True if chats are trained as the model's chat template writes them, and not in Guanaco's form."""
    return tokenizer.has_template and config.data.recipe != "raw"


def named_adapter(config: TrainConfig, base: Checkpoint) -> Adapter | None:
    """Return the adapter named by --from (its rank and targets replace the config's), or None if none is named."""
    path = registry.find(config.from_adapter, base.digest) if config.from_adapter is not None else None
    if path is None:
        return None
    stored = registry.load_for(path, base)
    adapters.check_fits(stored, base.config)
    if stored.layers is not None:
        raise AdapterError(
            f"The adapter {path.name} covers only {len(stored.layers)} layers. Name one with --from that covers all layers."
        )
    if not (stored.is_uniform and stored.covers(base.config.num_layers)):
        raise AdapterError(
            f"The adapter {path.name} has other targets, ranks or alphas in some layers than in others. Name one with --from "
            "that adapts every layer alike."
        )
    return Adapter(dataclasses.replace(stored.config, dropout=config.dropout), stored.tensors, stored.about)
