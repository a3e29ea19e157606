"""`edgetune plan`: what a run will take, before it starts. Memory by part, tokens a second, time.

How long a step takes is measured on one and on two layers of the model's shape with random weights.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.config import TrainConfig
from edgetune.dataset.packing import Packer
from edgetune.home import home
from edgetune.library.base_models import resolve
from edgetune.machine.bench import random_llama, random_row
from edgetune.machine.shapes import SHAPES
from edgetune.memory_settings import (
    COMPACT_SLOWDOWN,
    FILE_SPEED,
    UNHIDDEN_READ_SHARE,
    advice,
    choose,
    described_format,
    file_bytes,
    least,
    memory_allowed,
    number_format,
    planned_steps,
    process_bytes,
)
from edgetune.runtime import adapter as adapters
from edgetune.runtime import budget
from edgetune.runtime.budget import Setting, Stored
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import pick_device
from edgetune.runtime.errors import DeviceError, UsageError
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training.setup import named_adapter, read_and_split, tokenize_notes


@dataclass(frozen=True)
class Forecast:
    """`edgetune plan`'s answer. Speed and time are None where this machine cannot measure them, or no notes were named."""

    model: str
    device: str
    fits: bool
    memory_bytes: int
    peak_memory_bytes: int
    least_memory_bytes: int
    parts: dict[str, int]
    setting: dict[str, Any]
    head: str
    """The form in which the head is stored: a dtype's name, or "nf4"."""
    tokens_per_second: float | None
    seconds: float | None
    steps: int | None
    tokens: int | None
    advice: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def forecast(train: TrainConfig) -> Forecast:
    """What `edgetune train` with these settings would take, its weights not read."""
    name, config, stored, checkpoint = _model(train.model)
    here = True
    try:
        device = pick_device(train.device)
    except DeviceError:  # a machine that is described, not this one
        if train.memory is None:
            raise
        device, here = torch.device("cpu"), False
    kind = device.type if here else train.device
    if here:
        dtype, int8 = number_format(train.compute, device)
    else:
        dtype, int8 = described_format(train.compute), False
    lora, data = _lora(train, checkpoint), train.data
    steps, tokens = (train.steps, None) if checkpoint is None or not data.notes else _work(train, checkpoint.folder)
    memory, process = memory_allowed(train, kind), process_bytes(kind) if here else 0
    smallest = least(config, lora, stored, data, dtype, process, kind, train.recompute)
    choice = choose(config, lora, stored, data, dtype, memory, process, kind, train.recompute)
    shown = choice or smallest
    speed = seconds = None
    if choice is not None and here and kind == "cpu":
        step = seconds_a_step(config, lora, stored, shown.setting, data.batch_tokens, dtype, int8)
        speed = data.batch_tokens / step
        seconds = step * steps if steps is not None else None
    return Forecast(
        model=name,
        device=kind,
        fits=choice is not None,
        memory_bytes=memory,
        peak_memory_bytes=shown.parts.total,
        least_memory_bytes=smallest.parts.total,
        parts=dataclasses.asdict(shown.parts),
        setting=dataclasses.asdict(shown.setting),
        head=_head_form(stored),
        tokens_per_second=speed,
        seconds=seconds,
        steps=steps,
        tokens=tokens,
        advice=None if choice is not None else advice(stored, smallest.parts.total),
    )


def _head_form(stored: Stored) -> str:
    return "nf4" if stored.head_dtype is None else str(stored.head_dtype).removeprefix("torch.")


def _model(name: str | None) -> tuple[str, LlamaConfig, Stored, Checkpoint | None]:
    """A model of this machine, or a shape known by its name, which has no checkpoint."""
    if name in SHAPES and name != "demo" and not Path(name).exists():
        return name, SHAPES[name], Stored.nf4(SHAPES[name]), None
    choice = resolve(name)
    checkpoint = open_model(choice.path)
    return choice.name, checkpoint.config, Stored.of(checkpoint), checkpoint


def _lora(train: TrainConfig, checkpoint: Checkpoint | None) -> LoraConfig:
    """The adapter's shape: that of the one named by --from, where one is. Raises AdapterError where it does not fit."""
    if train.from_adapter is None:
        return train.lora()
    if checkpoint is None:
        raise UsageError(
            "--from names an adapter, and this model is a shape without any; type the adapter's --rank and --targets instead."
        )
    adapter = named_adapter(train, checkpoint)
    if adapter is None:
        return train.lora()
    adapters.check_fits(adapter, checkpoint.config)
    return adapter.config


def _work(train: TrainConfig, folder: Path) -> tuple[int, int]:
    """Steps that these notes give, and the tokens trained in them."""
    _, parted = read_and_split(train)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=home()) as scratch:
        store, _ = tokenize_notes(train, parted, Tokenizer.load(folder), Path(scratch))
        packer = Packer(store, train.data.seq_len, train.data.batch_tokens, train.data.seed)
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
) -> float:
    """Measured on one and on two layers, the rest by their difference; what files take is nominal."""
    one, two = (_row_seconds(config, lora, setting, dtype, int8, layers) for layers in (1, 2))
    layer = max(two - one, 0.0)
    row = (one + layer * (config.num_layers - 1)) * (COMPACT_SLOWDOWN if setting.compact else 1.0)
    rows = -(-batch_tokens // setting.row_tokens)
    read = budget.streamed_bytes(config, stored, setting) / FILE_SPEED
    files = file_bytes(config, lora, stored, setting, batch_tokens)
    return rows * (max(row, read) + UNHIDDEN_READ_SHARE * read) + files / FILE_SPEED


def _row_seconds(config: LlamaConfig, lora: LoraConfig, setting: Setting, dtype: torch.dtype, int8: bool, layers: int) -> float:
    """The fastest of three times that a row of this setting takes, on random weights."""
    model = random_llama(dataclasses.replace(config, num_layers=layers, windows=(config.windows * 2)[:layers]), dtype)
    adapters.attach_new(model, lora, 0)
    runner = Runner(model, setting.recompute, setting.loss_rows, int8=int8)
    optimizer = PagedAdamW(adapters.parameters(model))
    row = random_row(config, setting.row_tokens)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        runner.train(row, dropout_key=1 if lora.dropout else None)
        optimizer.step(1e-4)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
