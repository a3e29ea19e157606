"""Write a whole model as a GGUF file, one tensor at a time.

The format is specified in ggml's docs/gguf.md; keys and tensor names are those that llama.cpp's loader asks for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.gguf.names import architecture, is_rotated, tensor_name, to_llama_rows
from edgetune.export.job import Job
from edgetune.export.memory import PROCESS_BYTES, StageMemory
from edgetune.export.merge import COPIES, merged
from edgetune.runtime.checkpoint import model_shapes
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import PRIVATE_FILE
from edgetune.runtime.rope import rope_frequencies
from edgetune.runtime.rope_config import RopeConfig

KINDS = ("f32", "f16", "bf16", "q8_0")
"""Forms in which a model's matrices can be written."""
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""The number of each form in llama.h's llama_ftype."""
_QUANTIZATION_VERSION = 2
"""Version of ggml's quantised formats that _q8_0 writes: GGML_QNT_VERSION."""
_Q8_0_BLOCK, _Q8_0_MAX = 32, 127
"""Numbers that share a scale in Q8_0, and its largest code, from ggml."""
_PANEL_NUMBERS = 1 << 20
"""Numbers of a tensor that are encoded at a time. Chosen by hand."""
_PANEL_COPIES = 10
"""Peak memory of encoding a panel, in fp32 copies of it."""
_LEAST_WINDOW = 512
"""Shortest sliding window, in tokens, of a model that is written although llama.cpp ignores the window. Chosen by hand."""
GGUF_BYTES = 220_000_000
"""Anonymous memory in bytes of a process that has written a model. Measured on a 1.1B model."""


