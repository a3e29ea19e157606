"""Predicts what a training run will take, for `edgetune plan`: memory by part, tokens per second, time.

The time of a step is measured on one and on two layers of the model's shape with random weights, and on a part of its loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.config import TrainConfig
from edgetune.library.loading import Base, load_tokenizer, open_base
from edgetune.machine.load import BUSY_SHARE, Load
from edgetune.machine.shapes import PLANNED, SHAPES
from edgetune.machine.synthetic import random_batch, random_llama
from edgetune.memory_settings import (
    COMPACT_SLOWDOWN,
    FILE_SPEED,
    UNHIDDEN_READ_SHARE,
    advice,
    choose_form,
    described_format,
    file_bytes,
    least_of,
    memory_allowed,
    number_format,
    planned_steps,
    process_bytes,
)
from edgetune.progress import Progress, Show, Stages, ignore
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget
from edgetune.runtime.budget import Setting, Stored, WeightForm
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import DeviceError, UsageError
from edgetune.runtime.loss import warm_up_head
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import read_template
from edgetune.scratch import scratch_folder
from edgetune.training.private_plan import BATCHES, packer_for
from edgetune.training.run_notes import choose_notes
from edgetune.training.setup import fit_rows, named_adapter
from edgetune.training.tokenized_notes import tokenize_notes
from edgetune.weight_forms import forms_for_training, forms_of_shape

_RUNS = 3
"""Times that each part is run to be timed; the first one warms up. Chosen by hand."""


@dataclass(frozen=True)
class Forecast:
    """The result of `edgetune plan`. Speed and time are None if they cannot be measured here, time also without notes.

    Both are of a machine that no other program uses; `seconds_if_busy` is of this machine as it was.
    """

    model: str
    device: str
    fits: bool
    memory_bytes: int
    peak_memory_bytes: int
    least_memory_bytes: int
    parts: dict[str, int]
    setting: dict[str, Any]
    weights: str
    """Form of the base's linears in memory, one of WEIGHTS but auto."""
    head: str
    """Form in which the head is stored: the name of a dtype, or "nf4"."""
    tokens_per_second: float | None
    seconds: float | None
    seconds_if_busy: float | None
    """Seconds of the run if other programs go on as they did while the speed was measured; `seconds` if they left it alone."""
    others_cpu_share: float | None
    """Share of all processors (0 to 1) that other programs used while the speed was measured."""
    steps: int | None
    tokens: int | None
    advice: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast, ready for JSON."""
        return dataclasses.asdict(self)


def forecast(train: TrainConfig, show: Show = lambda event: None) -> Forecast:
    """Predict what `edgetune train` would take with these settings, without reading any weights.

    show: receives progress as events.Working.
    Raises EdgetuneError for a model, an adapter, a device or notes that cannot be used.
    """
    name, config, forms, base = _model(train, show)
    checkpoint = None if base is None else base[1]
    train, stages = fit_rows(train, config), Stages(show)
    device_name, here, dtype, int8 = _device(train)
    lora, data = _lora(train, checkpoint), train.data
    steps, tokens = (train.steps, None) if base is None or not data.notes else _work(train, base, stages)
    memory, process = memory_allowed(train, device_name), process_bytes(device_name) if here else 0
    smallest = least_of(config, lora, forms, data, dtype, process, device_name, train.recompute)
    choice = choose_form(config, lora, forms, data, dtype, memory, process, device_name, train.recompute)
    shown = choice or smallest
    stored = shown.stored
    speed = seconds = None
    load = Load(torch.get_num_threads())
    if choice is not None and here and device_name == "cpu":
        step = seconds_a_step(config, lora, stored, shown.setting, data.batch_tokens, dtype, int8, stages.of("timing"), load)
        step /= 1 - train.anchor_share(config.hidden_size, checkpoint is None or read_template(checkpoint.folder) is not None)
        speed = data.batch_tokens / step
        # A private step reads several batches. That it reads documents one after another is not counted: it depends on them.
        batches = 1.0 if train.private is None else BATCHES
        seconds = step * batches * steps if steps is not None else None
    return Forecast(
        model=name,
        device=device_name,
        fits=choice is not None,
        memory_bytes=memory,
        peak_memory_bytes=shown.parts.total,
        least_memory_bytes=smallest.parts.total,
        parts=dataclasses.asdict(shown.parts),
        setting=dataclasses.asdict(shown.setting),
        weights=stored.form,
        head=_head_form(stored),
        tokens_per_second=speed,
        seconds=seconds,
        seconds_if_busy=None if seconds is None else seconds * (load.slowdown if load.others >= BUSY_SHARE else 1.0),
        others_cpu_share=None if speed is None else load.others,
        steps=steps,
        tokens=tokens,
        advice=None if choice is not None else advice(smallest.stored, smallest.parts.total),
    )


def _device(train: TrainConfig) -> tuple[str, bool, torch.dtype, bool]:
    """Return the device's name, True if this machine has it, the dtype of its products, and True if they are in 8 bits.

    Raises DeviceError for a device that is not here, unless --memory describes the machine that is meant.
    """
    try:
        device = pick_device(train.device)
    except DeviceError:
        if train.memory is None:
            raise
        return train.device, False, described_format(train.compute), False
    return device.type, True, *number_format(train.compute, device)


def _head_form(stored: Stored) -> str:
    return "nf4" if stored.head_dtype is None else str(stored.head_dtype).removeprefix("torch.")


def _model(train: TrainConfig, show: Show) -> tuple[str, LlamaConfig, list[Stored], Base | None]:
    """Return name, config, sizes in each form and files of a model on this machine, or of a shape in SHAPES.

    A shape has no files; it counts as stored in NF4 or in bf16, whichever is asked for.
    """
    name = train.model
    if name in PLANNED and not Path(name).exists():
        shape = SHAPES[name]
        forms = forms_of_shape(train.weights, train.compute, shape)
        return name, shape, [Stored.shaped(shape, form, mapped=form is not WeightForm.INT8) for form in forms], None
    choice, checkpoint = open_base(name, show)
    adapter = named_adapter(train, checkpoint)
    forms = forms_for_training(train.weights, train.compute, checkpoint, None if adapter is None else adapter.about)
    return choice.name, checkpoint.config, [Stored.of(checkpoint, form) for form in forms], (choice, checkpoint)


def _lora(train: TrainConfig, checkpoint: Checkpoint | None) -> LoraConfig:
    """Return the adapter's shape, or that of the one named by --from. Raises AdapterError if that one does not fit."""
    if train.from_adapter is None:
        return train.lora()
    if checkpoint is None:
        raise UsageError(
            "--from names an adapter, but this model is only a shape; type the adapter's --rank and --targets instead."
        )
    adapter = named_adapter(train, checkpoint)
    if adapter is None:
        return train.lora()
    adapters.check_fits(adapter, checkpoint.config)
    return adapter.config


