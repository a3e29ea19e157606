"""What this machine can do and what the engine makes of it: peaks first, then a model's speeds as shares of them.

A figure is a median of several runs; a share compares with a peak measured in the same process a moment before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgetune.machine.shapes import SHAPES
from edgetune.machine.synthetic import random_batch, random_llama
from edgetune.memory_settings import number_format
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import cpu_name, trim_memory
from edgetune.runtime.generate import Generator
from edgetune.runtime.lora import Linear
from edgetune.runtime.memory_meter import MemoryMeter
from edgetune.runtime.model import Llama
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Recompute, Runner

LORA = LoraConfig(rank=16, alpha=16.0)


@dataclass(frozen=True)
class TrainSpeed:
    """One recomputation setting: tokens/s, the share of the GEMM peak that its linears reached, peak memory.

    Products in 8 bits count as the bf16 ones that they stand for.
    """

    tokens_per_second: float
    gemm_share: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Bench:
    """`edgetune bench`'s answer; gemm_gflops is the peak of `dtype`, the activations'. train_int8: of `train`, all but "none,
    bf16" made their large products in 8 bits."""

    machine: str
    threads: int
    shape: str
    parameters: int
    dtype: str
    gemm_gflops: float
    gemm_gflops_by_dtype: dict[str, float]
    read_gb_per_second: float
    train_tokens_per_second: float
    train_gemm_share: float
    train_int8: bool
    train: dict[str, TrainSpeed] = field(default_factory=dict)
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    decode_bandwidth_share: float = 0.0
    peak_memory_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work`, after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_gflops(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    """Best median GFLOP/s of x (m, k) times W (n, k)^T over `shapes` (m, k, n)."""
    best = 0.0
    for m, k, n in shapes:
        x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        seconds = median_seconds(lambda x=x, w=w: torch.mm(x, w.T), 5)  # type: ignore[misc]
        best = max(best, 2 * m * k * n / seconds / 1e9)
    return best


def gemm_shapes(config: LlamaConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Squares of 2048 and 4096, and the model's own products."""
    own = [(tokens, inputs, out) for out, inputs in sorted(set(config.linear_shapes().values()))]
    return [(2048, 2048, 2048), (4096, 4096, 4096), *own]


def read_gb_per_second(megabytes: int = 1024) -> float:
    """GB/s at which all threads read memory that is in no cache."""
    x = torch.ones(megabytes * 2**18)
    return x.nbytes / median_seconds(x.sum, 5) / 1e9


def linear_flops(config: LlamaConfig, recompute: Recompute) -> float:
    """FLOPs a token of the linears that a training step runs: forward, input gradient, and what is recomputed.

    A recomputed block leaves its last product out; the head runs twice; adapters and attention are not counted.
    """
    down = config.num_layers * config.intermediate_size * config.hidden_size
    again = 2 * (config.linear_parameters - down) if recompute is Recompute.FULL else 0
    return 4 * config.linear_parameters + again + 4 * config.vocab_size * config.hidden_size


def train_speed(
    model: Llama,
    recompute: Recompute,
    tokens: int,
    peak_gflops: float,
    repeats: int,
    files: Sequence[Path] = (),
    int8: bool = False,
) -> TrainSpeed:
    """Forward, backward and AdamW of one row of `tokens`, r16 on all linears; int8 as Runner's."""
    adapters.attach_new(model, LORA, 0)
    trim_memory()
    runner = Runner(model, recompute, int8=int8)
    parameters = adapters.parameters(model)
    optimizer = PagedAdamW(parameters)
    batch = random_batch(model.config, tokens)

    def step() -> None:
        runner.train(batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(1e-4)
        optimizer.zero_grad()

    with MemoryMeter(files) as meter:
        seconds = median_seconds(step, repeats)
        peak = meter.peak()
    adapters.detach(model)
    share = linear_flops(model.config, recompute) * tokens / seconds / 1e9 / peak_gflops
    return TrainSpeed(tokens / seconds, share, peak)


def prefill_tokens_per_second(model: Llama, tokens: int) -> float:
    """Speed of reading a prompt, logits of its last token included."""
    generator = Generator(Runner(model), tokens)
    ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()

    def prefill() -> None:
        generator.cache.length = 0
        with torch.no_grad():
            generator.prefill(ids)

    return tokens / median_seconds(prefill, 5)


def decode_tokens_per_second(model: Llama, tokens: int = 48) -> float:
    """Speed of writing, one token after another, after a prompt of 16."""
    generator = Generator(Runner(model), 16 + 2 * tokens)
    with torch.no_grad():
        generator.prefill(list(range(1, 17)))
        seconds = []
        for token in range(tokens):
            start = time.perf_counter()
            generator.step(token + 1)
            seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[8:])


def decode_bytes(model: Llama) -> int:
    """Bytes that writing one token must read: every linear, the head."""
    weights = [linear.weight for block in model.blocks for linear in block.linears().values() if isinstance(linear, Linear)]
    return sum(weight.nbytes for weight in weights) + model.head.nbytes


def bench(shape: str, tokens: int, repeats: int) -> Bench:
    """Measure this machine, then a model of the named shape on it."""
    device = torch.device("cpu")
    dtype, int8 = number_format("auto", device)  # as `edgetune train` has them
    config = SHAPES[shape]
    peaks = {
        str(kind).removeprefix("torch."): gemm_gflops(kind, gemm_shapes(config, tokens))
        for kind in (torch.bfloat16, torch.float32)
    }
    peak = peaks[str(dtype).removeprefix("torch.")]
    read = read_gb_per_second()
    trim_memory()
    model = random_llama(config, dtype)
    train = {str(kind): train_speed(model, kind, tokens, peak, repeats, int8=int8) for kind in Recompute}
    if int8:
        train["none, bf16"] = train_speed(model, Recompute.NONE, tokens, peak, repeats)
    fastest = max(train.values(), key=lambda speed: speed.tokens_per_second)
    decode = decode_tokens_per_second(model)
    return Bench(
        machine=cpu_name(),
        threads=torch.get_num_threads(),
        shape=shape,
        parameters=config.parameters,
        dtype=str(dtype).removeprefix("torch."),
        gemm_gflops=peak,
        gemm_gflops_by_dtype=peaks,
        read_gb_per_second=read,
        train_tokens_per_second=fastest.tokens_per_second,
        train_gemm_share=fastest.gemm_share,
        train_int8=int8,
        train=train,
        prefill_tokens_per_second=prefill_tokens_per_second(model, min(tokens, config.max_positions)),
        decode_tokens_per_second=decode,
        decode_bandwidth_share=decode * decode_bytes(model) / 1e9 / read,
        peak_memory_bytes=max(speed.peak_memory_bytes for speed in train.values()),
    )
