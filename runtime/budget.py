"""Predict the memory that each part of a training step takes, in bytes, before anything is allocated.

Letters as in model.py. The prediction is of what memory_meter.py measures: anonymous memory and the resident pages of the
weight files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum

import torch

from edgetune.runtime import ops
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig, LoraConfig, QuantConfig
from edgetune.runtime.int8 import PANEL_ROWS
from edgetune.runtime.loader import LinearForm, stored_as
from edgetune.runtime.names import EMBEDDING, HEAD, LINEAR_WEIGHT
from edgetune.runtime.nf4 import NESTED_BLOCK_SIZE
from edgetune.runtime.pager import SLOTS, streamed_layers
from edgetune.runtime.runner import LOSS_ROWS, ROW_MULTIPLE, Recompute

PACKED_ROWS, PACKED_RANK = 512, 32
"""Rows that the fused products pack at a time (SUM_ROWS in backends/cpu/constants.h), and the multiple that a rank is padded to
(SIDE in gemm.inl)."""

CODES_BYTES = 3_000_000
"""Bytes that an update of 8-bit states works in, beside the states: several copies of optim.py's chunk in fp32, and tables."""


@dataclass(frozen=True)
class Fragmentation:
    """Memory that an allocator loses to fragmentation, as fractions of the sizes of two kinds of tensors."""

    of_temporaries: float
    """A fraction of the tensors that come and go within a block, and of the logits."""
    of_kept: float
    """A fraction of the activations that blocks keep until their backward."""


HEAP_FRAGMENTATION = {
    (Recompute.NONE, True): Fragmentation(0.25, 0.09),
    (Recompute.NONE, False): Fragmentation(0.1, 0.5),
    (Recompute.SELECTIVE, True): Fragmentation(0.55, 0.0),
    (Recompute.SELECTIVE, False): Fragmentation(2.0, 0.0),
    (Recompute.FULL, True): Fragmentation(0.4, 0.0),
    (Recompute.FULL, False): Fragmentation(0.95, 0.0),
}
"""Fragmentation of the heap on the CPU, by (recomputation, True with fused products).

Fitted to measured peaks: predictions were 0.3 to 5.0% above them in 27 runs (LOG.md, "planned peak against measured").
"""
BF16_FRAGMENTATION = Fragmentation(0.1, 0.3)
"""Fragmentation of the heap with no recomputation, where torch makes the products in bf16: HEAP_FRAGMENTATION's was fitted to
fp32. From runs on an AMD Zen 4 (LOG.md, "planned peak of bf16 without AMX")."""
STREAMED_FRAGMENTATION = Fragmentation(0.55, 0.6)
"""Fragmentation of the heap with full recomputation, fused products and streamed layers. From the same measurements."""
DEVICE_FRAGMENTATION = Fragmentation(0.9, 0.05)
"""Fragmentation of the allocator of a card or an Apple GPU. Chosen by hand: it has not been measured."""
RECOMPUTED_FRAGMENTATION = 0.6
"""Extra heap fragmentation with selective recomputation, as a fraction of the activations that are recomputed.

They lie between the activations that are kept, so freeing them leaves holes. From the same measurements.
"""


class WeightForm(StrEnum):
    """The form of the frozen base's linears in memory; embedding, head and norms do not depend on it."""

    NF4 = "nf4"
    INT8 = "int8"
    BF16 = "bf16"

    @property
    def quant(self) -> LinearForm:
        """Return the form as `load_llama` takes it for a model that is stored dense."""
        if self is WeightForm.NF4:
            return QuantConfig()
        return torch.int8 if self is WeightForm.INT8 else torch.bfloat16

    def layer_bytes(self, config: LlamaConfig) -> int:
        """Return the bytes of one layer's linears in this form, as edgetune makes them."""
        numbers = config.linear_parameters // config.num_layers
        if self is WeightForm.BF16:
            return 2 * numbers
        if self is WeightForm.INT8:  # a code for each number, and a scale in fp32 for each row
            return numbers + 4 * sum(outputs for outputs, _ in config.linear_shapes().values())
        blocks = numbers // QuantConfig().block_size
        return numbers // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE)


