"""Measures this machine's peak speeds, then how much of them training and generating reach.

Each figure is the median of several runs. Each share is relative to a peak that was measured in the same process just before.
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
from edgetune.progress import Progress, Show, Stages, ignore
from edgetune.runtime import adapter as adapters
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.device import cpu_name
from edgetune.runtime.generate import Generator
from edgetune.runtime.heap import trim_memory
from edgetune.runtime.linear import Linear
from edgetune.runtime.memory_meter import MemoryMeter
from edgetune.runtime.model import Llama
from edgetune.runtime.optim import PagedAdamW
from edgetune.runtime.runner import Recompute, Runner

LORA = LoraConfig(rank=16, alpha=16.0)
"""The adapter that is trained in every measurement, on all linears."""
_PEAK_REPEATS = 5
"""Runs of which the median is taken for a machine's peak and for reading a prompt. Chosen by hand."""
_GRADIENT_CLIP, _LEARNING_RATE = 1.0, 1e-4
"""Settings of the measured training step; they do not affect its speed."""
_PROMPT_TOKENS = 16
"""Tokens of the prompt before decoding is measured. Chosen by hand."""
_DECODED_TOKENS = 48
"""Tokens that are decoded to measure decoding. Chosen by hand."""
_WARM_UP_TOKENS = 8
"""Decoded tokens that are left out of the median. Chosen by hand."""


@dataclass(frozen=True)
class TrainSpeed:
    """The training speed of one recomputation setting: tokens/s, its linears' share of the GEMM peak, peak memory.

    A product in 8 bits counts as the bf16 product that it replaces.
    """

    tokens_per_second: float
    gemm_share: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Bench:
    """The result of `edgetune bench`.

    gemm_gflops: the peak for `dtype`, that of the activations. train_int8: True if the large products of training were
    computed in 8 bits, in all entries of `train` except "none, bf16".
    """

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
        """Return the result, ready for JSON."""
        return asdict(self)


class Runs:
    """Counts the runs of all measurements, and reports how many are done."""

    def __init__(self, progress: Progress = ignore, total: int = 0) -> None:
        self._progress, self._done, self._total = progress, 0, total
        self.is_alive()

    def add(self) -> None:
        """Count one run."""
        self._done += 1
        self.is_alive()

    def is_alive(self) -> None:
        """Report again what is done: a run can take a minute."""
        self._progress(self._done, self._total)


def median_seconds(work: Callable[[], object], repeats: int, runs: Runs) -> float:
    """Return the median time of `repeats` calls of `work`, after one call to warm up."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        runs.add()
    return statistics.median(times[1:])


def gemm_gflops(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], runs: Runs | None = None) -> float:
    """Return the best median GFLOP/s of x (m, k) times W (n, k)^T over `shapes` (m, k, n)."""
    best = 0.0
    for m, k, n in shapes:
        x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        seconds = median_seconds(lambda x=x, w=w: torch.mm(x, w.T), _PEAK_REPEATS, runs or Runs())  # type: ignore[misc]
        best = max(best, 2 * m * k * n / seconds / 1e9)
    return best


def gemm_shapes(config: LlamaConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Return the shapes (m, k, n) to look for the peak in: squares of 2048 and of 4096, and the model's own products."""
    model_shapes = [(tokens, inputs, out) for out, inputs in sorted(set(config.linear_shapes().values()))]
    return [(2048, 2048, 2048), (4096, 4096, 4096), *model_shapes]


def read_gb_per_second(megabytes: int = 1024, runs: Runs | None = None) -> float:
    """Return the speed in GB/s at which all threads together read memory that is in no cache."""
    x = torch.ones(megabytes * 2**18)
    return x.nbytes / median_seconds(x.sum, _PEAK_REPEATS, runs or Runs()) / 1e9


def linear_flops(config: LlamaConfig, recompute: Recompute) -> float:
    """Return the FLOPs per token of the linears in a training step: forward, input gradient, recomputation.

    A recomputed block skips its last product, and the head runs twice. Adapters and attention are not counted.
    """
    down = config.num_layers * config.intermediate_size * config.hidden_size
    recomputed = 2 * (config.linear_parameters - down) if recompute is Recompute.FULL else 0
    return 4 * config.linear_parameters + recomputed + 4 * config.vocab_size * config.hidden_size


