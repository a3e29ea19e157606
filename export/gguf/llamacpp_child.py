"""Run llama.cpp in a process of its own, because llama.cpp ends the process when a file is bad.

This is a script: it reads a request as JSON from standard input and writes its answer as JSON to the file that the request
names. It imports nothing of edgetune.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

F32 = 0
"""The number of f32 among ggml's types (ggml_type)."""
LEAST_CONTEXT = 8
"""Smallest context that a model is opened with, in tokens. Chosen by hand."""


def _open(request: dict[str, Any], positions: int) -> Any:
    """Open the model and its adapter, if any, with an fp32 cache for `positions` tokens.

    Weights are used as the file has them. llama.cpp would repack them for the CPU's matrix unit, but those kernels round
    differently, and some builds crash in them.
    """
    import llama_cpp

    defaults, context = llama_cpp.llama_model_default_params, max(positions, LEAST_CONTEXT)

    def without_repacking() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    # llama_cpp.Llama has no argument for this setting, so its defaults are replaced
    llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        type_k=F32,
        type_v=F32,
        logits_all=True,
        vocab_only="texts" in request,
        verbose=False,
    )
    if request["lora"] is not None:
        _attach(model, request["lora"].encode())
    return model


def _attach(model: Any, lora: bytes) -> None:
    """Attach an adapter to an open model. Llama(lora_path=...) would copy the whole base in memory to do so."""
    import llama_cpp

    adapter = llama_cpp.llama_adapter_lora_init(model._model.model, lora)
    if not adapter:
        raise RuntimeError("llama.cpp could not open the adapter")
    context = model._ctx.ctx
    if hasattr(llama_cpp, "llama_set_adapters_lora"):
        handles, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        failed = llama_cpp.llama_set_adapters_lora(context, handles, 1, scales)
    else:  # older versions of llama-cpp-python
        failed = llama_cpp.llama_set_adapter_lora(context, adapter, 1.0)
    if failed:
        raise RuntimeError("llama.cpp could not attach the adapter")


def logits(request: dict[str, Any]) -> None:
    """Write the logits (N, V) f32 of `ids` (N,) to the file `raw`."""
    model = _open(request, len(request["ids"]))
    model.eval(request["ids"])
    model.scores[: len(request["ids"])].astype("<f4").tofile(request["raw"])


def losses(request: dict[str, Any]) -> dict[str, Any]:
    """Return the mean loss in nats over all tokens of `documents` but the first of each; a document is a list of ids."""
    import numpy as np

    model = _open(request, max(map(len, request["documents"])))
    total, count = 0.0, 0
    for ids in request["documents"]:
        model.reset()
        model.eval(ids)
        for row, target in enumerate(ids[1:]):  # one at a time: rows of a large vocabulary take much memory in fp64
            scores = model.scores[row].astype(np.float64)
            top = scores.max()
            total += float(top + np.log(np.exp(scores - top).sum()) - scores[target])
        count += len(ids) - 1
    return {"loss": total / count}


def tokenize(request: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of each of `texts`: nothing is added, and no text becomes a control token."""
    model = _open(request, LEAST_CONTEXT)
    return {"ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]}


def quantize(request: dict[str, Any]) -> None:
    """Quantise the model to llama.cpp's own Q4_K_M and write it to the file `out`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = request["threads"]
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(request["model"].encode(), request["out"].encode(), ctypes.byref(params)):
        raise RuntimeError("llama.cpp could not quantise the model")


def main() -> None:
    """Run the action that the request names, and write its answer."""
    request = json.load(sys.stdin)
    action = {"logits": logits, "losses": losses, "tokenize": tokenize, "quantize": quantize}[request["action"]]
    answer = action(request) or {}
    Path(request["answer"]).write_text(json.dumps(answer))
    sys.stderr.flush()
    os._exit(0)  # skip the library's clean-up: some versions of it crash there


if __name__ == "__main__":
    main()
