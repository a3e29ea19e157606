"""What an app needs beside the .mlpackage: how to call it (how-to-call.json), and the adapter as the inputs that it feeds.

adapter.safetensors holds one fp16 tensor for each adapter input, by the input's name: `q_proj_a` (L, r, in) and `q_proj_b`
(L, out, r), the scale alpha/r multiplied into b. A package takes every adapter of its base and linears whose rank is not above
its own: missing rows of a and columns of b are zeros. So a night's adapter needs no new package, only this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.export.coreml.model import HIDDEN, Plan
from edgetune.export.coreml.package import Array
from edgetune.export.verify import GOLDEN_FILE, PROMPT
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LINEARS, LlamaConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import EXPORT_RECORD, read_object
from edgetune.runtime.model_folder import companions
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec
from edgetune.runtime.tokenizer import Tokenizer, read_template

PACKAGE, CALL_FILE, ADAPTER_FILE = "model.mlpackage", "how-to-call.json", "adapter.safetensors"
FORMAT = 1
ADVICE = {
    "minimum_os": ["iOS 18", "macOS 15"],
    "compute_units": "cpuAndGPU",
    "why": "The Neural Engine is reported to refuse nf4: tables with a scale for each block; nothing was tried on it.",
    "unverified": "Never run by Core ML itself; edgetune proves graph and weights with an evaluator of its own.",
}
STEPS = (
    "make one state for a conversation; M is the tokens read so far and with this call, at most context_tokens",
    "read the prompt in chunks of up to prefill_tokens, then one token a call",
    "the next token is drawn from the last row of logits; stop at one of stop_ids",
    "positions are no input: a chunk takes places M - T to M of the cache and is rotated (RoPE) inside",
    "beyond context_tokens begin a new state with a shorter text",
)
FUNCTION_STEP = "load one of functions by MLModelConfiguration.functionName: the first, and the default, is with the adapter"
ADAPTER_LAYOUT = (
    "safetensors: 8 bytes, little-endian, the length of a JSON header; the header, by name: dtype F16, shape and data_offsets "
    "[first, end), in bytes from the header's end; then the numbers, little-endian, the last axis fastest. __metadata__ has "
    "the base, which must be this one, and the rank, no more than this one. _a is (layers, rank, in); _b (layers, out, rank), "
    "the scale in it"
)
TEXT_RULE = "start_ids, then the text's tokens with nothing added; no text becomes a control token, whatever it spells"
CHAT_RULE = (
    "render chat_template (Jinja) with messages and add_generation_prompt true, encode it with its control tokens as such, and "
    "put bos_id before it where it is not the first"
)
GOLDEN_RULE = (
    "the first prompt_tokens of token_ids are start_ids and the tokens of prompt: what the app's tokenizer must find. "
    "In a new state, with this folder's adapter, read these in chunks and the others one by one: row t of all logits has "
    "top_logits[t] at top_token_ids[t], within bounds.max_logit where edgetune evaluates the package; Apple's kernels were not "
    "measured"
)


def stacked(adapter: Adapter, config: LlamaConfig) -> dict[str, Array]:
    """The adapter's tensors as a package's inputs, f16 by name; zeros for layers that it leaves alone.

    Raises AdapterError for what leaves fp16.
    """
    rank, shapes, result = adapter.config.rank, config.linear_shapes(), {}
    for name in (name for name in LINEARS if name in adapter.config.targets):
        out, width = shapes[name]
        for part, shape, scale in (("A", (rank, width), 1.0), ("B", (out, rank), adapter.config.scale)):
            layers = [adapter.tensors.get((layer, name, part), torch.zeros(shape)) for layer in range(config.num_layers)]
            values = (torch.stack(layers) * scale).half()
            if not torch.isfinite(values).all():
                raise AdapterError(f"The adapter's {name} leaves fp16's range, in which Core ML computes; train it again.")
            result[f"{name}_{part.lower()}"] = values.numpy()
    return result


def write_adapter(adapter: Adapter, config: LlamaConfig, base: str, path: Path) -> None:
    """Write adapter.safetensors, private, for packages of the base with digest `base`."""
    tensors = {name: torch.from_numpy(values) for name, values in stacked(adapter, config).items()}
    specs = [TensorSpec(name, torch.float16, tuple(values.shape)) for name, values in tensors.items()]
    with SafetensorsWriter(path, specs, {"base": base, "rank": str(adapter.config.rank)}) as writer:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])


def read_adapter(path: Path, call: Mapping[str, Any]) -> dict[str, Array]:
    """An adapter file as the inputs of the package that `call` describes, padded with zeros to its rank.

    Raises AdapterError for one of another base, other linears or a higher rank.
    """
    file = SafetensorsFile.open(path)
    wanted = {name: tuple(shape) for name, shape in call["adapter"]["inputs"].items()}
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    rank, own = int(call["adapter"]["rank"]), file.metadata.get("rank", "")
    if file.metadata.get("base") != call["base"] or set(found) != set(wanted) or not own.isdecimal() or int(own) > rank:
        raise AdapterError(
            f"{path} does not fit this package: it is for base {str(file.metadata.get('base'))[:12]}, rank {own} on "
            f"{len(found)} inputs, expected base {str(call['base'])[:12]}, rank {rank} or less on {len(wanted)}; "
            "type `edgetune export coreml` again."
        )
    padded = {}
    for name, shape in wanted.items():
        padded[name] = np.zeros(shape, np.float16)
        if any(inner > outer for inner, outer in zip(found[name], shape, strict=True)):
            raise AdapterError(f"{path} holds {name} of shape {found[name]}, expected up to {shape}; export it again.")
        padded[name][tuple(slice(size) for size in found[name])] = file.tensor(name).numpy()
    return padded


def how_to_call(plan: Plan, folder: Path, base: str, functions: list[str]) -> dict[str, Any]:
    """The contents of how-to-call.json. `folder` is the base model's, `base` its digest; functions: the default one first."""
    tokenizer = Tokenizer.load(folder)
    template = read_template(folder)
    return {
        "format": FORMAT,
        "package": PACKAGE,
        "base": base,
        **ADVICE,
        "functions": functions,
        "context_tokens": plan.context,
        "prefill_tokens": plan.prefill,
        "inputs": _inputs(plan),
        "outputs": {"logits": {"dtype": "float16", "shape": [1, "T", plan.config.vocab_size]}},
        "states": {name: {"dtype": "float16", "shape": list(plan.state_shape)} for name in ("k_cache", "v_cache")},
        "steps": [*([FUNCTION_STEP] if functions else []), *STEPS],
        "adapter": _adapter_inputs(plan) if plan.input_ranks else None,
        "tokenizer": {"files": [file.name for file in companions(folder)], "rule": TEXT_RULE},
        "start_ids": tokenizer.start_ids,
        "stop_ids": list(tokenizer.eos_ids),
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "chat_template": None if template is None else template[0],
        "chat_rule": None if template is None else CHAT_RULE,
        "golden": {"file": GOLDEN_FILE, "prompt": PROMPT, "rule": GOLDEN_RULE},
    }