def train_speed(
    model: Llama,
    recompute: Recompute,
    tokens: int,
    peak_gflops: float,
    repeats: int,
    runs: Runs,
    files: Sequence[Path] = (),
    int8: bool = False,
) -> TrainSpeed:
    """Measure forward, backward and AdamW on one batch of `tokens`, with LORA attached; `int8` as in Runner."""
    adapters.attach_new(model, LORA, 0)
    trim_memory()
    runner = Runner(model, recompute, int8=int8)
    runner.between_blocks = runs.is_alive
    parameters = adapters.parameters(model)
    optimizer = PagedAdamW(parameters)
    batch = random_batch(model.config, tokens)

    def step() -> None:
        runner.train(batch)
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_CLIP)
        optimizer.step(_LEARNING_RATE)
        optimizer.zero_grad()

    with MemoryMeter(files) as meter:
        seconds = median_seconds(step, repeats, runs)
        peak = meter.peak()
    adapters.detach(model)
    share = linear_flops(model.config, recompute) * tokens / seconds / 1e9 / peak_gflops
    return TrainSpeed(tokens / seconds, share, peak)


def prefill_tokens_per_second(model: Llama, tokens: int, runs: Runs) -> float:
    """Measure the speed of the prefill: reading a prompt of `tokens`, up to the logits of its last token."""
    generator = Generator(Runner(model), tokens)
    ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()

    def prefill() -> None:
        generator.cache.length = 0
        with torch.no_grad():
            generator.prefill(ids)

    return tokens / median_seconds(prefill, _PEAK_REPEATS, runs)


def decode_tokens_per_second(model: Llama, runs: Runs, tokens: int = _DECODED_TOKENS) -> float:
    """Measure the speed of decoding: writing `tokens` one after another, after a short prompt."""
    generator = Generator(Runner(model), _PROMPT_TOKENS + 2 * tokens)
    with torch.no_grad():
        generator.prefill(list(range(1, 1 + _PROMPT_TOKENS)))
        seconds = []
        for token in range(tokens):
            start = time.perf_counter()
            generator.step(token + 1)
            seconds.append(time.perf_counter() - start)
            runs.add()
    return 1 / statistics.median(seconds[_WARM_UP_TOKENS:])


def decode_bytes(model: Llama) -> int:
    """Return the bytes that must be read to decode one token: every linear and the head."""
    weights = [linear.weight for block in model.blocks for linear in block.linears().values() if isinstance(linear, Linear)]
    return sum(weight.nbytes for weight in weights) + model.head.nbytes


def bench(shape: str, tokens: int, repeats: int, show: Show = lambda event: None) -> Bench:
    """Measure this machine, then a model of the named shape on it.

    shape: a name in SHAPES. tokens: length of a training batch and of the prompt. repeats: runs of which the median is taken.
    show: receives progress as events.Working.
    """
    device = torch.device("cpu")
    dtype, int8 = number_format("auto", device)  # as `edgetune train` chooses them
    config, stages = SHAPES[shape], Stages(show)
    shapes, formats = gemm_shapes(config, tokens), (torch.bfloat16, torch.float32)
    peak_runs = 1 + _PEAK_REPEATS
    total = (len(formats) * len(shapes) + 2) * peak_runs + (len(Recompute) + int8) * (1 + repeats) + _DECODED_TOKENS
    runs = Runs(stages.of("timing"), total)
    peaks = {str(kind).removeprefix("torch."): gemm_gflops(kind, shapes, runs) for kind in formats}
    peak = peaks[str(dtype).removeprefix("torch.")]
    read = read_gb_per_second(runs=runs)
    trim_memory()
    model = random_llama(config, dtype, progress=stages.of("preparing"))
    train = {str(kind): train_speed(model, kind, tokens, peak, repeats, runs, int8=int8) for kind in Recompute}
    if int8:
        train["none, bf16"] = train_speed(model, Recompute.NONE, tokens, peak, repeats, runs)
    fastest = max(train.values(), key=lambda speed: speed.tokens_per_second)
    decode = decode_tokens_per_second(model, runs)
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
        prefill_tokens_per_second=prefill_tokens_per_second(model, min(tokens, config.max_positions), runs),
        decode_tokens_per_second=decode,
        decode_bandwidth_share=decode * decode_bytes(model) / 1e9 / read,
        peak_memory_bytes=max(speed.peak_memory_bytes for speed in train.values()),
    )
