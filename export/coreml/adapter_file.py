"""Write and read adapter.safetensors: an adapter as the inputs of a package.

The file holds one fp16 tensor for each adapter input, under the input's name: `q_proj_a` (L, r, in) and `q_proj_b` (L, out, r),
the latter multiplied by the scale alpha/r. A package takes every adapter of its base and linears whose rank is at most its own:
the missing rows of a and columns of b are zeros. So a new night's adapter needs no new package, only this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.export.coreml.package import Array
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LINEARS, LlamaConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec
from edgetune.runtime.untrusted_file import ADAPTER_WEIGHTS

ADAPTER_FILE = "adapter.safetensors"


def stacked(adapter: Adapter, config: LlamaConfig) -> dict[str, Array]:
    """Return the adapter's tensors as a package's inputs, f16 by name, with zeros for layers that the adapter does not change.

    Raises AdapterError where a number is beyond fp16's range.
    """
    adapter = adapter.uniform()
    rank, shapes, result = adapter.config.rank, config.linear_shapes(), {}
    for name in (name for name in LINEARS if name in adapter.config.targets):
        out, width = shapes[name]
        for part, shape, scale in (("A", (rank, width), 1.0), ("B", (out, rank), adapter.config.scale)):
            layers = [adapter.tensors.get((layer, name, part), torch.zeros(shape)) for layer in range(config.num_layers)]
            values = (torch.stack(layers) * scale).half()
            if not torch.isfinite(values).all():
                raise AdapterError(
                    f"The adapter's {name} holds numbers beyond the range of fp16, in which Core ML computes; train it again."
                )
            result[f"{name}_{part.lower()}"] = values.numpy()
    return result


def write_adapter(adapter: Adapter, config: LlamaConfig, base: str, path: Path) -> None:
    """Write adapter.safetensors, private to its owner, for packages of the base with digest `base`."""
    adapter = adapter.uniform()
    tensors = {name: torch.from_numpy(values) for name, values in stacked(adapter, config).items()}
    specs = [TensorSpec(name, torch.float16, tuple(values.shape)) for name, values in tensors.items()]
    with SafetensorsWriter(path, specs, {"base": base, "rank": str(adapter.config.rank)}) as writer:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])


def read_adapter(path: Path, call: Mapping[str, Any]) -> dict[str, Array]:
    """Read an adapter file as the inputs of the package that `call` (how-to-call.json) describes, zero-padded to its rank.

    Raises AdapterError for an adapter of another base, of other linears or of a higher rank.
    """
    file = SafetensorsFile.open(path, ADAPTER_WEIGHTS)
    expected = {name: tuple(shape) for name, shape in call["adapter"]["inputs"].items()}
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    max_rank, rank = int(call["adapter"]["rank"]), file.metadata.get("rank", "")
    if file.metadata.get("base") != call["base"] or set(found) != set(expected) or not rank.isdecimal() or int(rank) > max_rank:
        raise AdapterError(
            f"{path} does not fit this package: it is for base {str(file.metadata.get('base'))[:12]}, rank {rank}, "
            f"{len(found)} inputs; expected base {str(call['base'])[:12]}, rank {max_rank} or less, {len(expected)} inputs. "
            "Type `edgetune export coreml` to write a package for it."
        )
    padded = {}
    for name, shape in expected.items():
        padded[name] = np.zeros(shape, np.float16)
        if any(inner > outer for inner, outer in zip(found[name], shape, strict=True)):
            raise AdapterError(f"{path} holds {name} of shape {found[name]}, expected at most {shape}; export it again.")
        padded[name][tuple(slice(size) for size in found[name])] = file.tensor(name).numpy()
    return padded
