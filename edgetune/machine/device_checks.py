"""Checks that a device computes what plain torch computes on the CPU.

`edgetune doctor` runs these checks on an NVIDIA card or an Apple GPU. Its report can be shared: it holds no path, no text of
a note, and nothing about the machine except what doctor prints anyway.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgetune.library.base_models import DEMO, resolve
from edgetune.runtime import adapter as adapters
from edgetune.runtime import attention, nf4, ops, vocabulary
from edgetune.runtime.backends import reference
from edgetune.runtime.batch import Batch
from edgetune.runtime.budget import Stored, least_layer_memory
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.device import compute_dtype
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.heap import trim_device
from edgetune.runtime.loader import load_llama
from edgetune.runtime.memory import device_memory
from edgetune.runtime.model import Llama
from edgetune.runtime.ops_types import COMPUTE_DTYPES, FEW_ROWS, AttentionGradients, AttentionInputs, Segment
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Runner

SHAPES = ((2048, 2048), (256, 2048), (2048, 5632), (257, 1000), (33, 67))
"""Shapes (out_features, in_features) to check: TinyLlama's linears, and two whose NF4 blocks cross rows; the last one has an
odd number of weights."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CPU_PRODUCT = 2e-2
"""Largest relative error of a product by the C++ kernels, which multiply in 8 bits: see backends/cpu/weights.py."""
_EXACT, _GRADIENT, _ROUNDED = 1e-4, 1e-3, 5e-2
"""Largest relative errors, chosen by hand: of an fp32 op, of a gradient through the whole model in fp32, and of anything that
is rounded to 16 or 8 bits on the way."""
_TOKENS, _NEW_TOKENS = 256, 16
"""Tokens in a training step, and tokens to generate. Chosen by hand."""
_LORA = LoraConfig(rank=8, alpha=16.0, dropout=0.05)
_CPU = torch.device("cpu")
_BORROWED_BYTES, _KEPT_BYTES = 256 << 20, 64 << 20
"""Bytes to allocate on an Apple GPU, and the most of them that may remain after they are freed. Chosen by hand."""
_MPS_ONLY = "memory"
_PATH = re.compile(r"""(?:~|[A-Za-z]:)?[/\\][^\s'"():,;]*[/\\][^\s'"():,;]*""")


@dataclass(frozen=True)
class Confirmation:
    """The outcome of one check: its name, whether it passed, and what was found."""

    name: str
    ok: bool
    detail: str


class _Differs(Exception):
    """Raised where the device's result is not the expected one."""


def confirm(device: torch.device, tell: Callable[[str], object] = lambda name: None) -> list[Confirmation]:
    """Run all checks on `device`, which takes seconds. A check that raises counts as failed.

    tell: called with the name of each check before it runs, because a faulty driver may end the whole program.
    """
    results = []
    for name, check in CHECKS.items():
        if name != _MPS_ONLY or device.type == "mps":
            tell(name)
            results.append(_run(name, check, device))
    return results


def without_paths(text: str) -> str:
    """Return the text on one line, without anything that looks like a path, or names the home folder or this Python's."""
    for folder in sorted({str(Path.home()), sys.prefix, sys.base_prefix} - {os.sep}, key=len, reverse=True):
        text = text.replace(folder, f"{os.sep}…{os.sep}…")
    return _PATH.sub("…", " ".join(text.split()))


def _run(name: str, check: Callable[[torch.device], str], device: torch.device) -> Confirmation:
    """Run one check; return its outcome, whatever it raises."""
    try:
        return Confirmation(name, True, check(device))
    except _Differs as found:
        return Confirmation(name, False, without_paths(str(found)))
    except Exception as error:  # a faulty driver may raise anything, and the report is there to show it
        text = str(error.strerror if isinstance(error, OSError) else error)
        return Confirmation(name, False, f"{type(error).__name__}: {without_paths(text)[:300]}")


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error, |found - wanted| / |wanted|; infinity if a number is not finite."""
    error = float((found.detach().cpu().float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _within(what: str, error: float, bound: float) -> float:
    """Return `error` if it is within `bound`; else raise _Differs, which names `what` was computed."""
    if not error <= bound:
        raise _Differs(f"{what}: relative error {error:.2g}, expected {bound:.2g} at most")
    return error


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _kernels(device: torch.device) -> str:
    """Check that the device's own kernels are in use."""
    missing = ops.kernels_missing(device.type)
    if missing is not None:
        raise _Differs(f"plain torch is used instead: {missing}")
    return f"back end {ops.backend_for(device).NAME}"


