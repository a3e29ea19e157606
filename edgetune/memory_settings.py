"""Chooses how a run keeps to the memory that it may use: the fastest settings that fit.

Memory is computed (runtime/budget.py), not measured. Settings are ranked by nominal costs, so that the same memory always
gives the same plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from edgetune.config import DataConfig, TrainConfig, default_epochs
from edgetune.parsing import parse_bytes
from edgetune.runtime import budget, ops
from edgetune.runtime.budget import Parts, Setting, Stored, Vocabulary
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import compute_dtype
from edgetune.runtime.errors import ResourceError, UsageError
from edgetune.runtime.heap import can_compact_heap
from edgetune.runtime.memory import anonymous_memory, available_memory, card_memory, process_memory
from edgetune.runtime.runner import LOSS_ROWS, Recompute
from edgetune.weight_forms import forms_for_training

SHARE_OF_FREE_MEMORY = 0.8
"""Share of the free memory that a run without --memory may use (0 to 1); chosen by hand."""
LATER_BYTES = 20_000_000
"""Bytes that the process will take later, besides the model: imports, compiled products, the tokenizer, the report. Chosen by
hand."""
CARD_LATER_BYTES = 300_000_000
"""Bytes that the process will take later on a card: the kernels' code and cuBLAS's workspace. A guess; none was measured."""
FEW_LOSS_ROWS = 64
"""The smaller choice of how many tokens' logits are computed at a time; chosen by hand. LOSS_ROWS is the larger one."""
OPTIMIZER_BITS = (32, 8)
"""Bits of the optimizer states, the preferred ones first: 8 bits change what is learnt."""
MICRO_BATCH_HALVINGS = 8
"""Micro-batch sizes that are tried: the longest, and its halves, quarters and so on; chosen by hand."""
ADVICE_STEP_BYTES = 10_000_000
"""The memory that is advised is rounded up to a multiple of this, after adding as much: the process may have grown by then."""

# Nominal costs. They rank settings and do nothing else, so only their proportions matter; all were chosen by hand.
DEVICE_FLOPS = {"cpu": 8e11, "mps": 3e12, "cuda": 5e13}
"""Floating-point operations per second that a device computes."""
FILE_SPEED = 1.5e9
"""Bytes per second that are read from or written to files. edgetune plan predicts with it too."""
WEIGHTS_PER_SECOND = 20e9
"""Weights per second in a pass over all weights, the part of a micro-batch's work that does not depend on its length."""
WEIGHT_PASSES = 3
"""Passes over all weights in a micro-batch."""
RECOMPUTE_FLOPS = 1.5
"""Extra operations per weight and token where everything is recomputed."""
SELECTIVE_SLOWDOWN = 1.03
"""Factor on a step's time where only cheap activations are recomputed."""
COMPACT_SLOWDOWN = 1.3
"""Factor on a step's time where large tensors go back to the system at once. edgetune plan predicts with it too."""
FEW_LOSS_ROWS_SLOWDOWN = 1.02
"""Factor on a step's time where logits are computed for FEW_LOSS_ROWS tokens at a time."""
UNHIDDEN_READ_SHARE = 0.05
"""Share of the time spent reading streamed layers that computing does not hide (0 to 1). edgetune plan predicts with it too."""
ROW_READ_BYTES = 10_000
"""Bytes that a file could have delivered in the time that reading one token's embedding row takes."""


@dataclass(frozen=True)
class Choice:
    """A setting, the memory that each part of a training step takes with it, and the form of the base's linears."""

    setting: Setting
    parts: Parts
    stored: Stored


def memory_allowed(config: TrainConfig, device: str = "cpu", local_processes: int = 1) -> int:
    """Return the bytes that each of the processes on this machine may use: --memory, or a share of what is free."""
    if config.memory is not None:
        return parse_bytes(config.memory)
    if device == "cuda":
        card = card_memory()
        return int(SHARE_OF_FREE_MEMORY * card.free) + card.held  # every process has a card of its own
    return int(SHARE_OF_FREE_MEMORY * available_memory(device)) // local_processes + process_memory()


def process_bytes(device: str) -> int:
    """Return the bytes of the allowed memory that the process takes besides the model and its training, now and later."""
    return card_memory().held + CARD_LATER_BYTES if device == "cuda" else anonymous_memory() + LATER_BYTES


