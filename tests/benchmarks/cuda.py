"""A LLaMA of random weights on an NVIDIA card: edgetune beside transformers + peft + bitsandbytes, in the same run.

    python tests/benchmarks/cuda.py [--tokens 4096] [--repeats 3] [--json FILE]
    python tests/benchmarks/cuda.py --smoke      tries the script out, on the CPU in Triton's interpreter: no figures

Training: a row of `--tokens` tokens, r16 on all linears, forward, backward, clipping, AdamW. Decoding: one token after
another, and the share of the card's read bandwidth that its weights take. Numerics: the kernels against plain torch.
Everyone has the same NF4 folder, written once. No card has run this yet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import train_1b
from common import Contender, Result

PROMPT, SPEED = 16, "tokens_per_second"
OURS = {f"ours-{setting}": f"edgetune, recompute {setting}" for setting in ("none", "selective", "full")}
PEERS = {
    f"peft-{kind}{again}": f"transformers+peft+bitsandbytes, adapters in {kind}, recompute {'on' if again else 'off'}"
    for kind in ("fp32", "bf16")
    for again in ("", "-recompute")
}
DECODERS = {"decode-ours": "decode: edgetune", "decode-peer": "decode: transformers+bitsandbytes"}
OTHERS = {"card": "the card's bandwidth and GEMM peak", "numerics": "kernels against plain torch"}


def main() -> None:
    flags = common.parser(__doc__)
    flags.set_defaults(shape="llama-3.1-8b")
    flags.add_argument("--tokens", type=int, default=4096)
    flags.add_argument("--steps", type=int, default=3, help="timed steps a contender and round, after a warm-up step")
    flags.add_argument("--new-tokens", type=int, default=64)
    flags.add_argument("--smoke", action="store_true", help="one tiny layer on the CPU: tries the script out")
    arguments = flags.parse_args()
    if arguments.smoke:
        from edgetune.shapes import SHAPES

        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
        SHAPES["smoke"] = dataclasses.replace(SHAPES["demo"], num_layers=1, windows=(None,), vocab_size=256, **tiny)
        arguments.shape, arguments.tokens, arguments.steps, arguments.new_tokens, arguments.repeats = "smoke", 32, 1, 2, 1
    if arguments.contender:
        common.serve(arguments, contend)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """The parent: writes the weights, runs everyone in turn, prints the table."""
    common.random_folders(arguments.workdir, arguments.shape, dense=False)
    passed = ["--threads", str(arguments.threads), "--workdir", str(arguments.workdir)]
    for name in ("shape", "tokens", "steps", "new_tokens"):
        passed += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    passed += ["--smoke"] if arguments.smoke else []
    every = [Contender(key, label) for key, label in {**OTHERS, **OURS, **PEERS, **DECODERS}.items()]
    host, contenders = common.machine(arguments.threads), common.chosen(every, arguments.only)
    results = common.run_rounds(Path(__file__).resolve(), contenders, passed, arguments.repeats)
    everything = {"machine": host, "versions": common.versions(), "lacking": [], "arguments": passed, "results": results}
    rows = [[label, common.number(common.median(results.get(key, []), SPEED)),
             common.megabytes(common.median(results.get(key, []), "peak_card_bytes")),
             common.number(common.median(results.get(key, []), "first_loss"), "{:.4f}")]
            for key, label in {**OURS, **PEERS, **DECODERS}.items()]  # fmt: skip
    cards = [row["card"] for row in results.get("card", []) if "card" in row]
    about = f"{cards[0] if cards else 'card unknown'}; {arguments.shape}, rows of {arguments.tokens} tokens.\n"
    table = common.table(["", "tokens/s", "peak card memory MB", "first loss"], rows)
    text = [common.heading(everything), about, table, "", common.listed(summarise(results))]
    common.publish(arguments.json, "\n".join(text), everything)


def summarise(results: dict[str, list[Result]]) -> Result:
    """Ratios within rounds, medians over them; each side's fastest setting."""

    def fastest(keys: dict[str, str]) -> list[Result]:
        return results.get(max(keys, key=lambda key: common.median(results.get(key, []), SPEED) or 0.0), [])

    ours, peer, decode = fastest(OURS), fastest(PEERS), results.get("decode-ours", [])
    card, numerics = results.get("card", []), results.get("numerics", [])
    return {
        "train_speed_ratio": common.median_ratio(ours, peer, SPEED),
        "train_memory_ratio": common.median_ratio(ours, peer, "peak_card_bytes"),
        "decode_speed_ratio": common.median_ratio(decode, results.get("decode-peer", []), SPEED),
        "decode_bandwidth_share": common.median_ratio(decode, card, "bytes_per_second"),
        "card_read_bytes_per_second": common.median(card, "bytes_per_second"),
        "card_gemm_flops": common.median(card, "gemm_flops"),
        **{key: common.median(numerics, key) for key in ("dequantize_differs", "matvec_error", "gradient_error")},
    }


# --- the contenders ---------------------------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> Result:
    import torch

    from edgetune.runtime import ops

    torch.set_num_threads(arguments.threads)
    arguments.device = torch.device("cpu" if arguments.smoke else "cuda")
    own = {"card": card, "numerics": numerics, "decode-ours": decode_ours, "decode-peer": decode_peer}
    with ops.use_backend("cuda"):
        return own.get(arguments.contender, train_ours if arguments.contender in OURS else train_peer)(arguments)


def timed(step: Callable[[], Any], arguments: argparse.Namespace, repeats: int, work: float) -> Result:
    """`work` a second, and the card's peak, after a warm-up, whose result is a loss or of no interest."""
    import torch

    synchronize, seconds = torch.cuda.synchronize if arguments.device.type == "cuda" else (lambda: None), []
    first = step()
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_reserved() if arguments.device.type == "cuda" else None
    loss = first if isinstance(first, float) else None
    return {SPEED: work / statistics.median(seconds), "peak_card_bytes": peak, "first_loss": loss}


