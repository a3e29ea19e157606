"""Prove a Core ML package: compare every stored number, and run the saved package operation by operation as how-to-call.json
says. That proves the graph and the weights, and nothing about Apple's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgetune.export import verify
from edgetune.export.coreml.adapter_file import ADAPTER_FILE, read_adapter, stacked
from edgetune.export.coreml.contents import BASE, Contents
from edgetune.export.coreml.evaluator import MilProgram
from edgetune.export.coreml.how_to_call import PACKAGE, masks, read_call
from edgetune.export.coreml.package import Package
from edgetune.export.coreml.plan import Plan, constants, does_nothing
from edgetune.export.coreml.reference import bare_model, stored_model
from edgetune.export.coreml.stored_weight import StoredWeight
from edgetune.export.coreml.weight_locations import weight_locations
from edgetune.export.job import Job
from edgetune.runtime import adapter as adapters
from edgetune.runtime.errors import ModelError

SINGLE_TOKENS = 4
"""Tokens at the end of a text that a proof reads one by one; it reads the others in chunks. Chosen by hand."""


class EvaluatedPackage:
    """A written package that is called as its how-to-call.json says."""

    def __init__(self, folder: Path, cache_bytes: int | None = None, function: str | None = None) -> None:
        """Open an export. cache_bytes: limit of the weights kept in memory, None for all. function: None for the default."""
        self.call = read_call(folder)
        self.program = MilProgram(folder / PACKAGE, cache_bytes)
        self._folder, self._function = folder, function
        self._adapter = {} if self.call["adapter"] is None else read_adapter(folder / ADAPTER_FILE, self.call)

    def use_adapter(self, file: Path) -> None:
        """Use the adapter in `file` from now on. Raises AdapterError where it does not fit the package."""
        self._adapter = read_adapter(file, self.call)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read token ids (N,); return logits (N, V) f32.

        All go through the same states: the first half in chunks, then more chunks behind a filled cache, and the last
        SINGLE_TOKENS one by one.
        """
        states, rows, at = self.program.states(self._function), [], 0
        half, singles = -(-len(ids) // 2), max(len(ids) - SINGLE_TOKENS, 1)
        while at < len(ids):
            stop = half if at < half else max(singles, at + 1)
            end = min(at + self.call["prefill_tokens"], stop)
            chunk = np.array([ids[at:end]], np.int32)
            inputs = {"input_ids": chunk, **masks(self.call, end - at, end), **self._adapter}
            rows.append(self.program.run(inputs, states, self._function)["logits"][0])
            at = end
        return torch.from_numpy(np.concatenate(rows)).float()


class FunctionsPackage(EvaluatedPackage):
    """A package whose second function is the bare base. It is checked against the engine's base, as the default function is
    against the adapted model."""

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(folder, job.layer_memory)
        self._job = replace(job, adapter=None, adapter_as=None)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Check the base function, then return the default function's logits. Raises ModelError where the base differs."""
        self._check_base(ids)
        return super().logits(ids)

    def _check_base(self, ids: Sequence[int]) -> None:
        usual = verify.BOUNDS["coreml", self._job.weights]
        expected = verify.along(stored_model(self._job, self._folder), ids, rounds=usual.rounds)
        bound = usual.of(expected)
        base = EvaluatedPackage(self._folder, self._job.layer_memory, BASE)
        if faults := verify.compare(expected, base, bound).faults(bound):
            raise ModelError(f"The package's function {BASE} is not the base: {'; '.join(faults)}; type --adapter-as inputs.")


class AdapterFile:
    """An adapter.safetensors without a package, attached to the engine's own base."""

    def __init__(self, job: Job, folder: Path) -> None:
        adapter = job.needed_adapter().uniform()
        shapes = {name: list(values.shape) for name, values in stacked(adapter, job.base.config).items()}
        call = {"base": job.base.digest, "adapter": {"rank": adapter.config.rank, "inputs": shapes}}
        found = read_adapter(folder / ADAPTER_FILE, call)
        tensors = {
            (layer, name, part): torch.from_numpy(found[f"{name}_{part.lower()}"][layer]).float()
            for layer, name, part in adapter.tensors
        }
        scaled = replace(adapter.config, alpha=float(adapter.config.rank), rslora=False)  # the file's b includes the scale
        self._model = bare_model(job, folder)
        adapters.attach(self._model, adapters.Adapter(scaled, tensors))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read token ids (N,); return logits (N, V) f32."""
        return verify.reference_logits(self._model, ids)


def compare_weights(path: Path, contents: Contents) -> int:
    """Compare every stored code and scale, in every function, with what `contents` says; return the count of numbers compared.

    Raises ModelError where one differs.
    """
    package, compared = Package(path), 0
    functions, names = [weight_locations(package, function) for function in package.functions], contents.weight_names()
    done = contents.job.counter("comparing", len(names))
    for called, name in names.items():
        expected = contents.weight(name)
        for locations in functions:
            if called not in locations:
                raise ModelError(f"The package has no weight {called}; export it again.")
            stored = locations[called].read(package)
            if stored.form != expected.form or stored.differences(expected):
                raise ModelError(f"The package's {called} differs from the engine's weight; export it again.")
            compared += stored.codes.size + (0 if stored.scale is None else stored.scale.size)
        contents.job.base.release(name)
        done(name)
    return compared


def compare_constants(path: Path, plans: Mapping[str, Plan]) -> int:
    """Compare the constants of every function beside its weights; return the count of numbers compared. The proof's few tokens
    would show neither a wrong angle of a late position nor a norm that is slightly wrong.

    Raises ModelError where one differs.
    """
    package, compared = Package(path), 0
    for function, plan in plans.items():
        made = {each.outputs[0].name: each for each in package.functions[function].operations if each.type == "const"}
        for name, expected in constants(plan).items():
            if name not in made and does_nothing(name, expected):
                continue
            stored = None if name not in made else package.constant(made[name].attributes["val"])
            if stored is None or StoredWeight("fp16", stored).differences(StoredWeight("fp16", expected)):
                raise ModelError(f"The package's {name} differs from the engine's; export it again.")
            compared += expected.size
    return compared
