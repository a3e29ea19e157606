"""Compare training speed and memory of edgetune and transformers + peft (+ bitsandbytes) on a LLaMA of random weights.

    python tests/benchmarks/train_1b.py [--tokens 512] [--repeats 3] [--json FILE]
    python tests/benchmarks/train_1b.py --shape smollm2                              on a real model and real text
    python tests/benchmarks/train_1b.py --shape demo --tokens 128 --repeats 1        to try the script out

One row of `--tokens` tokens, LoRA r16 alpha 16 on all seven linears of a block, forward, backward, clipping and AdamW.
All train the same weights: the bf16 folder contains those of the NF4 folder, dequantised. Equal first losses show it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import real_model
from common import Contender, Result

Tried = dict[str, dict[str, Result]]  # peer -> variant -> a short run of it

RANK, ALPHA, RATE, CLIP = 16, 16, 1e-4, 1.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# The ways in which a peer can run. The fastest differs between machines, so each is tried and the best is used.
VARIANTS = {
    "fp32-adapters": "peft's default: adapters in fp32, cast for each product",
    "autocast": "adapters in fp32 under bf16 autocast",
    "bf16-adapters": "adapters in bf16 (AdamW too)",
    "fp32": "activations, adapters and products in fp32, for CPUs that do not multiply bf16",
}
PEERS = {
    "peft-bf16": "transformers+peft, bf16 weights, recompute off",
    "peft-bf16-recompute": "transformers+peft, bf16 weights, recompute on",
    "peft-nf4": "transformers+peft+bitsandbytes NF4, recompute off",
    "peft-nf4-recompute": "transformers+peft+bitsandbytes NF4, recompute on",
}
OURS = {
    "ours-none": "edgetune NF4, recompute none",
    "ours-none-bf16": "edgetune NF4, recompute none, products in bf16",
    "ours-dense": "edgetune bf16 weights, recompute none",
    "ours-selective": "edgetune NF4, recompute selective",
    "ours-full": "edgetune NF4, recompute full",
    "ours-smallest": "edgetune NF4, smallest: recompute, states and activations in files",
    "ours-compact": "edgetune NF4, smallest with a compact heap",
}
SMALL = ("smallest", "compact")


def main() -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--tokens", type=int, default=512, help="tokens in a row (default: %(default)s)")
    flags.add_argument(
        "--steps", type=int, default=3, help="timed steps in each round, after one warm-up step (default: %(default)s)"
    )
    flags.add_argument("--variant", default="auto", help=f"how the peers run: auto (the fastest), {', '.join(VARIANTS)}")
    flags.add_argument(
        "--loss-rows", type=int, default=256, help="rows of logits that edgetune computes at a time (default: %(default)s)"
    )
    common.start(flags, compare, contend)


# --- the parent -----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> None:
    if arguments.shape == real_model.SHAPE:
        real_model.nf4_and_dense(arguments.model, arguments.workdir)
    else:
        common.random_folders(arguments.workdir, arguments.shape, dense=True)
    script = Path(__file__).resolve()
    passed = ["--shape", arguments.shape, "--tokens", str(arguments.tokens), "--threads", str(arguments.threads),
              "--workdir", str(arguments.workdir), "--loss-rows", str(arguments.loss_rows)]  # fmt: skip
    host = common.machine(arguments.threads)
    contenders = _contenders(arguments)
    tried = _choose_variants(script, contenders, passed, arguments.variant)
    contenders = [replace(c, arguments=("--variant", _best(tried, c.key))) if c.key in PEERS else c for c in contenders]
    results = common.run_rounds(script, contenders, [*passed, "--steps", str(arguments.steps)], arguments.repeats)
    everything = {
        "benchmark": "train_1b",
        "machine": host,
        "versions": common.versions(),
        "lacking": common.lacking(),
        "settings": {
            "shape": arguments.shape, "tokens": arguments.tokens, "steps": arguments.steps, "rounds": arguments.repeats,
            "rank": RANK, "alpha": ALPHA, "loss_rows": arguments.loss_rows,
        },
        "variants_tried": tried,
        "results": results,
    }  # fmt: skip
    everything["summary"] = summary = summarise(results)
    common.publish(arguments.json, render(everything, contenders, summary), everything)


def _contenders(arguments: argparse.Namespace) -> list[Contender]:
    every = [Contender("gemm", "the machine's GEMM peak")]
    every += [Contender(key, label) for key, label in PEERS.items()]
    every += [Contender(key, label) for key, label in OURS.items()]
    return common.chosen(every, arguments.only)


def _choose_variants(script: Path, contenders: list[Contender], passed: list[str], variant: str) -> Tried:
    """Run each peer in each variant for two steps. Recomputation does not change which variant is the fastest."""
    variants = list(VARIANTS) if variant == "auto" else [variant]
    tried: Tried = {}
    for peer in sorted({c.key.removesuffix("-recompute") for c in contenders if c.key in PEERS}):
        tried[peer] = {}
        for name in variants:
            if len(variants) > 1:
                common.say(f"trying {PEERS[peer]}: {VARIANTS[name]}")
                one = Contender(peer, PEERS[peer], arguments=("--variant", name))
                tried[peer][name] = common.run(script, one, [*passed, "--steps", "2"])
                common.say(f"    {common.brief(tried[peer][name])}")
            else:
                tried[peer][name] = {}
    return tried


def _best(tried: Tried, key: str) -> str:
    variants = tried[key.removesuffix("-recompute")]
    return max(variants, key=lambda name: variants[name].get("tokens_per_second") or 0.0)


def summarise(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Return the ratios and shares that the summary lists: ratios within rounds, medians over them."""
    speed, memory = "tokens_per_second", "anonymous_beyond_torch"
    for rounds in results.values():
        for row, peak in zip(rounds, results.get("gemm", []), strict=False):
            if row.get("gflops_per_second") and peak.get("gemm_gflops"):
                row["gemm_share"] = row["gflops_per_second"] / peak["gemm_gflops"]

    def fastest(keys: list[str]) -> str | None:
        present = [key for key in keys if common.median(results.get(key, []), speed)]
        return max(present, key=lambda key: common.median(results[key], speed) or 0.0) if present else None

    def ratio(key: str | None, peer: str | None, of: str) -> float | None:
        return common.median_ratio(results.get(key or "", []), results.get(peer or "", []), of)

    ours, peer = fastest(["ours-none", "ours-selective", "ours-full"]), fastest(["peft-nf4", "peft-nf4-recompute"])
    dense = fastest(["peft-bf16", "peft-bf16-recompute"])
    return {
        "ours_fastest": ours,
        "peer_nf4_fastest": peer,
        "fastest_speed_ratio": ratio(ours, peer, speed),
        "fastest_memory_ratio": ratio(ours, peer, "peak_memory_bytes"),
        "fastest_speed_ratio_to_bf16_peer": ratio(ours, dense, speed),
        "dense_speed_ratio_to_bf16_peer": ratio("ours-dense", dense, speed),
        "recompute_speed_ratio": ratio("ours-full", "peft-nf4-recompute", speed),
        "recompute_memory_ratio": ratio("ours-full", "peft-nf4-recompute", "peak_memory_bytes"),
        "gemm_share_fastest": common.median(results.get(ours or "", []), "gemm_share"),
        "gemm_share_recompute": common.median(results.get("ours-full", []), "gemm_share"),
        "smallest_anonymous_beyond_torch": common.median(results.get("ours-smallest", []), memory),
        "smallest_anonymous_ratio": ratio("ours-smallest", "peft-nf4-recompute", memory),
        "smallest_speed_of_recomputing": ratio("ours-smallest", "ours-full", speed),
    }


