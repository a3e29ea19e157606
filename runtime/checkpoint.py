"""Open a Hugging Face model folder without reading its weights: check the config, locate every tensor, map the files.

It opens fp32, fp16 and bf16 folders of one or many safetensors files, and bitsandbytes' 4-bit NF4 folders. Every tensor that
is missing, unknown or contradicts config.json is reported, all in one error. Pickled weights are never opened: they can run
code.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import bnb_layout, nf4
from edgetune.runtime.config import ATTENTION_LINEARS, MLP_LINEARS, LlamaConfig, QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.foreign_layout import cut, foreign_layout
from edgetune.runtime.fused import split_fused
from edgetune.runtime.names import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    K_NORM,
    MLP_NORM,
    POST_MLP_NORM,
    PRE_MLP_NORM,
    Q_NORM,
    hf_linear_name,
    is_linear,
    layer_tensor,
)
from edgetune.runtime.nf4 import FLOATS, QuantizedTensor
from edgetune.runtime.safetensors_file import SafetensorsFile, StoredTensor
from edgetune.runtime.untrusted_file import MODEL_WEIGHTS, WEIGHT_INDEX, FileKind
from edgetune.runtime.weight_files import INDEX, MOST_SHOWN, WEIGHTS, find_weights, index_faults, read_config

# Tensors that a folder may hold and that are not used: rotary angles and masks that older libraries stored although config.json
# gives them, and the head of a tied model.
_IGNORED = re.compile(
    r"model\.(layers\.\d{1,4}\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached|cos|sin)"
    rf"|model\.layers\.\d{{1,4}}\.self_attn\.(masked_bias|attn_mask|causal_mask)|{re.escape(HEAD)}"
)
_SAMPLES, _SAMPLE_BYTES = 4, 1024  # parts of each tensor that its digest covers, and the bytes of a part


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of one layer by its Hugging Face name inside the layer, in the order of their use."""
    d, hd, linears = config.hidden_size, config.head_dim, config.linear_shapes()
    shapes: dict[str, tuple[int, ...]] = {ATTENTION_NORM: (d,)}
    for name in ATTENTION_LINEARS:
        shapes[f"{hf_linear_name(name)}.weight"] = linears[name]
        if config.o_bias if name == "o_proj" else config.qkv_bias:
            shapes[f"{hf_linear_name(name)}.bias"] = linears[name][:1]
    if config.qk_norm:
        shapes |= {Q_NORM: (hd,), K_NORM: (hd,)}
    shapes[MLP_NORM] = (d,)
    if config.post_norms:
        shapes[PRE_MLP_NORM] = (d,)
    shapes |= {f"{hf_linear_name(name)}.weight": linears[name] for name in MLP_LINEARS}
    return shapes | ({POST_MLP_NORM: (d,)} if config.post_norms else {})


def model_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model with this config by its full name, layer by layer."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= {layer_tensor(layer, name): shape for name, shape in block_shapes(config).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