def _dequantisation(device: torch.device) -> str:
    """Check NF4 to dense against nf4.py, which every back end should match bit for bit."""
    equal = count = 0
    for number, shape in enumerate(SHAPES):
        for double_quant in (True, False):
            quantized = nf4.quantize(_random(*shape, seed=number), double_quant=double_quant)
            there = quantized.to(device)
            for dtype in _FLOATS:
                found, wanted = ops.dequantize(there, dtype).cpu(), nf4.dequantize(quantized, dtype)
                _within(f"{shape} in {dtype}", _relative_error(found, wanted), torch.finfo(dtype).eps)
                equal, count = equal + torch.equal(found, wanted), count + 1
    return f"{equal} of {count} bit for bit" + (", the others within one rounding" if equal < count else "")


def _products(device: torch.device) -> str:
    """Check products of few rows with a packed weight against the dense products."""
    worst = 0.0
    for number, shape in enumerate(SHAPES):
        quantized = nf4.quantize(_random(*shape, seed=number))
        there, dense = quantized.to(device), nf4.dequantize(quantized, torch.float32)
        for dtype in COMPUTE_DTYPES:
            bound = _CPU_PRODUCT if device.type == "cpu" else max(2 * torch.finfo(dtype).eps, _EXACT)
            for rows in (1, 2, 7, FEW_ROWS):
                x = _random(rows, shape[1], seed=rows).to(dtype)
                error = _relative_error(ops.matvec(x.to(device), there), x.float() @ dense.T)
                worst = max(worst, _within(f"{rows} rows times {shape} in {dtype}", error, bound))
    return f"largest relative error {worst:.2g}"


def _dense_products(device: torch.device) -> str:
    """Check products into columns of a wider tensor, and with very many terms; torch got both wrong on Apple GPUs."""
    worst = 0.0
    x, w, wide = _random(64, 96), _random(96, 80, seed=1), _random(64, 200, seed=2)
    dlogits, head = _random(32, 40000, seed=3), _random(40000, 48, seed=4)
    for dtype in COMPUTE_DTYPES:
        bound = max(8 * torch.finfo(dtype).eps, _EXACT)
        x_, w_, found = (tensor.to(device, dtype, copy=True) for tensor in (x, w, wide))
        ops.product_into(found[:, 7:87], x_, w_)
        ops.add_product(found[:, 100:180], x_, w_, 0.5)
        wanted = wide.to(dtype).float()
        product = x.to(dtype).float() @ w.to(dtype).float()
        wanted[:, 7:87] = product
        wanted[:, 100:180] += 0.5 * product
        worst = max(worst, _within(f"into columns, {dtype}", _relative_error(found, wanted), bound))
        gradient = vocabulary.input_gradient(dlogits.to(device, dtype), head.to(device, dtype))
        terms = dlogits.to(dtype).float() @ head.to(dtype).float()
        worst = max(worst, _within(f"of 40,000 terms, {dtype}", _relative_error(gradient, terms), bound))
    return f"largest relative error {worst:.2g}"


def _elementwise(device: torch.device) -> str:
    """Check the ops between the products, forward and backward, in fp32. Dropout that drops other values shows as an error."""
    h, weight, gate_up = _random(300, 384), _random(384, seed=1), _random(300, 512, seed=2)
    dx, dact = _random(300, 384, seed=3), _random(300, 256, seed=4)
    heads, angles = _random(300, 6, 64, seed=5), _random(300, 32, seed=6)
    logits, targets = _random(100, 999, seed=7), torch.arange(100) * 7
    there = [tensor.to(device) for tensor in (h, weight, gate_up, dx, dact, angles, logits, targets)]
    h_, weight_, gate_up_, dx_, dact_, angles_, logits_, targets_ = there
    gate, up = gate_up.chunk(2, dim=1)
    reference.swiglu_backward(dact, gate, up, *(gradients := torch.empty_like(gate_up)).chunk(2, dim=1))
    reference.geglu_backward(dact, gate, up, *(of_gelu := torch.empty_like(gate_up)).chunk(2, dim=1))
    rotated = reference.rope_(heads.clone(), angles.cos(), angles.sin())
    losses = reference.cross_entropy_(given := logits.clone(), targets, torch.ones(100))
    pairs = {
        "rms_norm": (ops.rms_norm(h_, weight_, 1e-5), reference.rms_norm(h, weight, 1e-5)),
        "its backward": (ops.rms_norm_backward(dx_, h_, weight_, 1e-5), reference.rms_norm_backward(dx, h, weight, 1e-5)),
        "swiglu": (ops.swiglu(gate_up_), reference.swiglu(gate, up)),
        "swiglu's backward": (ops.swiglu_backward(dact_, gate_up_), gradients),
        "geglu": (ops.geglu(gate_up_), reference.geglu(gate, up)),
        "geglu's backward": (ops.geglu_backward(dact_, gate_up_), of_gelu),
        "rope": (ops.rope_(heads.to(device, copy=True), angles_.cos(), angles_.sin()), rotated),
        "cross entropy": (ops.cross_entropy_(logits_, targets_, torch.ones(100, device=device)), losses),
        "its gradient": (logits_, given),
        "dropout": (ops.dropout(h_, 0.3, 1234567), reference.dropout(h, 0.3, 1234567)),
    }
    worst = max(_within(name, _relative_error(*pair), _EXACT) for name, pair in pairs.items())
    return f"largest relative error {worst:.2g}"