def _work(train: TrainConfig, base: Base, stages: Stages) -> tuple[int, int]:
    """Return the number of steps in a run on these notes, and of tokens trained in it."""
    choice, checkpoint = base
    split = choose_notes(train, named_adapter(train, checkpoint), progress=stages.of("reading")).split
    with scratch_folder() as scratch:
        store = tokenize_notes(train, split, load_tokenizer(choice), scratch, stages.of("tokenizing")).train
        packer = packer_for(train, store, train.data.seq_len)
        steps = planned_steps(train, packer.steps_per_epoch)
        return steps, round(steps / packer.steps_per_epoch * store.trained_tokens)


def seconds_a_step(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    setting: Setting,
    batch_tokens: int,
    dtype: torch.dtype,
    int8: bool,
    progress: Progress = ignore,
    load: Load | None = None,
) -> float:
    """Predict the seconds of a step on a machine that no other program uses.

    One and two layers are measured, and their difference stands for each further layer. So it is with the loss, of which one
    chunk is measured: a small model with a large vocabulary spends most of a step there. The time of reading and writing files
    is computed from FILE_SPEED, a nominal figure. load: notes what other programs did meanwhile.
    """
    load = load or Load(torch.get_num_threads())
    seconds = [_seconds_on_layers(config, lora, stored.form, setting, dtype, int8, layers, progress, load) for layers in (1, 2)]
    (one, chunk), (two, again) = seconds
    layer, chunks = max(two - one, 0.0), -(-setting.row_tokens // setting.loss_rows)
    row = one + layer * (config.num_layers - 1) + min(chunk, again) * (chunks - 1)
    row *= COMPACT_SLOWDOWN if setting.compact else 1.0
    rows = -(-batch_tokens // setting.row_tokens)
    read = budget.streamed_bytes(config, stored, setting) / FILE_SPEED
    files = file_bytes(config, lora, stored, setting, batch_tokens)
    return rows * (max(row, read) + UNHIDDEN_READ_SHARE * read) + files / FILE_SPEED


def _seconds_on_layers(
    config: LlamaConfig,
    lora: LoraConfig,
    form: WeightForm,
    setting: Setting,
    dtype: torch.dtype,
    int8: bool,
    layers: int,
    progress: Progress,
    load: Load,
) -> tuple[float, float]:
    """Return the seconds of one row with one chunk of its loss, and of that chunk, on one or two layers of random weights."""
    done, total = (layers - 1) * (_RUNS + 1), 2 * (_RUNS + 1)
    progress(done, total)
    few = dataclasses.replace(config, num_layers=layers, windows=(config.windows * 2)[:layers])
    model = random_llama(few, dtype, form=form)
    adapters.attach_new(model, lora, 0)
    runner = Runner(model, setting.recompute, setting.loss_rows, int8=int8)
    optimizer = PagedAdamW(adapters.parameters(model))
    row = random_batch(config, setting.row_tokens)
    row.loss_mask[setting.loss_rows :] = 0.0

    def step() -> None:
        runner.train(row, dropout_key=1 if lora.dropout else None)
        optimizer.step(1e-4)
        optimizer.zero_grad()

    seconds = []
    for run in range(_RUNS):
        seconds.append(load.seconds(step))
        progress(done + 1 + run, total)
    chunk = min(load.seconds(lambda: warm_up_head(model, setting.loss_rows)) for _ in range(_RUNS - 1))
    progress(done + 1 + _RUNS, total)
    return min(seconds[1:]), chunk
