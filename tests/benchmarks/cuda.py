"""Compare edgetune with transformers + peft + bitsandbytes on an NVIDIA card, on a LLaMA of random weights.

    python tests/benchmarks/cuda.py [--tokens 4096] [--repeats 3] [--minutes 9] [--json FILE]
    python tests/benchmarks/cuda.py --smoke      to try the script out on the CPU in Triton's interpreter: no figures

train: a row of `--tokens` tokens, rank 16 on all linears, forward, backward, clipping, AdamW. decode: one token after
another, and the share of the card's read bandwidth that reading the weights takes. numerics: the kernels against plain
torch. matvec: the product of decoding, also with other sizes of its programs. All use the same NF4 folder, written once.
The most important contenders run first, and the file of --json is rewritten after each; if one fails or no time is left,
the results of the others remain. No card has run this yet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
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
OURS = ("train-ours-none", "train-ours-selective", "train-ours-full")
PEERS = ("train-peft-fp32", "train-peft-fp32-recompute", "train-peft-bf16", "train-peft-bf16-recompute")
"""With and without recomputation, and with adapters in fp32 under autocast or in bf16."""
FIRST = ("card", "numerics", "train-ours-none", "train-peft-bf16", "decode-ours", "decode-peer", "matvec")
CUTS = ((4, 256, 1), (4, 512, 1), (1, 1024, 1), (2, 1024, 2), (4, 512, 2), (4, 256, 4))
"""Other values of ROWS, ROW_BYTES and WARPS in weights.py, which divide a product of few rows into programs."""
KEYS = (*FIRST, *(key for key in (*PEERS, *OURS) if key not in FIRST))


def main() -> None:
    flags = common.parser(__doc__)
    flags.set_defaults(shape="llama-3.1-8b")
    flags.add_argument("--tokens", type=int, default=4096, help="tokens in a row (default: %(default)s)")
    flags.add_argument(
        "--steps", type=int, default=3, help="timed steps in each round, after one warm-up step (default: %(default)s)"
    )
    flags.add_argument("--new-tokens", type=int, default=64, help="tokens that decode generates (default: %(default)s)")
    flags.add_argument("--minutes", type=float, default=math.inf, help="end after this many minutes with the results so far")
    flags.add_argument("--smoke", action="store_true", help="try the script out with one tiny layer on the CPU")
    arguments = flags.parse_args()
    if arguments.smoke:
        from edgetune.machine.shapes import SHAPES
        from edgetune.runtime import runner

        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
        SHAPES["smoke"] = dataclasses.replace(SHAPES["demo"], num_layers=1, windows=(None,), vocab_size=256, **tiny)
        arguments.shape, arguments.tokens, arguments.steps, arguments.new_tokens, arguments.repeats = "smoke", 32, 1, 2, 1
        runner.ROW_MULTIPLE = arguments.tokens
    if arguments.contender:
        common.serve(arguments, contend)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Write the weights, run all contenders in turn, and print the table."""
    until = time.monotonic() + 60 * arguments.minutes
    common.random_folders(arguments.workdir, arguments.shape, dense=False)
    passed = ["--threads", str(arguments.threads), "--workdir", str(arguments.workdir)]
    for name in ("shape", "tokens", "steps", "new_tokens"):
        passed += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    passed += ["--smoke"] if arguments.smoke else []
    contenders = common.chosen([Contender(key, key) for key in KEYS], arguments.only)
    about = {"machine": common.machine(arguments.threads), "versions": common.versions(), "lacking": [], "arguments": passed}

    def everything(results: dict[str, list[Result]]) -> Result:
        return {**about, "summary": summarise(results), "results": results}

    def keep(results: dict[str, list[Result]]) -> None:
        common.write_json(arguments.json, everything(results))

    results = common.run_rounds(Path(__file__).resolve(), contenders, passed, arguments.repeats, until, keep)
    columns = {SPEED: common.number, "peak_card_bytes": common.megabytes, "first_loss": lambda x: common.number(x, "{:.4f}")}
    speeds = [key for key in KEYS if key.startswith(("train", "decode"))]
    rows = [[key, *(show(common.median(results.get(key, []), column)) for column, show in columns.items())] for key in speeds]
    table = common.table(["", "tokens/s", "peak card memory MB", "first loss"], rows)
    cards = [row["card"] for row in results.get("card", []) if "card" in row]
    shape = f"{cards[0] if cards else 'card unknown'}; {arguments.shape}, rows of {arguments.tokens} tokens.\n"
    text = [common.heading(about), shape, table, "", common.listed(summarise(results))]
    common.publish(arguments.json, "\n".join(text), everything(results))


def summarise(results: dict[str, list[Result]]) -> Result:
    """Return ratios within rounds, as medians over them, of each side's fastest setting."""

    def fastest(keys: tuple[str, ...]) -> list[Result]:
        return results.get(max(keys, key=lambda key: common.median(results.get(key, []), SPEED) or 0.0), [])

    decode, card, numerics = (results.get(key, []) for key in ("decode-ours", "card", "numerics"))
    return {
        "train_tokens_per_second": common.median(fastest(OURS), SPEED),
        "train_speed_ratio": common.median_ratio(fastest(OURS), fastest(PEERS), SPEED),
        "train_memory_ratio": common.median_ratio(fastest(OURS), fastest(PEERS), "peak_card_bytes"),
        "decode_tokens_per_second": common.median(decode, SPEED),
        "decode_speed_ratio": common.median_ratio(decode, results.get("decode-peer", []), SPEED),
        "decode_bandwidth_share": common.median_ratio(decode, card, "bytes_per_second"),
        "card_read_bytes_per_second": common.median(card, "bytes_per_second"),
        **{key: common.median(numerics, key) for key in ("dequantize_differs", "matvec_error", "gradient_error")},
    }