class Checkpoint:
    """An opened model folder. Tensors are read-only views of mapped files; clone before writing to one."""

    def __init__(self, folder: Path, hf_config: dict[str, Any], files: list[SafetensorsFile]) -> None:
        self.folder = folder
        self.hf_config = hf_config
        self.config = LlamaConfig.from_hf(hf_config)
        self.files = [file.path for file in files]
        self._where = {name: file for file in files for name in file.tensors}
        self._states: dict[str, bnb_layout.StoredState] = {}
        self.stored: dict[str, StoredTensor] = {name: file.tensors[name] for name, file in self._where.items()}
        """Every tensor in the files by its full name; a 4-bit weight is several."""

    @property
    def weight_files(self) -> list[tuple[Path, FileKind]]:
        """Return the files that another folder with these weights needs: theirs, and the index if they have one."""
        index = [] if self.files[0].name == WEIGHTS else [(self.folder / INDEX, WEIGHT_INDEX)]
        return [*((file, MODEL_WEIGHTS) for file in self.files), *index]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights as stored."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def quant(self) -> QuantConfig | None:
        """Return how the linears are quantised; None if they are not."""
        if not self._states:
            return None
        state = next(iter(self._states.values()))
        return QuantConfig(state.quant_type, state.block_size, state.nested_block_size is not None)

    @property
    def quantized_head(self) -> bool:
        """Return True if the head is stored in 4 bits too."""
        return HEAD in self._states

    def tensor(self, name: str) -> Tensor | QuantizedTensor:
        """Return a tensor by its full Hugging Face name, dense or 4-bit, mapped. Raises ModelError for damaged 4-bit parts."""
        state = self._states.get(name)
        if state is None:
            return self._mapped(name)
        try:
            return bnb_layout.assemble(name, state, self._mapped)
        except ValueError as error:
            raise ModelError(f"{self.folder} cannot be used: {error}; copy the model folder again.") from error

    def dense(self, name: str) -> Tensor:
        """Return the embedding, a norm or the head as a dense tensor: mapped, or dequantised if it is stored in 4 bits."""
        tensor = self.tensor(name)
        return tensor if isinstance(tensor, Tensor) else nf4.dequantize(tensor)

    def block_tensors(self, layer: int) -> dict[str, Tensor | QuantizedTensor]:
        """Return all tensors of a layer by their names inside it: "self_attn.q_proj.weight", "input_layernorm.weight", …"""
        return {name: self.tensor(layer_tensor(layer, name)) for name in block_shapes(self.config)}

    def located(self, name: str) -> tuple[Path, StoredTensor]:
        """Return the file that holds a stored tensor and its place there. A 4-bit weight's codes have the weight's own name."""
        return self._where[name].path, self.stored[name]

    def release(self, name: str) -> None:
        """Let the system drop the mapped pages of a tensor and its 4-bit parts; the next access reads them again."""
        for part in [name, *(name + suffix for suffix in bnb_layout.PARTS)]:
            if part in self._where:
                self._where[part].release(part)

    def _mapped(self, name: str, alignment: int = 1) -> Tensor:
        return self._where[name].tensor(name, alignment)

    @functools.cached_property
    def digest(self) -> str:
        """Return the identity of this base model: SHA-256 over the config and each tensor's name, shape and samples.

        Only four evenly spaced kibibytes of each tensor are read, to stay fast: enough to tell trained models apart, but a
        flipped bit elsewhere goes unnoticed. The digest does not depend on how the files are sharded.
        """
        config, digest = self.config, hashlib.sha256()
        numbers = (config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.windows)
        rope = config.rope
        scaling = (rope.theta, rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor)
        digest.update(repr((config.model_type, *numbers, *scaling, rope.original_max_positions)).encode())
        if unusual := config.unlike_llama():
            digest.update(repr(unusual).encode())
        wanted = model_shapes(config)
        for name in sorted(self._where):
            if not _IGNORED.fullmatch(name) or name in wanted:
                file, stored = self._where[name], self._where[name].tensors[name]
                digest.update(repr((name, str(stored.dtype), stored.shape)).encode())
                raw = file.raw(name)
                last = max(0, len(raw) - _SAMPLE_BYTES)
                for sample in range(_SAMPLES):
                    start = last * sample // (_SAMPLES - 1)
                    digest.update(raw[start : start + _SAMPLE_BYTES])
                file.release(name)
        return digest.hexdigest()

    def _find_states(self) -> list[str]:
        """Read the quant_state of each 4-bit weight; return the faults found."""
        faults, stored = [], self.stored
        for key in stored:
            name, found, _ = key.partition(bnb_layout.STATE_PREFIX)
            if not found:
                continue
            try:
                state = bnb_layout.parse_state(self._where[key].raw(key))
            except ValueError as error:
                faults.append(f"{name} cannot be used: {error}")
                continue
            self._states[name] = state
            faults += bnb_layout.check_parts(name, state, stored)
        return faults

    def _tensor_faults(self) -> list[str]:
        """Return the faults of the tensors: missing, unknown, or of another shape or dtype than config.json says."""
        wanted, stored, faults = model_shapes(self.config), self.stored, []
        with_state = {key.partition(bnb_layout.STATE_PREFIX)[0] for key in stored if bnb_layout.STATE_PREFIX in key}
        for name, shape in wanted.items():
            if name not in stored:
                faults.append(f"{name} is missing")
                continue
            state, tensor = self._states.get(name), stored[name]
            found = tensor.shape if state is None else state.shape
            if state is None and name in with_state:
                continue  # its quant_state is faulty, which _find_states reported
            if state is None and f"{name}.absmax" in stored:
                faults.append(f"{name} has the scales of a 4-bit weight, and no quant_state")
            elif found != shape:
                faults.append(f"{name} has shape {list(found)} where config.json says {list(shape)}")
            elif state is None and tensor.dtype not in FLOATS:
                faults.append(f"{name} is stored as {tensor.dtype}; expected float32, float16 or bfloat16")
            elif state is not None and not (is_linear(name) or name == HEAD):
                faults.append(f"{name} is quantised, and edgetune reads only linears and the head in 4 bits")
        for name in stored:
            # A part of a 4-bit weight, such as its absmax, is known if the weight is.
            owner = name.partition(bnb_layout.STATE_PREFIX)[0]
            if owner == name:
                owner = next((name.removesuffix(part) for part in bnb_layout.PARTS if name.endswith(part)), name)
            if owner not in wanted and not _IGNORED.fullmatch(owner):
                faults.append(f"{name} is unknown")
        return faults + self._tied_head_faults(stored)

    def _refuse_inf_and_nan(self) -> None:
        """Raise ModelError, which names them, for vectors that hold inf or NaN: norms, biases, and the scales of 4-bit scales.

        They are short, so every command can afford it. load_llama checks the matrices.
        """
        names = [name for name, tensor in self.stored.items() if len(tensor.shape) == 1 and tensor.dtype in FLOATS]
        wanted, parts = model_shapes(self.config), tuple(bnb_layout.PARTS[1:])  # all but absmax, which can be long
        self.refuse_inf_and_nan([name for name in names if name in wanted or name.endswith(parts)])

    def long_floats(self, linears: bool) -> list[str]:
        """Return the names of the stored tensors beside the norms and biases that can hold inf or NaN and are used.

        linears: include dense linears, which a quantisation would check by itself.
        """
        wanted, used = model_shapes(self.config), []
        for name, tensor in self.stored.items():
            dense = name in wanted and name not in self._states and len(tensor.shape) == 2 and (linears or not is_linear(name))
            if tensor.dtype in FLOATS and (dense or name.endswith(bnb_layout.PARTS[0])):
                used.append(name)
        return used

    def refuse_inf_and_nan(self, names: Iterable[str]) -> None:
        """Raise ModelError, which names them, for stored tensors that hold inf or NaN; read in slices."""
        broken = []
        for name in names:
            # NaN and inf survive in the extremes, which are found 25 times as fast as isfinite looks at every number.
            extremes = [end for piece in self._where[name].pieces(name) for end in torch.aminmax(piece)]
            if not all(torch.isfinite(end) for end in extremes):
                broken.append(name)
            self._where[name].release(name)
        if broken:
            more = f" and {len(broken) - MOST_SHOWN} more" if len(broken) > MOST_SHOWN else ""
            raise ModelError(
                f"{self.folder} holds inf or NaN in {', '.join(broken[:MOST_SHOWN])}{more}, so it can compute nothing; "
                "copy or download the folder again."
            )

    def _tied_head_faults(self, stored: dict[str, StoredTensor]) -> list[str]:
        """Check that a tied model which stores a head as well stores a copy of the embedding; return the fault otherwise."""
        if not self.config.tie_embeddings or HEAD not in stored or EMBEDDING not in stored:
            return []
        comparable = HEAD not in self._states and {stored[HEAD].dtype, stored[EMBEDDING].dtype} <= set(FLOATS)
        if comparable and torch.equal(self._mapped(HEAD), self._mapped(EMBEDDING)):
            return []
        return [f"{HEAD} differs from {EMBEDDING}, but config.json sets tie_word_embeddings"]