def render(everything: Result, contenders: list[Contender], summary: dict[str, Any]) -> str:
    results, settings = everything["results"], everything["settings"]
    off, on = "peft-nf4", "peft-nf4-recompute"
    peer_of = {
        "ours-none": off,
        "ours-selective": off,
        "ours-full": on,
        "ours-smallest": on,
        "ours-compact": on,
        "ours-dense": "peft-bf16",
    }
    rows = []
    for contender in contenders:
        if contender.key == "gemm":
            continue
        mine, theirs = results[contender.key], results.get(peer_of.get(contender.key, ""), [])
        rows.append([
            contender.label + (f" ({contender.arguments[1]})" if contender.arguments else ""),
            common.number(common.median(mine, "tokens_per_second")) if any("error" not in row for row in mine) else "failed",
            common.number(common.median_ratio(mine, theirs, "tokens_per_second"), "{:.2f}×"),
            common.number(common.median(mine, "gemm_share"), "{:.0%}"),
            common.megabytes(common.median(mine, "peak_memory_bytes")),
            common.megabytes(common.median(mine, "anonymous_beyond_torch")),
            common.number(common.median_ratio(mine, theirs, "anonymous_beyond_torch"), "{:.2f}×"),
            common.number(common.median(mine, "first_loss"), "{:.4f}"),
        ])  # fmt: skip
    heads = ["trained", "tokens/s", "to the peer", "of GEMM peak", "peak memory MB", "anonymous beyond torch MB",
             "of the peer's", "first loss"]  # fmt: skip
    peak = common.number(common.median(results.get("gemm", []), "gemm_gflops"), "{:,.0f}")
    about = (
        f"{settings['shape']}, one row of {settings['tokens']} tokens, r{RANK} on all linears, AdamW; medians of "
        f"{settings['rounds']} rounds of {settings['steps']} steps. GEMM peak {peak} GFLOP/s. "
        "Ratios are to the peer with weights in the same form and the same recomputation.\n"
    )
    return "\n".join([common.heading(everything), about, common.table(heads, rows), "", common.listed(summary)])


