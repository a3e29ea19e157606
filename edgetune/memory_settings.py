"""How a run is done within the memory that it may use: the fastest setting that fits.

Memory is arithmetic (runtime/budget.py). Settings are ranked by nominal costs, so that the same memory always gives the same
plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from edgetune.config import DataConfig, TrainConfig, default_epochs, parse_bytes
from edgetune.runtime import budget, ops
from edgetune.runtime.budget import Parts, Setting, Stored, Vocabulary
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import available_memory, can_compact_heap, card_memory, compute_dtype, process_memory
from edgetune.runtime.errors import ResourceError, UsageError
from edgetune.runtime.memory_meter import anonymous_memory
from edgetune.runtime.runner import LOSS_ROWS, Recompute

SHARE_OF_FREE_MEMORY = 0.8
LATER_BYTES = 20_000_000
"""What the process will come to hold besides the model: later imports, compiled products, the tokenizer, the report."""
CARD_LATER_BYTES = 300_000_000
"""The same on a card: kernels' code and cuBLAS's workspace. A guess, since none has been measured."""
FEW_LOSS_ROWS = 64
OPTIMIZER_BITS = (32, 8)
"""Of the optimizer's states, the ones to be preferred first."""

# Nominal, for ranking alone: what a device computes (FLOP/s), and what files and a copied head take (bytes/s).
_FLOPS = {"cpu": 8e11, "mps": 3e12, "cuda": 5e13}
FILE_SPEED = 1.5e9
_ROW_OVERHEAD = 10_000  # bytes a file gives in the time that one row's own read takes
_SELECTIVE, COMPACT, _FEW_ROWS = 1.03, 1.3, 1.02


@dataclass(frozen=True)
class Choice:
    """A setting, and what it takes."""

    setting: Setting
    parts: Parts


def memory_allowed(config: TrainConfig, device: str = "cpu", here: int = 1) -> int:
    """What one of the `here` processes on this machine may use: --memory, or its share of most of what is free there."""
    if config.memory is not None:
        return parse_bytes(config.memory)
    if device == "cuda":
        card = card_memory()
        return int(SHARE_OF_FREE_MEMORY * card.free) + card.held  # every process has a card of its own
    return int(SHARE_OF_FREE_MEMORY * available_memory(device)) // here + process_memory()


def held_already(device: str) -> int:
    """What a run holds of that memory besides what the budget counts."""
    return card_memory().held + CARD_LATER_BYTES if device == "cuda" else anonymous_memory() + LATER_BYTES


