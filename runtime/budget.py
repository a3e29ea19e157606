"""Memory arithmetic: what each part of a training step takes, in bytes, before anything is allocated.

Letters as in model.py. What is counted is what `edgetune.meter` measures:
anonymous memory, and the pages of weight files that are in memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum

import torch

from edgetune.runtime import ops
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig, LoraConfig, QuantConfig
from edgetune.runtime.int8 import PANEL_ROWS
from edgetune.runtime.names import EMBEDDING, HEAD, LINEAR_WEIGHT
from edgetune.runtime.nf4 import NESTED_BLOCK_SIZE
from edgetune.runtime.pager import SLOTS, streamed_layers
from edgetune.runtime.runner import LOSS_ROWS, ROW_MULTIPLE, Recompute

TORCH_BYTES = 180_000_000
"""Anonymous memory of a process that has imported torch and edgetune (measured on Linux, CPU build)."""
PACKED_ROWS, PACKED_RANK = 512, 32
"""gemm.inl's TALL and SIDE: the rows that the fused products pack at a time, and what a rank is padded to."""


@dataclass(frozen=True)
class Stored:
    """Bytes of a model's weights as a training process holds them: linears of one layer, embedding, head, all norms.

    `mapped`: they are pages of files; or else they were quantised on the way in, and are anonymous.
    """

    layer: int
    embedding: int
    head: int
    norms: int
    mapped: bool = True
    head_dtype: torch.dtype | None = torch.bfloat16
    """None: NF4, which is never dense as a whole."""

    @classmethod
    def nf4(cls, config: LlamaConfig, mapped: bool = True) -> Stored:
        """Of a folder that `edgetune quantize` wrote, or will have written: NF4 linears, the rest in bf16."""
        numbers = config.linear_parameters // config.num_layers
        blocks = numbers // QuantConfig().block_size
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE)
        vocabulary = 2 * config.vocab_size * config.hidden_size
        norms = 4 * config.hidden_size * (2 * config.num_layers + 1)
        return cls(numbers // 2 + scales, vocabulary, 0 if config.tie_embeddings else vocabulary, norms, mapped)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Stored:
        """Of a folder; one that is not quantised will be, on the way in."""
        config, sizes = checkpoint.config, {name: tensor.nbytes for name, tensor in checkpoint.stored.items()}
        embedding, head = sizes[EMBEDDING], sum(size for name, size in sizes.items() if name.startswith(HEAD))
        own_head = 0 if config.tie_embeddings else head
        head_dtype = None if checkpoint.quantized_head else checkpoint.stored[EMBEDDING if own_head == 0 else HEAD].dtype
        if checkpoint.quant is None:
            later = cls.nf4(config, mapped=False)
            return replace(later, embedding=embedding, head=own_head, head_dtype=head_dtype)
        linears = sum(size for name, size in sizes.items() if LINEAR_WEIGHT in name)
        norms = 2 * (sum(sizes.values()) - linears - embedding - head)
        return cls(linears // config.num_layers, embedding, own_head, norms, True, head_dtype)


class Vocabulary(StrEnum):
    """The embedding and the head: which of them stays in its file. A tied model has one tensor for both."""

    NEITHER = "neither"
    EMBEDDING = "embedding"
    BOTH = "both"


@dataclass(frozen=True)
class Setting:
    """How a step is run: what a planner chooses from."""

    row_tokens: int
    recompute: Recompute
    loss_rows: int = LOSS_ROWS
    layer_memory: int | None = None
    """Bytes for the linears of pinned layers and the ring; None: all stay where they are."""
    optimizer_bits: int = 32
    paged_optimizer: bool = False
    """States in a file, one parameter's in memory at a time."""
    offload: bool = False
    """Blocks' inputs in a file."""
    in_file: Vocabulary = Vocabulary.NEITHER
    """What of the embedding and the head is read from its file when it is needed, and takes no memory."""
    compact: bool = False
    """Large tensors in pages of their own, which go back at once: no holes in the heap, but new pages cost time."""


@dataclass(frozen=True)
class Parts:
    """Bytes by part. `total` is what the process will hold at its peak."""

    process: int
    """The interpreter, torch and what else is in memory before a model is opened."""
    weights: int
    embeddings: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Kept from forward to backward."""
    logits: int
    scratch: int
    """One block's own tensors, what products are packed into, and holes in the heap."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    """Trained numbers: r (in + out) of each target linear."""
    shapes = config.linear_shapes()
    return config.num_layers * sum(lora.rank * sum(shapes[name]) for name in lora.targets)


def kept_bytes(config: LlamaConfig, lora: LoraConfig, size: int, recompute: Recompute) -> int:
    """Bytes a token that one block keeps for its backward.

    Its input; and, not recomputed: qkv, attention's output, the input of the MLP, gate and up, the adapters' reduced inputs,
    log-sum-exps; and, where nothing is: the norms' and SwiGLU's outputs too.
    """
    d, f, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    if recompute is Recompute.FULL:
        return d * size
    padded_ranks = -(-lora.rank // PACKED_RANK) * PACKED_RANK * len(lora.targets)
    kept = 2 * d + q + 2 * config.num_kv_heads * config.head_dim + q + 2 * f + padded_ranks
    if recompute is Recompute.NONE:
        kept += 2 * d + f
    return kept * size + 4 * config.num_heads


def packed_bytes(config: LlamaConfig, lora: LoraConfig, threads: int) -> int:
    """What the fused products pack into at most: 512 rows of the widest gradient, adapters, and each thread's sums."""
    shapes, rank = config.linear_shapes(), -(-lora.rank // PACKED_RANK) * PACKED_RANK
    widest = 0
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        outputs, inputs = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        adapters = 2 * rank * (outputs + len(names) * inputs)
        widest = max(widest, 2 * PACKED_ROWS * max(outputs, inputs) + adapters)
    return widest + threads * 2 * PACKED_ROWS * PACKED_ROWS * 4


def parts(
    config: LlamaConfig,
    lora: LoraConfig,
    stored: Stored,
    setting: Setting,
    dtype: torch.dtype,
    process: int,
    device: str = "cpu",
) -> Parts:
    """What training one row after the other in `dtype` takes. `process`: bytes held before the model is opened.

    device: whose memory it is. A card ("cuda") has weights made dense in a panel where the CPU has fused products.
    """
    d, f, v, size = config.hidden_size, config.intermediate_size, config.vocab_size, dtype.itemsize
    tokens = -(-setting.row_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    trained = 4 * adapter_parameters(config, lora)
    largest = 4 * max(lora.rank * max(shape) for shape in config.linear_shapes().values())
    states, page = 2 * trained, 4 * largest
    if setting.optimizer_bits == 8:
        states, page = trained // 2 + trained // 128 + CODES_BYTES, largest + CODES_BYTES
    layers, one = config.num_layers, kept_bytes(config, lora, size, Recompute.SELECTIVE)
    kept = kept_bytes(config, lora, size, setting.recompute)
    if setting.recompute is not Recompute.FULL:
        kept_layers, working = layers, 0
    else:
        kept_layers, working = 0 if setting.offload else layers, one * tokens
    q = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    # SwiGLU's backward holds its output, two gradients as wide, and what flows beside
    working += (4 * f + 4 * d + q) * size * tokens
    fused = device == "cpu" and ops.fuses(torch.device("cpu"), dtype)
    if fused:
        working += packed_bytes(config, lora, torch.get_num_threads())
    else:
        working += max(outputs * inputs for outputs, inputs in config.linear_shapes().values()) * size  # a dense panel
    rows = min(tokens, setting.loss_rows)
    logits = rows * v * size + 3 * tokens * d * size
    vocabulary = stored.embedding + stored.head
    if setting.in_file is not Vocabulary.NEITHER and not config.tie_embeddings:
        vocabulary = stored.head
    if setting.in_file is Vocabulary.BOTH and stored.head_dtype is not None:
        vocabulary = 0
        logits += min(PANEL_ROWS, v) * d * (size + stored.head_dtype.itemsize * (stored.head_dtype != dtype))
        logits += 4 * rows * d  # the gradient's sum over panels
    elif stored.head_dtype not in (None, dtype):
        vocabulary += v * d * size  # a copy in the compute dtype
    activations = tokens * kept * kept_layers
    of_working, of_kept = HOLES[setting.recompute, fused] if device == "cpu" else DEVICE_HOLES
    if fused and setting.recompute is Recompute.FULL and setting.layer_memory is not None:
        of_working, of_kept = STREAMED_HOLES
    holes = of_working * (working + logits) + of_kept * activations
    if setting.recompute is Recompute.SELECTIVE and device == "cpu":
        holes += FREED_HOLES * tokens * layers * (kept_bytes(config, lora, size, Recompute.NONE) - kept)
    return Parts(
        process=process,
        weights=stored.norms + (layers * stored.layer if setting.layer_memory is None else setting.layer_memory),
        embeddings=vocabulary,
        adapter=trained,
        gradients=trained,
        optimizer=page if setting.paged_optimizer else states,
        activations=activations,
        logits=logits,
        scratch=working + (0 if setting.compact else round(holes)),
    )


CODES_BYTES = 3_000_000
"""What an update of 8-bit states works in, beside the states: optim.py's chunk in fp32, several times, and its tables."""
HOLES = {
    (Recompute.NONE, True): (0.25, 0.09),
    (Recompute.NONE, False): (0.1, 0.5),
    (Recompute.SELECTIVE, True): (0.55, 0.0),
    (Recompute.SELECTIVE, False): (2.0, 0.0),
    (Recompute.FULL, True): (0.4, 0.0),
    (Recompute.FULL, False): (0.95, 0.0),
}
"""Free memory inside the heap, with fused products and without: shares of what comes and goes in it, and of what blocks keep
(measured: LOG.md)."""
STREAMED_HOLES = (0.55, 0.6)
"""The same where all is recomputed, with fused products, and layers are streamed (measured: LOG.md)."""
DEVICE_HOLES = (0.9, 0.05)
"""The same of a device's allocator. A guess, since none has been measured."""
FREED_HOLES = 0.6
"""The same of what blocks do not keep but make again, since it lay between what they keep."""


def least_layer_memory(config: LlamaConfig, stored: Stored) -> int:
    """The smallest `layer_memory`: a ring of two layers."""
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
    """The setting with as many layers in memory as fit in `memory` bytes; None where nothing does."""
    whole = parts(config, lora, stored, setting, dtype, process, device)
    if whole.total <= memory:
        return setting, whole
    if not stored.mapped:
        return None
    beside = parts(config, lora, stored, replace(setting, layer_memory=0), dtype, process, device)
    room = memory - beside.total
    if room < least_layer_memory(config, stored):
        return None
    streaming = replace(setting, layer_memory=room)
    return streaming, parts(config, lora, stored, streaming, dtype, process, device)


def streamed_bytes(config: LlamaConfig, stored: Stored, setting: Setting) -> int:
    """Bytes of weights that are read again for a row, forward and backward."""
    if setting.layer_memory is None:
        return 0
    streamed = len(streamed_layers([stored.layer] * config.num_layers, setting.layer_memory))
    return 2 * max(streamed - SLOTS, 0) * stored.layer