def load(arguments: argparse.Namespace) -> Any:
    import torch

    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.loader import load_llama

    return load_llama(open_model(arguments.workdir / f"{arguments.shape}-nf4"), torch.bfloat16, arguments.device)


def load_peer(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa", "device_map": {"": arguments.device}}
    return AutoModelForCausalLM.from_pretrained(arguments.workdir / f"{arguments.shape}-nf4", **how)


def train_ours(arguments: argparse.Namespace) -> Result:
    from edgetune import bench
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime.optim import PagedAdamW
    from edgetune.runtime.runner import Recompute, Runner

    model = load(arguments)
    adapters.attach_new(model, bench.LORA, 0)
    runner, parameters = Runner(model, Recompute(arguments.contender.removeprefix("ours-"))), adapters.parameters(model)
    row = bench.random_row(model.config, arguments.tokens)
    return timed(stepping(lambda: runner.train(row), parameters, PagedAdamW(parameters)), arguments, arguments.steps,
                 arguments.tokens)  # fmt: skip


def train_peer(arguments: argparse.Namespace) -> Result:
    import torch
    from peft import LoraConfig, get_peft_model

    from edgetune import bench
    from edgetune.shapes import SHAPES

    model, fp32 = load_peer(arguments), "fp32" in arguments.contender
    if arguments.contender.endswith("-recompute"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=train_1b.RANK, lora_alpha=train_1b.ALPHA, target_modules=train_1b.LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=fp32).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    row = bench.random_row(SHAPES[arguments.shape], arguments.tokens).to(arguments.device)
    ids = {"input_ids": row.input_ids[None], "labels": row.targets[None], "shift_labels": row.targets[None]}

    def forward_backward() -> Any:
        with torch.autocast(arguments.device.type, torch.bfloat16) if fp32 else contextlib.nullcontext():
            loss = model(**ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    optimizer = torch.optim.AdamW(parameters, lr=train_1b.RATE, weight_decay=0.0, fused=True)
    return timed(stepping(forward_backward, parameters, optimizer), arguments, arguments.steps, arguments.tokens)


def stepping(forward_backward: Callable[[], Any], parameters: list[Any], optimizer: Any) -> Callable[[], float]:
    """A whole step, the same for everyone but for the optimizer's own arguments."""
    import torch

    def step() -> float:
        loss = forward_backward()
        torch.nn.utils.clip_grad_norm_(parameters, train_1b.CLIP)
        optimizer.step(*([] if isinstance(optimizer, torch.optim.Optimizer) else [train_1b.RATE]))
        optimizer.zero_grad()
        return float(loss)

    return step


def decode_ours(arguments: argparse.Namespace) -> Result:
    from edgetune.bench import decode_bytes
    from edgetune.runtime.generate import Generator
    from edgetune.runtime.runner import Runner

    model = load(arguments)
    generator = Generator(Runner(model), PROMPT + arguments.new_tokens + 1)
    generator.prefill(list(range(1, PROMPT + 1)))
    result = timed(lambda: generator.step(1), arguments, arguments.new_tokens, 1)
    return {**result, "bytes_per_second": decode_bytes(model) * result[SPEED]}


def decode_peer(arguments: argparse.Namespace) -> Result:
    import torch

    model = load_peer(arguments).eval()
    ids = torch.arange(1, PROMPT + 1, device=arguments.device)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        step = lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)  # noqa: E731
        return timed(step, arguments, arguments.new_tokens, 1)


def card(arguments: argparse.Namespace) -> Result:
    """Read bandwidth, of a sum over 4 GB, and bf16 GEMM peak at the shape's products."""
    import torch

    from edgetune.bench import gemm_shapes
    from edgetune.shapes import SHAPES

    x, best = torch.ones(2**10 if arguments.smoke else 2**30, device=arguments.device), 0.0
    for m, k, n in [(64, 64, 64)] if arguments.smoke else gemm_shapes(SHAPES[arguments.shape], arguments.tokens):
        a, w = (torch.randn(size, k, device=arguments.device, dtype=torch.bfloat16) for size in (m, n))
        best = max(best, timed(lambda a=a, w=w: torch.mm(a, w.T), arguments, 5, 2 * m * k * n)[SPEED])
    name = "No card: the CPU and Triton's interpreter" if arguments.smoke else torch.cuda.get_device_name()
    return {"card": name, "bytes_per_second": timed(x.sum, arguments, 5, x.nbytes)[SPEED], "gemm_flops": best}


def numerics(arguments: argparse.Namespace) -> Result:
    """Weights that dequantise otherwise than nf4.py says; relative errors of a product and of one layer's gradients."""
    import torch

    from edgetune import bench
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime import nf4, ops
    from edgetune.runtime.runner import Runner

    model, gradients = load(arguments), []
    del model.blocks[1:]
    weight = model.blocks[0].down_proj.weight
    exact, x = nf4.dequantize(weight, torch.float32), torch.randn(1, weight.shape[1]).to(arguments.device)
    for name in ("reference", "cuda"):
        adapters.attach_new(model, bench.LORA, 0)
        with ops.use_backend(name):
            Runner(model).train(bench.random_row(model.config, 256))
        gradients.append(torch.cat([p.grad.flatten().double() for p in adapters.parameters(model)]))
    return {
        "dequantize_differs": int((ops.dequantize(weight, torch.float32) != exact).sum()),
        "matvec_error": float((ops.matvec(x, weight) - x @ exact.T).norm() / (x @ exact.T).norm()),
        "gradient_error": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    }


if __name__ == "__main__":
    main()
