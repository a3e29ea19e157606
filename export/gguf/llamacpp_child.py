"""What runs in a process of its own, since llama.cpp ends the process that gives it a bad file.

Run as a script, with a request as JSON on its standard input, and an answer as JSON in the file that it names. It
imports nothing of edgetune's: a model is opened here, and a few numbers go back.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

F32 = 0  # ggml's number of the type


def _open(request: dict[str, Any], positions: int) -> Any:
    """The model, and its adapter where there is one, with a cache for `positions` tokens kept in fp32.

    Weights are used as the file has them: repacked copies for a CPU's matrix unit are left out, since their kernels
    round otherwise and some builds crash in them.
    """
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=max(positions, 8),
        n_batch=max(positions, 8),
        n_ubatch=max(positions, 8),
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
    """Put an adapter on an open model. Llama(lora_path=...) would do it on a copy of the whole base in memory."""
    import llama_cpp

    adapter = llama_cpp.llama_adapter_lora_init(model._model.model, lora)
    if not adapter:
        raise RuntimeError("llama.cpp could not open the adapter")
    context = model._ctx.ctx
    if hasattr(llama_cpp, "llama_set_adapters_lora"):
        handles, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        failed = llama_cpp.llama_set_adapters_lora(context, handles, 1, scales)
    else:  # in older versions
        failed = llama_cpp.llama_set_adapter_lora(context, adapter, 1.0)
    if failed:
        raise RuntimeError("llama.cpp could not attach the adapter")


def logits(request: dict[str, Any]) -> None:
    """ids (N,) -> logits (N, V) f32 in the file `raw`."""
    model = _open(request, len(request["ids"]))
    model.eval(request["ids"])
    model.scores[: len(request["ids"])].astype("<f4").tofile(request["raw"])


def losses(request: dict[str, Any]) -> dict[str, Any]:
    """documents, each a list of ids -> nats a token of all that follow another."""
    import numpy as np

    model = _open(request, max(map(len, request["documents"])))
    total, count = 0.0, 0
    for ids in request["documents"]:
        model.reset()
        model.eval(ids)
        scores = model.scores[: len(ids) - 1].astype(np.float64)
        top = scores.max(-1)
        chosen = scores[np.arange(len(ids) - 1), ids[1:]]
        total += float((top + np.log(np.exp(scores - top[:, None]).sum(-1)) - chosen).sum())
        count += len(ids) - 1
    return {"loss": total / count}


def tokenize(request: dict[str, Any]) -> dict[str, Any]:
    """texts -> ids of each, nothing added and no control token looked for."""
    model = _open(request, 8)
    return {"ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]}


def quantize(request: dict[str, Any]) -> None:
    """The model as llama.cpp's own Q4_K_M, in the file `out`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = request["threads"]
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(request["model"].encode(), request["out"].encode(), ctypes.byref(params)):
        raise RuntimeError("llama.cpp could not quantise the model")


def main() -> None:
    """Do what the request asks for."""
    request = json.load(sys.stdin)
    action = {"logits": logits, "losses": losses, "tokenize": tokenize, "quantize": quantize}[request["action"]]
    answer = action(request) or {}
    Path(request["answer"]).write_text(json.dumps(answer))
    sys.stderr.flush()
    os._exit(0)  # freeing what the process has anyway is where some versions of the library trip


if __name__ == "__main__":
    main()