@dataclass(frozen=True)
class Stored:
    """The sizes of a model's weights in a training process, in bytes: the linears of one layer, embedding, head, all norms."""

    layer: int
    embedding: int
    head: int
    norms: int
    mapped: bool = True
    """True if the linears are pages of files, False if they are converted while loading and so are anonymous memory."""
    head_dtype: torch.dtype | None = torch.bfloat16
    """None for a head in NF4, which is never dense as a whole."""
    form: WeightForm = WeightForm.NF4

    @classmethod
    def nf4(cls, config: LlamaConfig, mapped: bool = True) -> Stored:
        """Return the sizes that a folder written by `edgetune quantize` has: NF4 linears, the rest in bf16."""
        return cls.shaped(config, WeightForm.NF4, mapped)

    @classmethod
    def shaped(cls, config: LlamaConfig, form: WeightForm, mapped: bool) -> Stored:
        """Return the sizes of a model of this shape with its linears in `form` and the rest in bf16."""
        vocabulary = 2 * config.vocab_size * config.hidden_size
        norms = 4 * config.hidden_size * ((4 if config.post_norms else 2) * config.num_layers + 1)
        head = 0 if config.tie_embeddings else vocabulary
        return cls(form.layer_bytes(config), vocabulary, head, norms, mapped, form=form)

    @classmethod
    def of(cls, checkpoint: Checkpoint, form: WeightForm = WeightForm.NF4) -> Stored:
        """Return the sizes of a model folder. A dense one counts as it will be once its linears are loaded in `form`."""
        config, sizes = checkpoint.config, {name: tensor.nbytes for name, tensor in checkpoint.stored.items()}
        embedding, head = sizes[EMBEDDING], sum(size for name, size in sizes.items() if name.startswith(HEAD))
        own_head = 0 if config.tie_embeddings else head
        head_dtype = None if checkpoint.quantized_head else checkpoint.stored[EMBEDDING if own_head == 0 else HEAD].dtype
        if checkpoint.quant is None:
            loaded = cls.shaped(config, form, stored_as(checkpoint, form.quant))
            return replace(loaded, embedding=embedding, head=own_head, head_dtype=head_dtype)
        linears = sum(size for name, size in sizes.items() if LINEAR_WEIGHT in name)
        # 2: norms are stored in bf16 and held in fp32
        norms = 2 * (sum(sizes.values()) - linears - embedding - head)
        return cls(linears // config.num_layers, embedding, own_head, norms, True, head_dtype)


class Vocabulary(StrEnum):
    """The choice of what is read from its file: embedding, head. A model with tied embeddings has one tensor for both."""

    NEITHER = "neither"
    EMBEDDING = "embedding"
    BOTH = "both"


@dataclass(frozen=True)
class Setting:
    """One way to run a training step; the planner chooses among these."""

    row_tokens: int
    recompute: Recompute
    loss_rows: int = LOSS_ROWS
    layer_memory: int | None = None
    """Bytes for the linears of pinned layers and the ring of streamed ones; None keeps every layer in memory."""
    optimizer_bits: int = 32
    paged_optimizer: bool = False
    """Keep the optimizer's states in a file, with one parameter's in memory at a time."""
    offload: bool = False
    """Keep the inputs of blocks in a file between forward and backward."""
    in_file: Vocabulary = Vocabulary.NEITHER
    """Read the embedding, or embedding and head, from their file when needed instead of keeping them in memory."""
    compact: bool = False
    """Give large tensors pages of their own (heap.compact_heap): no fragmentation, but fresh pages cost time."""


@dataclass(frozen=True)
class Parts:
    """The predicted memory by part, in bytes."""

    process: int
    """The interpreter, torch, and all else that is in memory before a model is opened."""
    weights: int
    embeddings: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors that are kept from forward to backward."""
    logits: int
    scratch: int
    """The temporaries of one block, the buffers that products are packed into, and heap fragmentation."""

    @property
    def total(self) -> int:
        """Return the predicted peak memory of the process."""
        return sum(asdict(self).values())


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    """Return the number of trained parameters: r (in + out) for each target linear."""
    shapes = config.linear_shapes()
    return config.num_layers * sum(lora.rank * sum(shapes[name]) for name in lora.targets)


def kept_bytes(config: LlamaConfig, lora: LoraConfig, size: int, recompute: Recompute) -> int:
    """Return the bytes per token that one block keeps for its backward, with `size` bytes a number.

    With full recomputation only the block's input; with selective recomputation also qkv, attention's output, the input of
    the MLP, gate and up, the adapters' reduced inputs x A^T and the log-sum-exps; with none also the outputs of the norms
    and of SwiGLU.
    """
    d, f, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    if recompute is Recompute.FULL:
        return d * size
    padded_ranks = -(-lora.rank // PACKED_RANK) * PACKED_RANK * len(lora.targets)
    kept = 2 * d + q + 2 * config.num_kv_heads * config.head_dim + q + 2 * f + padded_ranks
    if config.post_norms:  # of what attention and the MLP give, before it is added
        kept += 2 * d
    if recompute is Recompute.NONE:
        kept += 2 * d + f
    return kept * size + 4 * config.num_heads


def packed_bytes(config: LlamaConfig, lora: LoraConfig, threads: int) -> int:
    """Return the largest size, in bytes, of the fused products' buffers: packed rows, adapters, and each thread's sums."""
    size = 4 if ops.fuses(torch.device("cpu"), torch.float32) else 2  # as the kernels in use multiply them
    shapes, rank = config.linear_shapes(), -(-lora.rank // PACKED_RANK) * PACKED_RANK
    widest = 0
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        outputs, inputs = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        adapters = size * rank * (outputs + len(names) * inputs)
        widest = max(widest, size * PACKED_ROWS * max(outputs, inputs) + adapters)
    return widest + threads * 2 * PACKED_ROWS * PACKED_ROWS * 4


ONEDNN_BYTES = 16_000_000
"""Bytes of code and buffers that oneDNN keeps for the shapes of a model's products where no fused kernel makes them. Measured
on an AMD Zen 4 in bf16 with the built-in model: runs held 12 to 14 MB more than was planned without it (LOG.md, "oneDNN's own
memory")."""


def parts(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    setting: Setting,
    dtype: torch.dtype,
    process: int,
    device: str = "cpu",
) -> Parts:
    """Return the memory that training one row after the other in `dtype` takes.

    process: bytes held before the model is opened.
    device: the device whose memory is predicted. A card ("cuda") makes a panel of weights dense where the CPU has fused
    products.
    """
    d, layers, size = config.hidden_size, config.num_layers, dtype.itemsize
    tokens = -(-setting.row_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    trained = 4 * adapter_parameters(config, lora)
    fused = device == "cpu" and stored.form is WeightForm.NF4 and ops.fuses(torch.device("cpu"), dtype)
    panel = not fused and (stored.form is not WeightForm.BF16 or dtype != torch.bfloat16)

    kept = kept_bytes(config, lora, size, setting.recompute)
    kept_layers, temporaries = layers, 0
    if setting.recompute is Recompute.FULL:
        # A block recomputes in its backward what selective recomputation would have kept of it.
        kept_layers = 0 if setting.offload else layers
        temporaries = kept_bytes(config, lora, size, Recompute.SELECTIVE) * tokens
    activations = tokens * kept * kept_layers
    temporaries += _block_temporaries(config, lora, tokens, size, fused, panel)

    vocabulary, logits = _vocabulary_bytes(config, stored, setting, tokens, dtype)
    logits += 3 * tokens * d * size

    loss = _fragmentation(setting, fused, dtype, device)
    fragmented = loss.of_temporaries * (temporaries + logits) + loss.of_kept * activations
    if setting.recompute is Recompute.SELECTIVE and device == "cpu":
        recomputed = kept_bytes(config, lora, size, Recompute.NONE) - kept
        fragmented += RECOMPUTED_FRAGMENTATION * tokens * layers * recomputed
    return Parts(
        process=process + (ONEDNN_BYTES if device == "cpu" and not fused else 0),
        weights=stored.norms + (layers * stored.layer if setting.layer_memory is None else setting.layer_memory),
        embeddings=vocabulary,
        adapter=trained,
        gradients=trained,
        optimizer=_optimizer_bytes(config, lora, setting),
        activations=activations,
        logits=logits,
        scratch=temporaries + (0 if setting.compact else round(fragmented)),
    )


def _optimizer_bytes(config: LlamaConfig, lora: LoraConfig, setting: Setting) -> int:
    """Return the bytes of AdamW's states in memory: all of them, or the page of the largest parameter."""
    trained = 4 * adapter_parameters(config, lora)
    largest = 4 * max(lora.rank * max(shape) for shape in config.linear_shapes().values())
    states, page = 2 * trained, 4 * largest
    if setting.optimizer_bits == 8:  # two codes a parameter, and two fp32 absmax for a block of 256
        states, page = trained // 2 + trained // 128 + CODES_BYTES, largest + CODES_BYTES
    return page if setting.paged_optimizer else states


def _block_temporaries(config: LlamaConfig, lora: LoraConfig, tokens: int, size: int, fused: bool, panel: bool) -> int:
    """Return the bytes of one block's temporaries in its backward, those of its products included.

    panel: the products read a dense copy of a weight.
    """
    d, f = config.hidden_size, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    # SwiGLU's backward is the peak: it holds its output, two gradients as wide, and the gradients that flow beside it.
    temporaries = (4 * f + 4 * d + qkv) * size * tokens
    if fused:
        return temporaries + packed_bytes(config, lora, torch.get_num_threads())
    largest = max(outputs * inputs for outputs, inputs in config.linear_shapes().values())
    return temporaries + (largest * size if panel else 0)


def _vocabulary_bytes(
    config: LlamaConfig, stored: Stored, setting: Setting, tokens: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return the bytes that embedding and head hold in memory, and those of a chunk of logits and its head's panels."""
    d, v, size = config.hidden_size, config.vocab_size, dtype.itemsize
    rows = min(tokens, setting.loss_rows)
    vocabulary, logits = stored.embedding + stored.head, rows * v * size
    if setting.in_file is not Vocabulary.NEITHER and not config.tie_embeddings:
        vocabulary = stored.head
    if setting.in_file is Vocabulary.BOTH and stored.head_dtype is not None:
        vocabulary = 0
        logits += min(PANEL_ROWS, v) * d * (size + stored.head_dtype.itemsize * (stored.head_dtype != dtype))
        logits += 4 * rows * d  # the gradient's sum over panels
    elif stored.head_dtype not in (None, dtype):
        vocabulary += v * d * size  # a copy in the compute dtype
    return vocabulary, logits


def _fragmentation(setting: Setting, fused: bool, dtype: torch.dtype, device: str) -> Fragmentation:
    """Return the fractions for a setting on a device."""
    if device != "cpu":
        return DEVICE_FRAGMENTATION
    if fused and setting.recompute is Recompute.FULL and setting.layer_memory is not None:
        return STREAMED_FRAGMENTATION
    if not fused and setting.recompute is Recompute.NONE and dtype == torch.bfloat16:
        return BF16_FRAGMENTATION
    return HEAP_FRAGMENTATION[setting.recompute, fused]


def least_layer_memory(config: LlamaConfig, stored: Stored) -> int:
    """Return the smallest possible `layer_memory` in bytes: a ring of two layers."""
    return SLOTS * stored.layer if config.num_layers > SLOTS else config.num_layers * stored.layer


def fitted(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    setting: Setting,
    dtype: torch.dtype,
    process: int,
    memory: int,
    device: str = "cpu",
) -> tuple[Setting, Parts] | None:
    """Return the setting with as many layers in memory as fit into `memory` bytes, and its parts; None if not even two fit."""
    whole = parts(config, lora, stored, setting, dtype, process, device)
    if whole.total <= memory:
        return setting, whole
    if not stored.mapped:
        return None
    without_layers = parts(config, lora, stored, replace(setting, layer_memory=0), dtype, process, device)
    room = memory - without_layers.total
    if room < least_layer_memory(config, stored):
        return None
    streaming = replace(setting, layer_memory=room)
    return streaming, parts(config, lora, stored, streaming, dtype, process, device)


def streamed_bytes(config: LlamaConfig, stored: Stored, setting: Setting) -> int:
    """Return the bytes of weights that are read from files for each row, in forward and backward together."""
    if setting.layer_memory is None:
        return 0
    streamed = len(streamed_layers([stored.layer] * config.num_layers, setting.layer_memory))
    return 2 * max(streamed - SLOTS, 0) * stored.layer
