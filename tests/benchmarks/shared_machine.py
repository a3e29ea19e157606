"""Measure what training keeps of its speed while other programs keep one core or every core busy (Linux).

    python tests/benchmarks/shared_machine.py [--shape tinyllama-1.1b] [--layers 2] [--seconds 4] [--json FILE]

A model of the shape with few layers of random weights trains rows of `--tokens` tokens, LoRA r16 on all linears. Each contender
measures its own quiet speed, then its speed beside one endless program pinned to core 0, then beside one on every core, and its
quiet speed again; shares are of the faster quiet speed. Contenders with `nice` run at nice 10, beside programs at nice 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from common import Contender, Result

RANK, ALPHA, RATE, CLIP = 16, 16, 1e-4, 1.0
CONTENDERS = {
    "ours": "edgetune, NF4",
    "ours-polling": "edgetune, NF4, torch's threads polling (its default)",
    "ours-nice": "edgetune, NF4, nice 10",
    "peft": "transformers + peft, bf16",
    "peft-nice": "transformers + peft, bf16, nice 10",
}
SITUATIONS = ("quiet", "one busy", "all busy", "quiet again")
NICE = 10
BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(1, flush=True)\nwhile True: pass"


def main() -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--tokens", type=int, default=512, help="tokens in a row (default: %(default)s)")
    flags.add_argument("--layers", type=int, default=2, help="layers of the model (default: %(default)s)")
    flags.add_argument("--seconds", type=float, default=4.0, help="seconds of each measurement (default: %(default)s)")
    common.start(flags, compare, contend)


def compare(arguments: argparse.Namespace) -> None:
    polling = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own default
    every = [Contender(key, label, environment=polling if key == "ours-polling" else {}) for key, label in CONTENDERS.items()]
    contenders = common.chosen(every, arguments.only)
    settings = {name: getattr(arguments, name) for name in ("shape", "tokens", "layers", "seconds", "threads")}
    passed = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    host = common.machine(arguments.threads)
    results = common.run_rounds(Path(__file__).resolve(), contenders, passed, arguments.repeats)
    everything = {
        "benchmark": "shared_machine", "machine": host, "versions": common.versions(), "lacking": common.lacking(),
        "settings": {**settings, "rounds": arguments.repeats}, "results": results,
    }  # fmt: skip
    common.publish(arguments.json, render(everything, contenders), everything)


def render(everything: Result, contenders: Sequence[Contender]) -> str:
    settings, rows = everything["settings"], []
    for contender in contenders:
        found = everything["results"][contender.key]
        quiet = common.number(common.median(found, "quiet_tokens_per_second"))
        shares = [common.number(common.median(found, key), "{:.0%}") for key in ("one_busy_share", "all_busy_share")]
        rows.append([contender.label, quiet, *shares])
    about = (
        f"{settings['shape']} with {settings['layers']} layers, rows of {settings['tokens']} tokens, {settings['threads']} "
        f"threads; medians of {settings['rounds']} rounds.\n"
    )
    heads = ["trained", "quiet, tokens/s", "kept beside one busy program", "kept beside one on every core"]
    return "\n".join([common.heading(everything), about, common.table(heads, rows)])


# --- the contenders -------------------------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> Result:
    step = (ours if arguments.contender.startswith("ours") else peer)(arguments)
    for _ in range(2):
        step()
    if arguments.contender.endswith("nice"):
        lowered = os.getpriority(os.PRIO_PROCESS, 0) + NICE
        for thread in os.listdir("/proc/self/task"):  # Linux has a nice value for each thread
            os.setpriority(os.PRIO_PROCESS, int(thread), lowered)
    speeds = {}
    for situation in SITUATIONS:
        cores = {"one busy": [0], "all busy": sorted(os.sched_getaffinity(0))}.get(situation, [])
        with busy_programs(cores, -NICE if arguments.contender.endswith("nice") else 0):
            speeds[situation] = arguments.tokens / statistics.median(seconds_of_steps(step, arguments.seconds))
    quiet = max(speeds["quiet"], speeds["quiet again"])
    return {
        "quiet_tokens_per_second": quiet,
        "one_busy_share": speeds["one busy"] / quiet,
        "all_busy_share": speeds["all busy"] / quiet,
        "tokens_per_second": speeds,
    }


@contextlib.contextmanager
def busy_programs(cores: Sequence[int], nicer: int) -> Iterator[None]:
    """Keep an endless program running on each of these cores, `nicer` above this process's nice value, within a block."""
    programs = []
    try:
        for core in cores:
            command = ["nice", "-n", str(nicer), sys.executable, "-c", BUSY, str(core)]
            programs.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def seconds_of_steps(step: Callable[[], None], seconds: float) -> list[float]:
    """Return the time of each step, of as many as begin within `seconds` and at least two."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 2:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def ours(arguments: argparse.Namespace) -> Callable[[], None]:
    import torch

    from edgetune.machine import bench
    from edgetune.machine.shapes import SHAPES
    from edgetune.machine.synthetic import random_batch, random_llama
    from edgetune.memory_settings import number_format
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime.optim import PagedAdamW
    from edgetune.runtime.runner import Recompute, Runner

    torch.set_num_threads(arguments.threads)
    config = dataclasses.replace(SHAPES[arguments.shape], num_layers=arguments.layers, windows=(None,) * arguments.layers)
    dtype, int8 = number_format("auto", torch.device("cpu"))
    model = random_llama(config, dtype)
    adapters.attach_new(model, bench.LORA, 0)
    runner, parameters = Runner(model, Recompute.NONE, int8=int8), adapters.parameters(model)
    optimizer, row = PagedAdamW(parameters), random_batch(config, arguments.tokens)

    def step() -> None:
        runner.train(row)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step(RATE)
        optimizer.zero_grad()

    return step


def peer(arguments: argparse.Namespace) -> Callable[[], None]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(arguments.threads)
    shape: dict[str, Any] = {**common.hf_config(arguments.shape), "num_hidden_layers": arguments.layers, "use_cache": False}
    for key in ("architectures", "model_type", "torch_dtype"):
        shape.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(torch.bfloat16)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=linears, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
    wrapped.train()
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    ids = torch.randint(0, shape["vocab_size"], (1, arguments.tokens), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