# --- the contenders ---------------------------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> Result:
    import torch

    from edgetune.runtime import ops

    torch.set_num_threads(arguments.threads)
    arguments.device = torch.device("cpu" if arguments.smoke else "cuda")
    own = {"card": card, "numerics": numerics, "decode-ours": decode_ours, "decode-peer": decode_peer, "matvec": matvec}
    with ops.use_backend("cuda"):
        return own.get(arguments.contender, train)(arguments)


def timed(step: Callable[[], Any], arguments: argparse.Namespace, repeats: int, work: float) -> Result:
    """Return the speed of `step` in `work` a second, the card's peak memory, and the loss of the warm-up step if it has one."""
    import torch

    on_card, seconds, first = arguments.device.type == "cuda", [], step()
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if on_card:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_reserved() if on_card else None
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


def train(arguments: argparse.Namespace) -> Result:
    """Measure whole training steps of edgetune or of a peer."""
    import torch

    from edgetune.machine.shapes import SHAPES
    from edgetune.machine.synthetic import random_batch

    row = random_batch(SHAPES[arguments.shape], arguments.tokens).to(arguments.device)
    parameters, optimizer, forward_backward = (ours if arguments.contender in OURS else peer)(arguments, row)

    def step() -> float:
        loss = forward_backward()
        torch.nn.utils.clip_grad_norm_(parameters, train_1b.CLIP)
        optimizer()
        return float(loss)

    return timed(step, arguments, arguments.steps, arguments.tokens)


def ours(arguments: argparse.Namespace, row: Any) -> tuple[Any, Callable[[], None], Callable[[], Any]]:
    from edgetune.machine import bench
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime.optim import PagedAdamW
    from edgetune.runtime.runner import Recompute, Runner

    model = load(arguments)
    adapters.attach_new(model, bench.LORA, 0)
    runner, parameters = Runner(model, Recompute(arguments.contender.rsplit("-", 1)[1])), adapters.parameters(model)
    optimizer = PagedAdamW(parameters)
    return parameters, lambda: (optimizer.step(train_1b.RATE), optimizer.zero_grad())[1], lambda: runner.train(row)


def peer(arguments: argparse.Namespace, row: Any) -> tuple[Any, Callable[[], None], Callable[[], Any]]:
    import torch
    from peft import LoraConfig, get_peft_model

    model, fp32 = load_peer(arguments), "fp32" in arguments.contender
    if arguments.contender.endswith("-recompute"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=train_1b.RANK, lora_alpha=train_1b.ALPHA, target_modules=train_1b.LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=fp32).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train_1b.RATE, weight_decay=0.0, fused=True)
    ids = {"input_ids": row.input_ids[None], "labels": row.targets[None], "shift_labels": row.targets[None]}

    def forward_backward() -> Any:
        with torch.autocast(arguments.device.type, torch.bfloat16) if fp32 else contextlib.nullcontext():
            loss = model(**ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return parameters, lambda: (optimizer.step(), optimizer.zero_grad())[1], forward_backward


def decode_ours(arguments: argparse.Namespace) -> Result:
    from edgetune.machine.bench import decode_bytes
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
    """Return the name of the card and its read bandwidth, measured by a sum over 4 GB."""
    import torch

    x = torch.ones(2**10 if arguments.smoke else 2**30, device=arguments.device)
    name = "No card: the CPU and Triton's interpreter" if arguments.smoke else torch.cuda.get_device_name()
    return {"card": name, "bytes_per_second": timed(x.sum, arguments, 5, x.nbytes)[SPEED]}


def matvec(arguments: argparse.Namespace) -> Result:
    """Return the bytes a second that ops.matvec reads of a layer's linears for one row of x, as it is and with each of CUTS."""
    import torch

    from edgetune.machine.shapes import SHAPES
    from edgetune.machine.synthetic import random_nf4
    from edgetune.runtime import ops
    from edgetune.runtime.backends.cuda import weights

    shapes, found = SHAPES[arguments.shape].linear_shapes().values(), {}
    layers = 1 if arguments.smoke else 4  # more than a card's cache holds
    generator = torch.Generator().manual_seed(0)
    linears = [random_nf4(shape, generator).to(arguments.device) for _ in range(layers) for shape in shapes]
    inputs = [torch.randn(1, linear.shape[1]).to(arguments.device) for linear in linears]

    def products() -> None:
        for x, linear in zip(inputs, linears, strict=True):
            ops.matvec(x, linear)

    for cut in ((weights.ROWS, weights.ROW_BYTES, weights.WARPS), *CUTS[: 1 if arguments.smoke else None]):
        weights.ROWS, weights.ROW_BYTES, weights.WARPS = cut
        step = products
        if not arguments.smoke:  # launching from Python would take longer than the kernels run
            products()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                products()
            step = graph.replay
        name = "{} rows, {} bytes, {} warps".format(*cut)
        found[name] = timed(step, arguments, 1 if arguments.smoke else 20, sum(linear.nbytes for linear in linears))[SPEED]
    return found


def numerics(arguments: argparse.Namespace) -> Result:
    """Count weights that dequantise differently from nf4.py; return relative errors of a product and a layer's gradients."""
    import torch

    from edgetune.machine import bench
    from edgetune.machine.synthetic import random_batch
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
            Runner(model).train(random_batch(model.config, arguments.tokens))
        gradients.append(torch.cat([p.grad.flatten().double() for p in adapters.parameters(model)]))
    return {
        "dequantize_differs": int((ops.dequantize(weight, torch.float32) != exact).sum()),
        "matvec_error": float((ops.matvec(x, weight) - x @ exact.T).norm() / (x @ exact.T).norm()),
        "gradient_error": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    }


if __name__ == "__main__":
    main()
