"""The proof of a Core ML package: every stored number compared, and the saved package run operation by operation as
how-to-call.json says. It shows that graph and weights are right, and nothing about Apple's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgetune.export import verify
from edgetune.export.coreml import app_files as app
from edgetune.export.coreml import model as coreml_model
from edgetune.export.coreml import weights as coreml_weights
from edgetune.export.coreml.evaluator import MilProgram
from edgetune.export.coreml.model import Plan
from edgetune.export.coreml.package import Package
from edgetune.export.coreml.source import BASE, Source, bare, stored_model
from edgetune.export.coreml.weights import Stored
from edgetune.export.job import Job
from edgetune.runtime import adapter as adapters
from edgetune.runtime.errors import ModelError

SINGLE = 4
"""Tokens that a proof reads one by one; the others come in chunks."""


class EvaluatedPackage:
    """A written package, called as how-to-call.json says."""

    def __init__(self, folder: Path, room: int | None = None, function: str | None = None) -> None:
        """room: bytes of weights that may be kept in memory, None for all. function: None for the default one."""
        self.call = app.read_call(folder)
        self.program = MilProgram(folder / app.PACKAGE, room)
        self._folder, self._function = folder, function
        self._adapter = {} if self.call["adapter"] is None else app.read_adapter(folder / app.ADAPTER_FILE, self.call)

    def use_adapter(self, file: Path) -> None:
        """Feed another adapter to the same package. Raises AdapterError for one that does not fit."""
        self._adapter = app.read_adapter(file, self.call)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32 through the same states: half of them in chunks, others in chunks on top of that, and the last
        SINGLE token by token."""
        states, rows, at = self.program.states(self._function), [], 0
        half, singles = -(-len(ids) // 2), max(len(ids) - SINGLE, 1)
        while at < len(ids):
            stop = half if at < half else max(singles, at + 1)
            end = min(at + self.call["prefill_tokens"], stop)
            chunk = np.array([ids[at:end]], np.int32)
            inputs = {"input_ids": chunk, **app.masks(self.call, end - at, end), **self._adapter}
            rows.append(self.program.run(inputs, states, self._function)["logits"][0])
            at = end
        return torch.from_numpy(np.concatenate(rows)).float()


class FunctionsPackage(EvaluatedPackage):
    """A package with the bare base as a second function, which is to agree with the engine's base as the adapted one does with
    the adapted model."""

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(folder, job.layer_memory)
        self._job = replace(job, adapter=None, adapter_as=None)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The default function's, once the base's were found to agree. Raises ModelError where they do not."""
        self._hold_base(ids)
        return super().logits(ids)

    def _hold_base(self, ids: Sequence[int]) -> None:
        usual = verify.BOUNDS["coreml", self._job.weights]
        expected = verify.along(stored_model(self._job, self._folder), ids, rounds=usual.rounds)
        bound = usual.of(expected)
        base = EvaluatedPackage(self._folder, self._job.layer_memory, BASE)
        if faults := verify.compare(expected, base, bound).faults(bound):
            raise ModelError(f"The package's function {BASE} is not the base: {'; '.join(faults)}; type --adapter-as inputs.")


class AdapterFile:
    """adapter.safetensors alone, put on the engine's own base."""

    def __init__(self, job: Job, folder: Path) -> None:
        adapter = job.needed_adapter()
        shapes = {name: list(values.shape) for name, values in app.stacked(adapter, job.base.config).items()}
        call = {"base": job.base.digest, "adapter": {"rank": adapter.config.rank, "inputs": shapes}}
        found = app.read_adapter(folder / app.ADAPTER_FILE, call)
        tensors = {
            (layer, name, part): torch.from_numpy(found[f"{name}_{part.lower()}"][layer]).float()
            for layer, name, part in adapter.tensors
        }
        scaled = replace(adapter.config, alpha=float(adapter.config.rank), rslora=False)  # the file's b is scaled already
        self._model = bare(job, folder)
        adapters.attach(self._model, adapters.Adapter(scaled, tensors))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        return verify.reference_logits(self._model, ids)


def compare_weights(path: Path, source: Source) -> int:
    """Hold every weight's stored codes and scales, in every function, to what was to be stored; returns how many numbers.

    Raises ModelError where one differs.
    """
    package, compared = Package(path), 0
    functions, names = [coreml_weights.places(package, function) for function in package.functions], source.stored()
    done = source.job.counter("comparing", len(names))
    for called, name in names.items():
        expected = source.weight(name)
        for places in functions:
            if called not in places:
                raise ModelError(f"The package has no weight {called}; export it again.")
            stored = places[called].read(package)
            if stored.form != expected.form or stored.differences(expected):
                raise ModelError(f"The package's {called} differs from the engine's weight; export it again.")
            compared += stored.codes.size + (0 if stored.scale is None else stored.scale.size)
        source.job.base.release(name)
        done(name)
    return compared


def compare_constants(path: Path, plans: Mapping[str, Plan]) -> int:
    """The same for what each function has beside its weights: a proof's few tokens see neither the angles of late positions nor
    a norm that is a little off."""
    package, compared = Package(path), 0
    for function, plan in plans.items():
        made = {each.outputs[0].name: each for each in package.functions[function].operations if each.type == "const"}
        for name, expected in coreml_model.constants(plan).items():
            if name not in made and coreml_model.does_nothing(name, expected):
                continue
            stored = None if name not in made else package.constant(made[name].attributes["val"])
            if stored is None or Stored("fp16", stored).differences(Stored("fp16", expected)):
                raise ModelError(f"The package's {name} differs from the engine's; export it again.")
            compared += expected.size
    return compared