def candidate_settings(
    data: DataConfig, allowed: Sequence[Recompute], streams: bool, processes: int = 1, device: str = "cpu", bits: int = 32
) -> Iterator[Setting]:
    """Yield every setting that is worth trying with optimizer states of `bits` bits.

    Each of `processes` must get a micro-batch of its own, which limits the size of a micro-batch.
    """
    heap = device != "cuda" and can_compact_heap()
    longest = -(-data.batch_tokens // processes)
    lengths = sorted({max(data.seq_len, longest >> halvings) for halvings in range(MICRO_BATCH_HALVINGS)}, reverse=True)
    for recompute in allowed:
        for length in lengths:
            for paged, offload, in_file, compact, rows in _cheapest_first(recompute is Recompute.FULL, streams, heap):
                yield Setting(length, recompute, rows, None, bits, paged, offload, in_file, compact)


def _cheapest_first(offloads: bool, streams: bool, heap: bool) -> Iterator[tuple[bool, bool, Vocabulary, bool, int]]:
    """Yield all combinations of paged_optimizer, offload, in_file, compact and loss_rows, those that cost least first."""
    for in_file in Vocabulary if streams else (Vocabulary.NEITHER,):
        for compact in (False, True) if heap else (False,):
            for offload in (False, True) if offloads else (False,):
                for paged in (False, True):
                    for rows in (LOSS_ROWS, FEW_LOSS_ROWS):
                        yield paged, offload, in_file, compact, rows


def cost(config: LlamaConfig, lora: LoraConfig, stored: Stored, setting: Setting, batch_tokens: int, device: str) -> float:
    """Return the nominal seconds of a step, for ranking settings."""
    # Forward and input gradients take 4 operations per frozen weight and token (there are no weight gradients), as does the
    # head: 2 for each.
    recomputed = RECOMPUTE_FLOPS if setting.recompute is Recompute.FULL else 0
    flops = (4 + recomputed) * config.linear_parameters + 4 * config.vocab_size * config.hidden_size
    micro_batches = -(-batch_tokens // setting.row_tokens)
    passed_weights = micro_batches * WEIGHT_PASSES * config.linear_parameters
    seconds = flops * batch_tokens / DEVICE_FLOPS[device] + passed_weights / WEIGHTS_PER_SECOND
    seconds *= SELECTIVE_SLOWDOWN if setting.recompute is Recompute.SELECTIVE else 1.0
    seconds *= COMPACT_SLOWDOWN if setting.compact else 1.0
    seconds *= FEW_LOSS_ROWS_SLOWDOWN if setting.loss_rows < LOSS_ROWS else 1.0
    # Layers are read while others compute, so the slower of the two counts, and a little of the reading.
    read = micro_batches * budget.streamed_bytes(config, stored, setting) / FILE_SPEED
    seconds = max(seconds, read) + UNHIDDEN_READ_SHARE * read
    return seconds + file_bytes(config, lora, stored, setting, batch_tokens) / FILE_SPEED


def file_bytes(config: LlamaConfig, lora: LoraConfig, stored: Stored, setting: Setting, batch_tokens: int) -> int:
    """Return the bytes that a step moves to and from files, streamed layers apart: optimizer states, the inputs of blocks,
    embedding and head."""
    moved = 0
    if setting.paged_optimizer:
        moved += setting.optimizer_bits // 2 * budget.adapter_parameters(config, lora)  # two states, read and written
    if setting.offload:
        moved += 4 * config.num_layers * batch_tokens * config.hidden_size  # 2 bytes each, written and read
    if setting.in_file is not Vocabulary.NEITHER:
        moved += ROW_READ_BYTES * batch_tokens
    if setting.in_file is Vocabulary.BOTH and stored.head_dtype is not None:
        # The loss reads the whole head twice, forward and backward, for every LOSS_ROWS tokens.
        chunks = -(-batch_tokens // setting.row_tokens) * -(-setting.row_tokens // setting.loss_rows)
        moved += chunks * 2 * config.vocab_size * config.hidden_size * stored.head_dtype.itemsize
    return moved


def number_format(compute: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """Return the dtype of activations, and True if training multiplies in 8 bits, for one of COMPUTE.

    Raises UsageError where 8 bits are asked for and this device has no kernel for them.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(compute) or compute_dtype(device)
    if compute == "int8" and not ops.fuses(device, dtype):
        raise UsageError(
            f"--compute int8 needs a CPU and edgetune's kernels for it; found {device.type} with {ops.backend_name(device)}. "
            "Type --compute bf16."
        )
    return dtype, compute == "int8" or (compute == "auto" and ops.fuses(device, dtype, int8=True))


def described_format(compute: str) -> torch.dtype:
    """Return the dtype of activations on a card that is not in this machine. Raises UsageError for int8, which needs a CPU."""
    if compute == "int8":
        raise UsageError("--compute int8 is for a CPU; type --compute bf16.")
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
    """Return the fastest setting that fits in `memory` bytes, or None if none does.

    process: bytes of that memory which the process takes apart from the model. 8-bit optimizer states change what is learnt,
    so they are chosen only where no setting with 32-bit states fits.
    """
    allowed = list(Recompute) if recompute == "auto" else [Recompute(recompute)]
    for bits in OPTIMIZER_BITS:
        best: tuple[float, Choice] | None = None
        for setting in candidate_settings(data, allowed, stored.mapped, processes, device, bits):
            found = budget.fitted(config, lora, stored, setting, dtype, process, memory, device)
            if found is None:
                continue
            seconds = cost(config, lora, stored, found[0], data.batch_tokens, device)
            if best is None or seconds < best[0]:
                best = seconds, Choice(*found, stored)
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
    """Return the setting that takes the least memory."""
    allowed = list(Recompute) if recompute == "auto" else [Recompute(recompute)]
    # Streaming is possible only from files, and saves nothing where its smallest ring of layers holds the whole model.
    streaming = budget.least_layer_memory(config, stored) if stored.mapped else None
    if streaming is not None and streaming >= config.num_layers * stored.layer:
        streaming = None
    choices = []
    for bits in OPTIMIZER_BITS:
        for setting in candidate_settings(data, allowed, stored.mapped, device=device, bits=bits):
            for layer_memory in dict.fromkeys((streaming, None)):
                small = dataclasses.replace(setting, layer_memory=layer_memory)
                choices.append(Choice(small, budget.parts(config, lora, stored, small, dtype, process, device), stored))
    return min(choices, key=lambda choice: choice.parts.total)


def choose_form(
    config: LlamaConfig,
    lora: LoraConfig,
    forms: Sequence[Stored],
    data: DataConfig,
    dtype: torch.dtype,
    memory: int,
    process: int,
    device: str = "cpu",
    recompute: str = "auto",
    processes: int = 1,
) -> Choice | None:
    """Return `choose`'s setting for the first of `forms` with which the whole base fits, beside 32-bit optimizer states.

    forms: those that the base's linears may take, the best first. Where none fits so well, the first that fits at all is
    taken; None if none does.
    """

    def found(stored: Stored) -> Choice | None:
        return choose(config, lora, stored, data, dtype, memory, process, device, recompute, processes)

    if len(forms) > 1:
        for stored in forms:
            whole = found(dataclasses.replace(stored, mapped=False))  # so that nothing may be left in its file
            if whole is not None and whole.setting.optimizer_bits == 32:
                return found(stored)
    return next((choice for stored in forms if (choice := found(stored)) is not None), None)


def choose_or_refuse(
    config: LlamaConfig,
    lora: LoraConfig,
    forms: Sequence[Stored],
    train: TrainConfig,
    dtype: torch.dtype,
    device: str,
    processes: int = 1,
    local_processes: int = 1,
) -> Choice:
    """Return `choose_form`'s setting for each of a run's processes, `local_processes` of them on this machine.

    Raises ResourceError that names the least memory that works, and what to type.
    """
    memory, process = memory_allowed(train, device, local_processes), process_bytes(device)
    if train.private is not None:  # the sums of clipped gradients
        process += 4 * budget.adapter_parameters(config, lora)
    choice = choose_form(config, lora, forms, train.data, dtype, memory, process, device, train.recompute, processes)
    if choice is None:
        smallest = least_of(config, lora, forms, train.data, dtype, process, device, train.recompute)
        needed = smallest.parts.total
        raise ResourceError(
            f"Training may use {memory / 1e9:.2f} GB and needs {needed / 1e9:.2f} GB. To make it fit, "
            f"{advice(smallest.stored, needed)}."
        )
    return choice


def least_of(
    config: LlamaConfig,
    lora: LoraConfig,
    forms: Sequence[Stored],
    data: DataConfig,
    dtype: torch.dtype,
    process: int,
    device: str = "cpu",
    recompute: str = "auto",
) -> Choice:
    """Return the setting and the form that take the least memory."""
    choices = [least(config, lora, stored, data, dtype, process, device, recompute) for stored in forms]
    return min(choices, key=lambda choice: choice.parts.total)


def least_memory_to_train(checkpoint: Checkpoint, train: TrainConfig, device: str = "cpu") -> int:
    """Return the least memory in bytes (this process included) that training a new adapter on `checkpoint` takes at its peak.

    This is the `least_memory_bytes` of `edgetune plan`. Compare it with `memory_allowed(train, device)`.
    Raises UsageError where `train.compute` is a number format that the device has not, or where the checkpoint cannot take the
    form `train.weights`.
    """
    dtype, _ = number_format(train.compute, torch.device(device))
    forms = [Stored.of(checkpoint, form) for form in forms_for_training(train.weights, train.compute, checkpoint)]
    process = process_bytes(device)
    return least_of(checkpoint.config, train.lora(), forms, train.data, dtype, process, device, train.recompute).parts.total


def advice(stored: Stored, smallest: int) -> str:
    """Return what to type where nothing fits in memory; `smallest` is the least memory that works, in bytes."""
    quantize = "" if stored.mapped else "run `edgetune quantize` on the model once, so that its layers can be streamed, or "
    advised = -(-(smallest + ADVICE_STEP_BYTES) // ADVICE_STEP_BYTES) * ADVICE_STEP_BYTES
    return f"{quantize}type --memory {advised / 1e9:.2f}GB, a shorter --seq-len, a lower --rank or a smaller --model"


def planned_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a run."""
    epochs = train.epochs or default_epochs(steps_per_epoch, is_new=train.from_adapter is None)
    return train.steps or max(1, round(epochs * steps_per_epoch))