def _inputs(plan: Plan) -> dict[str, Any]:
    """The inputs of every call, whatever the adapter."""
    window = next((window for layer in range(plan.config.num_layers) if (window := plan.window(layer)) is not None), None)
    mask = {"dtype": "float16", "shape": [1, 1, "T", "M"], "seen": 0.0, "hidden": HIDDEN}
    masks = {"causal_mask": {**mask, "rule": "row t sees position m where m <= M - T + t"}}
    if window is not None:
        rule = f"row t sees position m where M - T + t - {window} < m <= M - T + t"
        masks["window_mask"] = {**mask, "rule": rule, "window": window}
    ids = {"dtype": "int32", "shape": [1, "T"], "rule": "T is 1 to prefill_tokens: a chunk of a prompt, with no padding"}
    return {"input_ids": ids, **masks}


def _adapter_inputs(plan: Plan) -> dict[str, Any]:
    """The adapter's inputs, and the file that has them."""
    return {
        "file": ADAPTER_FILE,
        "dtype": "float16",
        "rank": max(plan.input_ranks.values()),
        "inputs": {name: list(shape) for name, shape in plan.adapter_shapes().items()},
        "rule": "give each input the tensor of its name, a lower rank padded with zeros; all zeros is the bare base",
        "layout": ADAPTER_LAYOUT,
        "swap": "feed another file's tensors, in a new state: what is cached was computed with the adapter before",
    }


def write_call(call: Mapping[str, Any], folder: Path) -> None:
    """Write how-to-call.json."""
    atomic_write(folder / CALL_FILE, json.dumps(call, indent=2) + "\n")


def read_call(folder: Path) -> dict[str, Any]:
    """Read how-to-call.json. Raises ModelError where it is none."""
    return read_object(folder / CALL_FILE, EXPORT_RECORD)


def masks(call: Mapping[str, Any], count: int, length: int) -> dict[str, Array]:
    """The masks, f16 (1, 1, T, M), of a chunk of `count` tokens that ends at `length`, as the rules in `call` say."""
    query, key = np.arange(length - count, length)[:, None], np.arange(length)[None]
    result = {}
    for name, mask in call["inputs"].items():
        if name == "input_ids":
            continue
        sees = (key <= query) & (key > query - int(mask.get("window", length)))
        result[name] = np.where(sees, mask["seen"], mask["hidden"]).astype(np.float16)[None, None]
    return result