def write_model(job: Job, path: Path, kind: str, vocabulary: Callable[[Any], None]) -> tuple[str, ...]:
    """Write the base with its adapter merged into it, its matrices in one of KINDS, its vectors in f32; return notices.

    vocabulary: adds the tokenizer's keys to a gguf.GGUFWriter. Raises ModelError for a model that llama.cpp would compute
    differently, or that holds numbers too large for f16.
    """
    import gguf

    config = job.base.config
    arch = architecture(config)
    context, notices = _context(config, arch)
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, config, job, kind, context)
    vocabulary(writer)
    factors = _rope_factors(config.rope, config.head_dim)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", tuple(factors.shape), "f32")
    shapes = model_shapes(config)
    kinds = {name: _tensor_kind(shape, kind) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        _announce(writer, tensor_name(name), shape, kinds[name])
    try:
        path.touch(PRIVATE_FILE)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        if factors is not None:
            _write(writer, file, factors, "f32")
        _write_merged(writer, file, job, kinds)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return notices


def _context(config: LlamaConfig, arch: str) -> tuple[int, tuple[str, ...]]:
    """Return the context length to write, limited to the sliding window, which llama.cpp ignores, and a notice where it is.

    Raises ModelError for a window that is too short to be of use as a context.
    """
    window = min((window for window in config.windows if window), default=config.max_positions)
    if window >= config.max_positions:
        return config.max_positions, ()
    if window < _LEAST_WINDOW:
        raise ModelError(
            f"llama.cpp's {arch} has no sliding window, but this model sees only {window} tokens; type `edgetune export hf`."
        )
    notice = (
        f"llama.cpp's {arch} has no sliding window, but this model has one. Use at most {window} tokens of context, the limit "
        "in the file: in longer texts llama.cpp would let the model see everything."
    )
    return window, (notice,)


def _write_merged(writer: Any, file: Any, job: Job, kinds: dict[str, str]) -> None:
    """Write the merged tensors, which must come in the order of `kinds`."""
    config, arch = job.base.config, architecture(job.base.config)
    shapes, done = model_shapes(config), job.counter("writing", len(kinds))
    for expected, (name, tensor) in zip(kinds, merged(job), strict=True):
        if name != expected or tensor.shape != shapes[name]:
            raise ValueError(f"merged gave {name} {tuple(tensor.shape)} where {expected} was announced")
        if is_rotated(arch, name):
            tensor = to_llama_rows(tensor, config.head_dim)
        _write(writer, file, tensor, kinds[name])
        done(name)


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Add a tensor to the file's table. The numbers must be written in the order of these calls."""
    import gguf
    import numpy as np

    quant = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    writer.add_tensor_info(name, shape, np.dtype("f4"), math.prod(shape) // block * size, quant)


def _tensor_kind(shape: tuple[int, ...], kind: str) -> str:
    """Return the form of a tensor in a file of `kind`: f32 for vectors, f16 for matrices that are not whole Q8_0 blocks."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[1] % _Q8_0_BLOCK else kind


def _describe(writer: Any, config: LlamaConfig, job: Job, kind: str, context: int) -> None:
    """Add the keys that describe the model. Its name is only the last part of the base's: a path could name its owner."""
    writer.add_type("model")
    writer.add_name(Path(job.base_name).name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)


def _rope_factors(rope: RopeConfig, head_dim: int) -> Tensor | None:
    """Return the factors (hd/2,) f32 by which llama.cpp divides the frequencies for Llama 3.1's scaling, or None."""
    if rope.kind != "llama3":
        return None
    plain = rope_frequencies(RopeConfig(rope.theta), head_dim)
    return (plain / rope_frequencies(rope, head_dim)).float()


def _write(writer: Any, file: Any, tensor: Tensor, kind: str) -> None:
    """Write a tensor's numbers in a form, a panel of rows at a time, and the padding after them."""
    start = file.tell()
    rows = max(1, _PANEL_NUMBERS // max(1, tensor[0].numel()))
    for panel in tensor.split(rows):
        file.write(_encode(panel.float(), kind))
    writer.write_padding(file, file.tell() - start)


def _encode(panel: Tensor, kind: str) -> bytes:
    """Encode f32 numbers in one of KINDS."""
    if kind == "q8_0":
        return _q8_0(panel)
    if kind == "bf16":
        return panel.bfloat16().view(torch.int16).numpy().tobytes()
    if kind == "f16":
        return _half(panel).numpy().tobytes()
    return panel.contiguous().numpy().tobytes()


def _half(numbers: Tensor) -> Tensor:
    """Round f32 to f16. Raises ModelError where a number would become inf."""
    half = numbers.half()
    if not torch.isfinite(half).all():
        raise ModelError("The model holds numbers too large for f16, which Q8_0 uses for its scales; type --weights bf16.")
    return half


def _q8_0(panel: Tensor) -> bytes:
    """Encode f32 numbers as ggml's Q8_0, bit for bit.

    Each block of 32 becomes an f16 scale, its largest absolute value / 127, and 32 codes, halves rounded away from zero.
    gguf.quants does the same at a tenth of the speed.
    """
    blocks = panel.reshape(-1, _Q8_0_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).div_(_Q8_0_MAX)
    scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    magnitude = scaled.abs()
    codes = magnitude.floor()
    codes += magnitude.sub_(codes) >= 0.5  # torch.round would round halves to even
    bytes_of_codes = codes.copysign_(scaled).to(torch.int8).view(torch.uint8)
    return torch.cat([_half(scale).view(torch.uint8), bytes_of_codes], dim=1).numpy().tobytes()


def gguf_memory(job: Job) -> StageMemory:
    """Forecast the memory of writing a model: the process, the adapter, a tensor as stored, the copies of a linear while it is
    merged, and a panel while it is encoded."""
    largest = max(tensor.nbytes for tensor in job.base.stored.values())
    if job.base.quantized_head:
        largest += job.head_bytes  # a 4-bit head is dequantised before it is written
    numbers = COPIES * job.largest_linear + _PANEL_COPIES * _PANEL_NUMBERS
    return StageMemory(PROCESS_BYTES + job.adapter_bytes + torch.float32.itemsize * numbers + largest)