def settings(
    data: DataConfig, allowed: Sequence[Recompute], streams: bool, processes: int = 1, device: str = "cpu", bits: int = 32
) -> Iterator[Setting]:
    """Every way to run a step that is worth trying with optimizer states of so many bits, where each of `processes` is to
    have a row of its own."""
    heap = device != "cuda" and can_compact_heap()
    longest = -(-data.batch_tokens // processes)
    lengths = sorted({max(data.seq_len, longest >> halvings) for halvings in range(8)}, reverse=True)
    for recompute in allowed:
        for length in lengths:
            for paged, offload, in_file, compact, rows in _variants(recompute is Recompute.FULL, streams, heap):
                yield Setting(length, recompute, rows, None, bits, paged, offload, in_file, compact)


def _variants(offloads: bool, streams: bool, heap: bool) -> Iterator[tuple[bool, bool, Vocabulary, bool, int]]:
    for in_file in Vocabulary if streams else (Vocabulary.NEITHER,):
        for compact in (False, True) if heap else (False,):
            for offload in (False, True) if offloads else (False,):
                for paged in (False, True):
                    for rows in (LOSS_ROWS, FEW_LOSS_ROWS):
                        yield paged, offload, in_file, compact, rows


def cost(config: LlamaConfig, lora: LoraConfig, stored: Stored, setting: Setting, batch_tokens: int, device: str) -> float:
    """Nominal seconds of a step."""
    again = 1.5 if setting.recompute is Recompute.FULL else 0
    flops = (4 + again) * config.linear_parameters + 4 * config.vocab_size * config.hidden_size
    rows = -(-batch_tokens // setting.row_tokens)
    seconds = flops * batch_tokens / _FLOPS[device] + rows * 3 * config.linear_parameters / 20e9
    seconds *= _SELECTIVE if setting.recompute is Recompute.SELECTIVE else 1.0
    seconds *= COMPACT if setting.compact else 1.0
    seconds *= _FEW_ROWS if setting.loss_rows < LOSS_ROWS else 1.0
    read = rows * budget.streamed_bytes(config, stored, setting) / FILE_SPEED
    seconds = max(seconds, read) + 0.05 * read
    return seconds + file_bytes(config, lora, stored, setting, batch_tokens) / FILE_SPEED


def file_bytes(config: LlamaConfig, lora: LoraConfig, stored: Stored, setting: Setting, batch_tokens: int) -> int:
    """Bytes that a step moves between memory and files, linears apart: optimizer states, blocks' inputs, embedding, head."""
    moved = 0
    if setting.paged_optimizer:
        moved += setting.optimizer_bits // 2 * budget.adapter_parameters(config, lora)
    if setting.offload:
        moved += 4 * config.num_layers * batch_tokens * config.hidden_size
    if setting.in_file is not Vocabulary.NEITHER:
        moved += _ROW_OVERHEAD * batch_tokens
    if setting.in_file is Vocabulary.BOTH and stored.head_dtype is not None:
        chunks = -(-batch_tokens // setting.row_tokens) * -(-setting.row_tokens // setting.loss_rows)
        moved += chunks * 2 * config.vocab_size * config.hidden_size * stored.head_dtype.itemsize
    return moved


def number_format(compute: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """The activations' dtype, and whether training's large products are in 8 bits, for one of COMPUTE.

    Raises UsageError where 8 bits are asked for and there is no kernel for them.
    """
    dtype = compute_dtype(device) if compute == "auto" else torch.float32 if compute == "fp32" else torch.bfloat16
    able = ops.fuses(device, dtype)
    if compute == "int8" and not able:
        raise UsageError(
            f"--compute int8 needs a CPU with AMX (Xeon of 2023 and later, on Linux) and edgetune's kernels; found "
            f"{device.type} with {ops.backend_name(device)}. Type --compute bf16."
        )
    return dtype, able and compute in ("auto", "int8")


def described_format(compute: str) -> torch.dtype:
    """The activations' dtype on a machine that is not this one: a card. Raises UsageError for 8 bits, which are a CPU's."""
    if compute == "int8":
        raise UsageError("--compute int8 is for a CPU with AMX; type --compute bf16.")
    return torch.float32 if compute == "fp32" else torch.bfloat16


def choose(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    data: DataConfig,
    dtype: torch.dtype,
    memory: int,
    process: int,
    device: str = "cpu",
    recompute: str = "auto",
    processes: int = 1,
) -> Choice | None:
    """The fastest setting that fits in `memory` bytes; None where none does. 8-bit optimizer states, which change what is
    learnt, only where no setting with 32-bit ones fits."""
    allowed = list(Recompute) if recompute == "auto" else [Recompute(recompute)]
    for bits in OPTIMIZER_BITS:
        best: tuple[float, Choice] | None = None
        for setting in settings(data, allowed, stored.mapped, processes, device, bits):
            found = budget.fitted(config, lora, stored, setting, dtype, process, memory, device)
            if found is None:
                continue
            seconds = cost(config, lora, stored, found[0], data.batch_tokens, device)
            if best is None or seconds < best[0]:
                best = seconds, Choice(*found)
        if best is not None:
            return best[1]
    return None


def least(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    data: DataConfig,
    dtype: torch.dtype,
    process: int,
    device: str = "cpu",
    recompute: str = "auto",
) -> Choice:
    """The setting that takes the least memory."""
    allowed = list(Recompute) if recompute == "auto" else [Recompute(recompute)]
    streaming = budget.least_layer_memory(config, stored) if stored.mapped else None
    if streaming is not None and streaming >= config.num_layers * stored.layer:
        streaming = None
    choices = []
    for bits in OPTIMIZER_BITS:
        for setting in settings(data, allowed, stored.mapped, device=device, bits=bits):
            for layer_memory in dict.fromkeys((streaming, None)):
                small = dataclasses.replace(setting, layer_memory=layer_memory)
                choices.append(Choice(small, budget.parts(config, lora, stored, small, dtype, process, device)))
    return min(choices, key=lambda choice: choice.parts.total)


def choose_or_refuse(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    train: TrainConfig,
    dtype: torch.dtype,
    device: str,
    processes: int = 1,
    here: int = 1,
) -> Choice:
    """`choose` for each of a run's processes, `here` of them on this machine.

    Raises ResourceError with the least memory that works and what would make it fit.
    """
    memory, process = memory_allowed(train, device, here), held_already(device)
    choice = choose(config, lora, stored, train.data, dtype, memory, process, device, train.recompute, processes)
    if choice is None:
        smallest = least(config, lora, stored, train.data, dtype, process, device, train.recompute).parts.total
        raise ResourceError(
            f"Training may use {memory / 1e9:.2f} GB and needs {smallest / 1e9:.2f} GB; {advice(stored, smallest)}."
        )
    return choice


def least_memory_to_train(checkpoint: Checkpoint, train: TrainConfig, device: str = "cpu") -> int:
    """Return the least memory in bytes (this process included) that training a new adapter on `checkpoint` takes at its peak.

    This is the `least_memory_bytes` of `edgetune plan`. Compare it with `memory_allowed(train, device)`.
    Raises UsageError where `train.compute` is a number format that the device has not.
    """
    dtype, _ = number_format(train.compute, torch.device(device))
    stored, process = Stored.of(checkpoint), held_already(device)
    return least(checkpoint.config, train.lora(), stored, train.data, dtype, process, device, train.recompute).parts.total


def advice(stored: Stored, smallest: int) -> str:
    """What to type where nothing fits."""
    quantize = "" if stored.mapped else "`edgetune quantize` the model once, so that its layers can be streamed, or "
    enough = -(-(smallest + 10**7) // 10**7) / 100  # the process may have grown a little by then
    return f"{quantize}type --memory {enough:.2f}GB, a shorter --seq-len, a lower --rank or a smaller --model"


def planned_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run."""
    return train.steps or max(1, round((train.epochs or default_epochs(steps_per_epoch)) * steps_per_epoch))
