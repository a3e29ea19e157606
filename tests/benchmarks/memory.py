"""Train inside memory cgroups, and measure what the planner chooses, whether the run stays inside, and its speed.

For each limit a process enters a cgroup of that size (which counts the page cache too, without swap), lets edgetune choose
settings for a budget a little below it, and trains. A run with the same recomputation and no limit is the comparison.

    python tests/benchmarks/memory.py --limits 1GB,700MB,500MB
    python tests/benchmarks/memory.py --shape llama-7b --limits 2GB --steps 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

RANK, ALPHA, RATE = 16, 16.0, 1e-4
MARGIN = 0.04
"""Share of a limit that is left for page tables, the reader's pages, and the kernel's other charges. Chosen by hand."""


def main() -> None:
    flags = common.parser(__doc__, contenders=False)
    flags.add_argument("--tokens", type=int, default=512, help="tokens in a row (default: %(default)s)")
    flags.add_argument("--steps", type=int, default=4, help="timed steps after one warm-up step (default: %(default)s)")
    flags.add_argument(
        "--limits", default="1GB,700MB,500MB", help="sizes of cgroups, separated by commas (default: %(default)s)"
    )
    flags.add_argument("--child", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.child:
        print(json.dumps(train(arguments, json.loads(arguments.child))))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each limit, with its ratio to the run without a limit."""
    from edgetune.parsing import parse_bytes

    common.random_folders(arguments.workdir, arguments.shape, dense=False)
    rows, results = [], []
    for limit in (parse_bytes(text) for text in arguments.limits.split(",")):
        inside = run(arguments, {"limit": limit})
        results.append(inside)
        if "error" in inside:
            rows.append([f"{limit / 1e6:,.0f} MB", inside["error"], *[""] * 6])
            continue
        free = run(arguments, {"limit": None, "recompute": inside["setting"]["recompute"]})
        results.append(free)
        predicted, peak, speed = inside["predicted"], inside["peak"], inside["tokens_per_second"]
        rows.append([
            f"{limit / 1e6:,.0f} MB", describe(inside["setting"]), f"{predicted / 1e6:,.0f}", f"{peak / 1e6:,.0f}",
            f"{predicted / peak - 1:+.0%}", f"{speed:.1f}", f"{free['tokens_per_second']:.1f}",
            f"{speed / free['tokens_per_second']:.0%}",
        ])  # fmt: skip
    heads = ["cgroup", "setting", "predicted MB", "measured MB", "", "tokens/s", "unlimited", "speed kept"]
    about = {"machine": common.machine(arguments.threads), "versions": common.versions(), "lacking": [], "results": results}
    shown = f"{arguments.shape}, one row of {arguments.tokens} tokens, r16 on all linears."
    common.publish(arguments.json, "\n".join([common.heading(about), "", shown, "", common.table(heads, rows)]), about)


def describe(setting: dict[str, Any]) -> str:
    """Return the settings as a cell of the table."""
    layers = setting["layer_memory"]
    words = [setting["recompute"], f"{layers / 1e6:.0f} MB of layers" if layers is not None else "resident"]
    words += [name for name in ("paged_optimizer", "offload", "compact") if setting[name]]
    words += [f"{setting['in_file']} in file"] * (setting["in_file"] != "neither")
    words += ["8-bit states"] * (setting["optimizer_bits"] == 8)
    return ", ".join([*words, f"{setting['loss_rows']} loss rows"])


