"""Make random adapters, and write and check an export without going through the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from edgetune.export import verify
from edgetune.export.job import Job, Written
from edgetune.export.targets import load_target
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig

PROMPT = [1, 5, 9, 17, 3, 8, 44, 60, 2, 31]


def random_adapter(
    model: LlamaConfig,
    rank: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] = LINEARS,
    size: float = 0.1,
    layers: tuple[int, ...] | None = None,
    rslora: bool = False,
) -> Adapter:
    """Return an adapter whose A and B are both random, so that it changes every logit."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(model.num_layers) if layers is None else layers:
        for name in targets:
            rows, columns = model.linear_shapes()[name]
            tensors[layer, name, "A"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[layer, name, "B"] = torch.randn(rows, rank, generator=generator) * size
    return Adapter(LoraConfig(rank, alpha, 0.05, targets, rslora), tensors, {}, layers)


def job_for(base: Checkpoint, adapter: Adapter | None, weights: str = "", **settings: object) -> Job:
    return Job(base, "a base", adapter, weights, **settings)  # type: ignore[arg-type]


def write_and_compare(name: str, job: Job, folder: Path) -> tuple[Written, verify.Agreement]:
    """Write an export, read it back with its own reader and compare the logits, as `edgetune export` does."""
    folder.mkdir(mode=0o700)
    spec = load_target(name)
    written = spec.write(job, folder)
    golden = verify.golden(job, PROMPT, spec.reference(job, folder))
    return written, verify.compare(golden, spec.read(job, folder), verify.BOUNDS[name, job.weights])