# --- the contenders -------------------------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> Result:
    bare = common.bare_torch(arguments.threads)
    key = arguments.contender
    if key == "gemm":
        return gemm_peak(arguments)
    if key in OURS:
        return ours(arguments, key.removeprefix("ours-"), bare)
    return peer(arguments, "nf4" in key, key.endswith("-recompute"), bare)


def gemm_peak(arguments: argparse.Namespace) -> Result:
    import torch

    from edgetune.machine import bench
    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.device import compute_dtype

    config = open_model(arguments.workdir / f"{arguments.shape}-nf4").config
    shapes = bench.gemm_shapes(config, arguments.tokens)
    return {"gemm_gflops": bench.gemm_gflops(compute_dtype(torch.device("cpu")), shapes)}


def timed(step: Callable[[], float], arguments: argparse.Namespace, files: list[Path], bare: int) -> Result:
    """Return the speed of `step`, which returns its loss, and its peak memory; the first loss is that of the warm-up."""
    losses: list[float] = []
    with common.measured(files, bare) as peaks:
        seconds = common.seconds_of(lambda: losses.append(step()), arguments.steps)
    speed = arguments.tokens / statistics.median(seconds)
    return {"tokens_per_second": speed, "seconds": seconds, "first_loss": losses[0], **peaks}


def row_of_ids(arguments: argparse.Namespace) -> Any:
    """Return ids, (tokens + 1,) int64, the same for every contender: of real text for the real model, else random ones."""
    import torch

    if arguments.shape == real_model.SHAPE:
        return torch.tensor(real_model.text_ids(arguments.workdir, arguments.tokens + 1))
    vocabulary = common.hf_config(arguments.shape)["vocab_size"]
    return torch.randint(0, vocabulary, (arguments.tokens + 1,), generator=torch.Generator().manual_seed(1))


def ours(arguments: argparse.Namespace, setting: str, bare: int) -> Result:
    import torch

    from edgetune.machine import bench
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime.batch import Batch
    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.device import compute_dtype
    from edgetune.runtime.heap import compact_heap
    from edgetune.runtime.loader import load_llama
    from edgetune.runtime.ops import fuses
    from edgetune.runtime.ops_types import Segment
    from edgetune.runtime.optim import PagedAdamW
    from edgetune.runtime.runner import Recompute, Runner

    small = setting in SMALL
    if setting == "compact":
        compact_heap()
    dense = setting == "dense"
    checkpoint = open_model(arguments.workdir / f"{arguments.shape}-{'bf16' if dense else 'nf4'}")
    model = load_llama(checkpoint, compute_dtype(torch.device("cpu")))
    adapters.attach_new(model, bench.LORA, 0)
    recompute = Recompute.FULL if small else Recompute.NONE if dense else Recompute(setting.removesuffix("-bf16"))
    int8 = fuses(model.device, model.dtype, int8=True) and not setting.endswith("-bf16")  # as `edgetune train` does
    runner = Runner(model, recompute, arguments.loss_rows, arguments.workdir if small else None, int8)
    parameters = adapters.parameters(model)
    optimizer = PagedAdamW(parameters, pages=arguments.workdir if small else None)
    tokens, ids = arguments.tokens, row_of_ids(arguments)
    row = Batch(ids[:-1], ids[1:], torch.full((tokens,), 1 / tokens), torch.arange(tokens), (Segment.packed(0, tokens),))

    def step() -> float:
        loss = runner.train(row)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step(RATE)
        optimizer.zero_grad()
        return float(loss)

    result = timed(step, arguments, checkpoint.files, bare)
    flops = bench.linear_flops(model.config, recompute)
    return {**result, "gflops_per_second": flops * result["tokens_per_second"] / 1e9}


def peer(arguments: argparse.Namespace, nf4: bool, recompute: bool, bare: int) -> Result:
    """Measure transformers + peft as documented, without prepare_model_for_kbit_training, whose fp32 head is slower."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = arguments.workdir / f"{arguments.shape}-{'nf4' if nf4 else 'bf16'}"
    torch.manual_seed(0)
    dtype = torch.float32 if arguments.variant == "fp32" else torch.bfloat16
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' linears, which the folder's own settings have in bf16
            module.compute_dtype = dtype
    for parameter in model.parameters():  # a folder in 4 bits has the others in bf16, whatever dtype is asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.use_cache = False
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=arguments.variant != "bf16-adapters")
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    ids = row_of_ids(arguments)
    inputs, targets = ids[:-1].unsqueeze(0), ids[1:].unsqueeze(0)
    autocast = arguments.variant == "autocast"

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed(step, arguments, common.weight_files(folder), bare)


if __name__ == "__main__":
    main()