def run(arguments: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Run the job in a process of its own, inside a cgroup if it has a limit."""
    command = [sys.executable, __file__, "--workdir", str(arguments.workdir), "--shape", arguments.shape]
    command += ["--tokens", str(arguments.tokens), "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    command += ["--child", json.dumps(job)]
    group = Group(job["limit"]) if job["limit"] else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=group.enter if group else None)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
            return {"error": lines[-1], **job}
        return {**json.loads(done.stdout.splitlines()[-1]), **job, **({"charged": group.peak()} if group else {})}
    finally:
        if group:
            group.close()


class Group:
    """A memory cgroup, version 1 or 2, below the one of this process. Needs the right to make one."""

    def __init__(self, limit: int) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.split(":", 2)[2] for line in lines if ":memory:" in line), None)
        self.old = own is not None
        parent = Path("/sys/fs/cgroup/memory" + (own or "")) if self.old else Path("/sys/fs/cgroup" + lines[0].split(":", 2)[2])
        self.folder = parent / f"edgetune-{os.getpid()}"
        self.folder.mkdir()
        (self.folder / ("memory.limit_in_bytes" if self.old else "memory.max")).write_text(str(limit))

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Return the most bytes that the cgroup was charged."""
        return int((self.folder / ("memory.max_usage_in_bytes" if self.old else "memory.peak")).read_text())

    def close(self) -> None:
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def train(arguments: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Choose settings, open the model and train, in the child process; return the measurements."""
    import dataclasses

    import torch

    from edgetune.config import DataConfig
    from edgetune.machine.synthetic import random_batch
    from edgetune.memory_settings import LATER_BYTES, choose, least
    from edgetune.runtime import adapter as adapters
    from edgetune.runtime.budget import Stored, Vocabulary
    from edgetune.runtime.checkpoint import open_model
    from edgetune.runtime.config import LINEARS, LoraConfig
    from edgetune.runtime.device import compute_dtype
    from edgetune.runtime.heap import compact_heap, trim_memory
    from edgetune.runtime.loader import load_llama
    from edgetune.runtime.memory import anonymous_memory
    from edgetune.runtime.memory_meter import MemoryMeter
    from edgetune.runtime.optim import PagedAdamW
    from edgetune.runtime.runner import Runner
    from edgetune.runtime.vocabulary import FILE

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    folder = arguments.workdir / f"{arguments.shape}-nf4"
    checkpoint, lora = open_model(folder), LoraConfig(RANK, ALPHA, 0.0, LINEARS, False)
    stored, data = Stored.of(checkpoint), DataConfig(seq_len=arguments.tokens, batch_tokens=arguments.tokens)
    dtype = compute_dtype(torch.device("cpu"))
    memory = int(job["limit"] * (1 - MARGIN)) if job["limit"] else 10**12
    process = anonymous_memory() + LATER_BYTES
    choice = choose(checkpoint.config, lora, stored, data, dtype, memory, process, recompute=job.get("recompute", "auto"))
    if choice is None:
        smallest = least(checkpoint.config, lora, stored, data, dtype, process).parts.total
        raise SystemExit(f"does not fit: it needs at least {smallest / 1e6:,.0f} MB")
    setting = choice.setting
    if setting.compact:
        compact_heap()
    embedding = setting.in_file is not Vocabulary.NEITHER
    head = FILE if setting.in_file is Vocabulary.BOTH else None
    model = load_llama(checkpoint, dtype, layer_memory=setting.layer_memory, embedding_in_file=embedding, head_kind=head)
    adapters.attach_new(model, lora, 0)
    parameters = adapters.parameters(model)
    pages = arguments.workdir if setting.paged_optimizer else None
    optimizer = PagedAdamW(parameters, bits=setting.optimizer_bits, pages=pages)
    runner = Runner(model, setting.recompute, setting.loss_rows, arguments.workdir if setting.offload else None)
    row, seconds, losses = random_batch(checkpoint.config, arguments.tokens), [], []
    trim_memory()
    with MemoryMeter(checkpoint.files) as meter:
        for _ in range(1 + arguments.steps):
            start = time.perf_counter()
            losses.append(float(runner.train(row)))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(RATE)
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        peak = meter.peak()
    timed = sorted(seconds[1:])
    return {
        "setting": dataclasses.asdict(setting), "predicted": choice.parts.total, "parts": dataclasses.asdict(choice.parts),
        "peak": peak, "tokens_per_second": arguments.tokens / timed[len(timed) // 2], "losses": losses,
    }  # fmt: skip


if __name__ == "__main__":
    main()