def open_model(folder: Path | str) -> Checkpoint:
    """Open a Hugging Face folder, reading only the files' headers; a weight is mapped when it is requested.

    Raises ModelError that names the folder and all faults, or the norms and biases that hold inf or NaN.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"There is no model folder {folder}; type `edgetune models` to see what is on this machine.")
    hf_config = read_config(folder)
    paths, promised = find_weights(folder)
    files, faults = [], []
    for path in paths:
        try:
            files.append(SafetensorsFile.open(path))
        except ModelError as error:
            faults.append(str(error).rstrip(".").removesuffix("; copy it again"))
    if not faults:
        faults = index_faults(files, promised)
        checkpoint = Checkpoint(folder, hf_config, files)
        faults += checkpoint._find_states()
        faults += [] if faults else split_fused(checkpoint.config, checkpoint.stored, checkpoint._where, checkpoint._states)
        faults += checkpoint._tensor_faults()
        if not faults:
            checkpoint._refuse_inf_and_nan()
            return checkpoint
        if cause := foreign_layout(checkpoint.stored):
            raise ModelError(f"{folder} cannot be used: {cause}.")
    more = f"; and {len(faults) - MOST_SHOWN} more" if len(faults) > MOST_SHOWN else ""
    raise ModelError(
        f"{folder} is not the model that its config.json describes: {'; '.join(map(cut, faults[:MOST_SHOWN]))}{more}. "
        "Copy or download the folder again, or use another: `edgetune models`."
    )
