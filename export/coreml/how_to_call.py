"""Write and read how-to-call.json, which tells an app's developer, and the app itself, how to call a package.

The keys are the file's format; the rules and steps are sentences for the developer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.export.coreml.adapter_file import ADAPTER_FILE
from edgetune.export.coreml.package import Array
from edgetune.export.coreml.plan import Plan
from edgetune.export.verify import GOLDEN_FILE, PROMPT
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object
from edgetune.runtime.model_folder import companions
from edgetune.runtime.tokenizer import Tokenizer, read_template
from edgetune.runtime.untrusted_file import EXPORT_RECORD

PACKAGE, CALL_FILE = "model.mlpackage", "how-to-call.json"
FORMAT = 1
HIDDEN = -1e4
"""The number that a mask adds to the score of a position that is not seen. Chosen by hand: softmax leaves nothing of such a
score, and fp16 can still add to it."""
ADVICE = {
    "minimum_os": ["iOS 18", "macOS 15"],
    "compute_units": "cpuAndGPU",
    "why": "The Neural Engine is reported to reject nf4 (lookup tables with a scale for each block). edgetune did not try it.",
    "unverified": "edgetune did not run this package in Core ML. Its own evaluator proves the graph and the weights. All "
    "inputs have a range of shapes, since Core ML is reported to end a process that loads a program with states whose inputs "
    "are partly fixed (coremltools issue 2548).",
}
STEPS = (
    "Make one state for each conversation. M is the number of tokens read so far, this call included: at most context_tokens.",
    "Read the prompt in chunks of up to prefill_tokens. Then pass one token per call.",
    "Choose the next token from the last row of logits. Stop at any of stop_ids.",
    "Do not pass positions. Each chunk fills cache slots M-T to M and is rotated (RoPE) inside the model.",
    "To go beyond context_tokens, make a new state and read a shorter text.",
)
FUNCTION_STEP = (
    "Load one of the names in functions by setting MLModelConfiguration.functionName. "
    "The first is the default and includes the adapter."
)
ADAPTER_LAYOUT = (
    "The file is safetensors. Its first 8 bytes are the length of a JSON header, little-endian. The header maps each name to "
    "its dtype (F16), its shape and its data_offsets [first, end), in bytes from the end of the header. The numbers follow, "
    "little-endian, the last axis fastest. __metadata__ holds base, which must equal the base here, and rank, which must not "
    "exceed the rank here. Tensors named _a have shape (layers, rank, in); tensors named _b have shape (layers, out, rank) and "
    "include the scale."
)
TEXT_RULE = (
    "Pass start_ids, then the tokens of the text, and add nothing else. No part of a text may become a control token, even if "
    "the text spells one."
)
CHAT_RULE = (
    "Render chat_template (Jinja) with messages and add_generation_prompt = true. Encode the result so that its control tokens "
    "become control tokens. Put chat_start_ids in front unless the result begins with them already."
)
GOLDEN_RULE = (
    "The first prompt_tokens of token_ids are start_ids and the tokens of prompt: the app's tokenizer must produce the same. "
    "In a new state, with this folder's adapter, read these tokens in chunks and the others one by one. Row t of all logits "
    "must hold top_logits[t] at top_token_ids[t]. In edgetune's evaluation of the package they differ by at most "
    "bounds.max_logit; Apple's kernels were not measured."
)


def how_to_call(plan: Plan, folder: Path, base: str, functions: list[str]) -> dict[str, Any]:
    """Return the contents of how-to-call.json.

    folder: the base model's. base: its digest. functions: the names of the package's functions, the default first; empty where
    there is only one.
    """
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
        "chat_start_ids": list(tokenizer.start.chat),
        "stop_ids": list(tokenizer.eos_ids),
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "chat_template": None if template is None else template[0],
        "chat_rule": None if template is None else CHAT_RULE,
        "golden": {"file": GOLDEN_FILE, "prompt": PROMPT, "rule": GOLDEN_RULE},
    }


def _inputs(plan: Plan) -> dict[str, Any]:
    """Describe the inputs of every call, apart from the adapter's."""
    window = next((window for layer in range(plan.config.num_layers) if (window := plan.window(layer)) is not None), None)
    mask = {"dtype": "float16", "shape": [1, 1, "T", "M"], "seen": 0.0, "hidden": HIDDEN}
    masks = {"causal_mask": {**mask, "rule": "Row t sees position m if m <= M - T + t."}}
    if window is not None:
        rule = f"Row t sees position m if M - T + t - {window} < m <= M - T + t."
        masks["window_mask"] = {**mask, "rule": rule, "window": window}
    rule = "T is 1 to prefill_tokens. Pass the tokens of a chunk, without padding."
    return {"input_ids": {"dtype": "int32", "shape": [1, "T"], "rule": rule}, **masks}


def _adapter_inputs(plan: Plan) -> dict[str, Any]:
    """Describe the adapter's inputs and the file that holds them."""
    return {
        "file": ADAPTER_FILE,
        "dtype": "float16",
        "rank": max(plan.input_ranks.values()),
        "inputs": {name: list(shape) for name, shape in plan.adapter_shapes().items()},
        "rule": "Pass each input the tensor of its name. A lower rank needs no padding. All zeros give the bare base model.",
        "layout": ADAPTER_LAYOUT,
        "swap": "To change adapters, begin a new state and pass another file's tensors: a cache is valid only "
        "for its own adapter.",
    }


def write_call(call: Mapping[str, Any], folder: Path) -> None:
    """Write how-to-call.json."""
    atomic_write(folder / CALL_FILE, json.dumps(call, indent=2) + "\n")


def read_call(folder: Path) -> dict[str, Any]:
    """Read how-to-call.json. Raises ModelError where it is missing or damaged."""
    return read_object(folder / CALL_FILE, EXPORT_RECORD)


def masks(call: Mapping[str, Any], count: int, length: int) -> dict[str, Array]:
    """Return the masks, f16 (1, 1, T, M), of a chunk of `count` tokens that ends at `length`, following the rules in `call`."""
    query, key = np.arange(length - count, length)[:, None], np.arange(length)[None]
    result = {}
    for name, mask in call["inputs"].items():
        if name == "input_ids":
            continue
        sees = (key <= query) & (key > query - int(mask.get("window", length)))
        result[name] = np.where(sees, mask["seen"], mask["hidden"]).astype(np.float16)[None, None]
    return result