def _attention(device: torch.device) -> str:
    """Check attention over packed documents, with grouped heads and a window, forward and backward; in each dtype, because a
    card computes bf16 with another kernel."""
    q, k, v, do = _random(300, 6, 64), _random(300, 2, 64, seed=1), _random(300, 2, 64, seed=2), _random(300, 6, 64, seed=3)
    segments, errors = [Segment.packed(0, 130), Segment.packed(130, 300)], []
    for dtype in COMPUTE_DTYPES:
        bound, worst = _EXACT if dtype == torch.float32 else 4 * torch.finfo(dtype).eps, 0.0
        q_, k_, v_, do_ = (tensor.to(dtype) for tensor in (q, k, v, do))
        for window in (None, 100):
            exact = AttentionInputs(q_.float(), k_.float(), v_.float(), segments, window, 0.125)
            o, lse = attention.forward(exact)
            wanted = [torch.empty_like(tensor) for tensor in (q, k, v)]
            attention.backward(exact, o, lse, do_.float(), AttentionGradients(*wanted))
            there = AttentionInputs(q_.to(device), k_.to(device), v_.to(device), segments, window, 0.125)
            o_, lse_ = ops.attention_forward(there)
            found = [torch.empty_like(tensor) for tensor in (there.q, there.k, there.v)]
            ops.attention_backward(there, o_, lse_, do_.to(device), AttentionGradients(*found))
            for name, one, other in zip(("output", "dq", "dk", "dv"), (o_, *found), (o, *wanted), strict=True):
                worst = max(worst, _within(f"{name} in {dtype}, window {window}", _relative_error(one, other), bound))
        errors.append(f"{worst:.2g} in {dtype}".replace("torch.", ""))
    return f"largest relative error {', '.join(errors)}"


def _optimizer(device: torch.device) -> str:
    """Check three steps of AdamW with states of 32 and of 8 bits, on a parameter that takes many launches of a fused kernel."""
    shapes, worst = ((2200, 1024), (33, 67), (64, 1024)), 0.0
    for bits in (32, 8):
        moved = []
        for where in (_CPU, device):
            start = [_random(*shape, seed=number) for number, shape in enumerate(shapes)]
            parameters = [tensor.to(where, copy=True) for tensor in start]
            optimizer = PagedAdamW(parameters, weight_decay=0.1, bits=bits)
            for step in range(3):
                for number, parameter in enumerate(parameters):
                    parameter.grad = _random(*shapes[number], seed=10 + 3 * step + number).to(where)
                optimizer.step(1e-2)
            moved.append([parameter.cpu() - before for parameter, before in zip(parameters, start, strict=True)])
        bound = _EXACT if bits == 32 else _ROUNDED  # an 8-bit code may be off by one where a quotient is rounded otherwise
        for shape, wanted, found in zip(shapes, *moved, strict=True):
            worst = max(worst, _within(f"{bits} bits, {shape}", _relative_error(found, wanted), bound))
    return f"largest relative error {worst:.2g}"


def _demo(device: torch.device, dtype: torch.dtype, layer_memory: int | None = None) -> Llama:
    """Return the demo model with a fresh adapter."""
    model = load_llama(open_model(resolve(DEMO).path), dtype, device, layer_memory=layer_memory)
    adapters.attach_new(model, _LORA, seed=0)
    return model


def _batch(vocab_size: int) -> Batch:
    """Return a batch of two packed documents, (_TOKENS,) random ids; the first five tokens have no loss."""
    ids = torch.randint(3, vocab_size, (_TOKENS + 1,), generator=torch.Generator().manual_seed(0))
    half = _TOKENS // 2
    weights, positions = torch.full((_TOKENS,), 1 / _TOKENS), torch.arange(_TOKENS) % half
    weights[:5] = 0  # context only: the loss skips these rows
    segments = (Segment.packed(0, half), Segment.packed(half, _TOKENS))
    return Batch(ids[:-1], ids[1:], weights, positions, segments)


def _train_two_steps(model: Llama) -> tuple[list[float], Tensor]:
    """Train two steps; return their losses, and the second step's gradient, flattened.

    By the second step lora_B is no longer zero, so every part of the adapter has a gradient.
    """
    runner, parameters = Runner(model), adapters.parameters(model)
    optimizer, losses = PagedAdamW(parameters), []
    for step in range(2):
        optimizer.zero_grad()
        losses.append(float(runner.train(_batch(model.config.vocab_size), dropout_key=step)))
        if step == 0:
            optimizer.step(1e-3)
    gradients = [parameter.grad.cpu().flatten() for parameter in parameters if parameter.grad is not None]
    return losses, torch.cat(gradients)


def _train_on_cpu() -> tuple[list[float], Tensor]:
    """Train the same two steps with plain torch on the CPU, in fp32, as the result to compare with."""
    with ops.use_backend("reference"):
        return _train_two_steps(_demo(_CPU, torch.float32))


def _compare(name: str, found: tuple[list[float], Tensor], wanted: tuple[list[float], Tensor], bound: float) -> str:
    """Compare losses and gradient with the wanted ones; return their relative errors in words. Raises _Differs."""
    loss = max(abs(one - other) / other for one, other in zip(found[0], wanted[0], strict=True))
    _within(f"loss {name}", loss, bound)
    gradient = _within(f"gradient {name}", _relative_error(found[1], wanted[1]), bound)
    return f"{name}: relative error of the loss {loss:.1g}, of the gradient {gradient:.1g}"


def _training(device: torch.device) -> str:
    """Check two training steps on the demo model: in fp32 they match the CPU's, in the device's own dtype they are close."""
    wanted, dtype = _train_on_cpu(), compute_dtype(device)
    results = [_compare("in fp32", _train_two_steps(_demo(device, torch.float32)), wanted, _GRADIENT)]
    if dtype != torch.float32:
        results.append(_compare(f"in {dtype}".replace("torch.", ""), _train_two_steps(_demo(device, dtype)), wanted, _ROUNDED))
    return "; ".join(results)


def _streaming(device: torch.device) -> str:
    """Check two training steps where all layers but two are read from the file while the steps run."""
    checkpoint = open_model(resolve(DEMO).path)
    model = _demo(device, torch.float32, 2 * least_layer_memory(checkpoint.config, Stored.of(checkpoint)))
    assert model.pager.streaming
    return _compare("in fp32", _train_two_steps(model), _train_on_cpu(), _GRADIENT)


def _text(device: torch.device) -> str:
    """Check that the demo model generates the CPU's text, taking the likeliest token each time."""
    prompt, texts = [1, *range(3, 43)], []
    for where, back_end in ((_CPU, "reference"), (device, ops.backend_for(device).NAME)):
        with ops.use_backend(back_end), torch.no_grad():
            generator = Generator(Runner(_demo(where, torch.float32)), 96)
            texts.append(list(generator.generate(prompt, _NEW_TOKENS, Sampling(0.0))))
    if texts[0] != texts[1]:
        same = sum(one == other for one, other in zip(*texts, strict=False))
        raise _Differs(f"{same} of {len(texts[0])} tokens match the CPU's")
    return f"{len(texts[0])} tokens match the CPU's"


def _memory(device: torch.device) -> str:
    """Check that an Apple GPU's memory is counted, and that trimming gives it back to the system."""
    gc.collect()
    trim_device(device)
    before = device_memory(device)
    tensor = torch.zeros(_BORROWED_BYTES, dtype=torch.uint8, device=device)
    counted = device_memory(device) - before
    del tensor
    trim_device(device)
    left = device_memory(device) - before
    if counted < _BORROWED_BYTES or left > _KEPT_BYTES:
        raise _Differs(
            f"{_BORROWED_BYTES >> 20} MB were allocated, {counted >> 20} MB were counted, and {left >> 20} MB are left after "
            "trimming"
        )
    return f"{counted >> 20} MB counted, {max(left, 0) >> 20} MB left after trimming"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "kernels": _kernels,
    "NF4 dequantisation": _dequantisation,
    "products of few rows": _products,
    "dense products": _dense_products,
    "elementwise parts": _elementwise,
    "attention": _attention,
    "optimizer": _optimizer,
    "training steps": _training,
    "streamed layers": _streaming,
    "greedy text": _text,
    _MPS_ONLY: _memory,
}
"""All checks by name, in the order in which they run. Each returns what it found, or raises."""
