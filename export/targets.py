"""What an export is made of: a Job in, a folder out, and the receiving side's own reader to prove it with.

A target is a module of this package with

    WEIGHTS: tuple[str, ...]                       what --weights takes, the default first; "" is an adapter alone
    NEEDS: tuple[tuple[str, ...], str]             the packages that its reader needs and the extra that installs them
    ALSO_NEEDS: dict[str, tuple[str, ...]]         where it is there: those that a form of the weights needs besides
    def held(job) -> {"write": …, "read": …}        Held of each stage of writing, with the model to agree with, and of proof
    def write(job, folder) -> Written              into an empty private folder; what is to be opened, and what to tell
    def read(job, folder) -> Reader                what was written, opened by the target's own reader
    def reference(job, folder) -> Llama            where it is there: what to agree with in place of job.model(), for weights
                                                   that the target rounds to few bits on purpose
    def seal(folder) -> None                       where it is there: called once golden.json is in the folder, too
    PROVED_BY: str                                 what `read` is, for people; golden.json's bounds are of it
    ALSO_PROVED_BY: dict[str, str]                 where it is there: the forms of the weights that another reader proves
    ADAPTER_AS: tuple[str, ...]                    where it is there: what --adapter-as takes
    MEASURED: tuple[Measured, ...]                 where it is there: the forms of which `write` measures something on Job.texts

Whoever calls it makes the folder appear under its name only when it is whole and proved.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import AdapterError, ResourceError, UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.names import EMBEDDING, LINEAR_WEIGHT
from edgetune.runtime.pager import SLOTS

Progress = Callable[[str, int, int], None]
_SPELT = {"fp16": "f16", "f16": "fp16"}
TARGETS = ("peft", "hf", "mlx", "gguf", "ollama", "coreml", "mps")

WITHOUT_ADAPTER = ", or name --weights to write the base as a model"
"""What a target that also writes whole models adds where there is no adapter."""
LAYER_SHARE = 0.25
"""Of the memory that an export may hold, for the layers of a model that it runs."""
PROCESS_BYTES = 170_000_000
"""Anonymous memory of a process that has imported torch and all that exports share (measured on Linux, CPU build: 152 MB)."""
LOGITS = 1200
"""Bytes for each word of the vocabulary: golden.json's rows of logits, in fp32 and fp64."""
PRODUCT_BYTES = 12
"""For each number of the largest linear, while a model runs in fp32: three copies."""
PIECE_BYTES, PIECES = 2 << 20, 48
"""Of an embedding's file: what the system may map for one row that is read (measured on ext4: 6.4 MB for five rows), and about
as many rows as golden.json has tokens."""


@dataclass(frozen=True)
class Job:
    """What is to be exported, and how.

    weights: one of the target's WEIGHTS. adapter_as: Core ML's form of the adapter. memory: bytes that may be held, None
    for no limit. texts: token ids of documents to measure a lossy merge on. force: write even what was found useless.
    check: whether the target's own reader is to be used, for proof and for what only it can measure. progress: told what is
    being done, how much of it is, and how much there is.
    """

    base: Checkpoint
    base_name: str
    adapter: Adapter | None
    weights: str = ""
    adapter_as: str | None = None
    memory: int | None = None
    texts: Sequence[Sequence[int]] = ()
    force: bool = False
    check: bool = True
    progress: Progress = lambda stage, done, total: None

    def counter(self, stage: str, total: int) -> Callable[[str], None]:
        """Begin a stage of the work; what is returned is to be told of each of its `total` pieces."""
        self.progress(stage, 0, total)
        numbers = itertools.count(1)
        return lambda name: self.progress(stage, next(numbers), total)

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """A stage of one piece."""
        done = self.counter(stage, 1)
        yield
        done(stage)

    def needed_adapter(self, otherwise: str = "") -> Adapter:
        """The adapter, of which this target is made. otherwise: what can be typed to do without one, for targets that can.

        Raises AdapterError where there is none.
        """
        if self.adapter is None:
            raise AdapterError(
                f"There is no adapter of {self.base_name} to export; train one, or name one with --adapter{otherwise}."
            )
        return self.adapter

    @property
    def layer_memory(self) -> int | None:
        """Bytes for the linears of a model that is run, beyond which it is streamed."""
        return None if self.memory is None else int(self.memory * LAYER_SHARE)

    @property
    def adapter_bytes(self) -> int:
        return 0 if self.adapter is None else sum(tensor.nbytes for tensor in self.adapter.tensors.values())

    @property
    def largest_linear(self) -> int:
        """Its weights' number."""
        return max(rows * columns for rows, columns in self.base.config.linear_shapes().values())

    @property
    def embedding_bytes(self) -> int:
        """As its file has it; a head is as large, unless it is stored in 4 bits."""
        return self.base.stored[EMBEDDING].nbytes

    @property
    def head_bytes(self) -> int:
        """In fp32, as a model that runs in it has the head."""
        return torch.float32.itemsize * self.base.config.vocab_size * self.base.config.hidden_size

    def model(self, dtype: torch.dtype = torch.float32, quant: QuantConfig | None = None) -> Llama:
        """The base, quantised where `quant` says so, with its adapter attached, on the CPU: what an export must agree with."""
        model = load_llama(self.base, dtype, quant=quant, layer_memory=self.layer_memory if quant is None else None)
        if self.adapter is not None:
            adapters.attach(model, self.adapter)
        return model


@dataclass(frozen=True)
class Held:
    """What a stage of an export holds at its highest: `fixed` bytes and, of each of the `models` that it runs, the linears of
    the layers that Job.layer_memory allows."""

    fixed: int
    models: int = 0

    def needed(self, base: Checkpoint, memory: int) -> int:
        """The Job.memory that is enough where `memory` decides how the layers are held: streamed, or, where they fit their
        share as they are stored, all of them, a dense base's as fp32."""
        if not self.models:
            return self.fixed
        config, stored = base.config, sum(tensor.nbytes for name, tensor in base.stored.items() if LINEAR_WEIGHT in name)
        if memory * LAYER_SHARE >= stored:
            kept = stored if base.quant is not None else 4 * config.linear_parameters
            return self.fixed + self.models * kept
        ring = min(SLOTS * stored // config.num_layers, stored)
        return math.ceil(max(self.fixed / (1 - self.models * LAYER_SHARE), ring / LAYER_SHARE))


def held_by_reference(job: Job, process: int = PROCESS_BYTES) -> Held:
    """Running the model that an export is compared with: `process` bytes before it is opened, its adapter twice, and a head in
    fp32 beside what it is made from, or then beside the embedding's rows, copies of the largest linear and rows of logits."""
    rows = min(job.embedding_bytes, PIECES * PIECE_BYTES)
    beside = max(job.embedding_bytes, rows + PRODUCT_BYTES * job.largest_linear + LOGITS * job.base.config.vocab_size)
    return Held(process + 2 * job.adapter_bytes + job.head_bytes + beside, models=1)


def held_by_fp32_reader(job: Job, process: int = PROCESS_BYTES) -> Held:
    """A reader that has the whole model in fp32."""
    return Held(process + torch.float32.itemsize * job.base.config.parameters)


def check_memory(target: Target, job: Job) -> None:
    """Raise ResourceError, before anything is written, where job.memory does not hold a stage of the export."""
    if job.memory is None:
        return
    stages = target.held(job)
    written = enough(stages["write"], job.base, job.memory)
    needed = enough([*stages["write"], *stages["read"]], job.base, job.memory) if job.check else written
    if needed > job.memory:
        unproved = f", or --no-verify and {_megabytes(written)} to write it unproved" if needed > written else ""
        raise ResourceError(
            f"This export takes about {needed / 1e9:.2f} GB, and --memory allows "
            f"{job.memory / 1e9:.2f} GB; type --memory {_megabytes(needed)} or more{unproved}."
        )


def enough(stages: Sequence[Held], base: Checkpoint, memory: int) -> int:
    """`memory` where it is enough for all stages, else a larger amount that is: more may load what less would have streamed."""
    while (needed := max(held.needed(base, memory) for held in stages)) > memory:
        memory = needed
    return memory


def _megabytes(count: int) -> str:
    return f"{math.ceil(count / 1e6)}MB"


@dataclass(frozen=True)
class Written:
    """What `write` made: the file or folder to open, relative to the export's folder ("" is the folder itself)."""

    opens: str = ""
    notices: tuple[str, ...] = ()
    facts: tuple[tuple[str, float], ...] = ()
    """Measured figures to report, by name."""


class Reader(Protocol):
    """A written export, opened by what will open it at the user's."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Token ids (N,) of one sequence -> logits (N, V) f32."""


class Target(Protocol):
    """The names that a target's module has."""

    WEIGHTS: tuple[str, ...]
    NEEDS: tuple[tuple[str, ...], str]
    PROVED_BY: str

    def held(self, job: Job) -> dict[str, list[Held]]: ...

    def write(self, job: Job, folder: Path) -> Written: ...

    def read(self, job: Job, folder: Path) -> Reader: ...


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A private folder within an export's own, gone afterwards: what a killed process leaves in it goes with the export."""
    place = folder / ".work"
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def load_target(name: str) -> Target:
    """The module of a target. Raises UsageError for a name that is none."""
    if name not in TARGETS:
        raise UsageError(f"Unknown target {name!r}; expected one of {', '.join(TARGETS)}.")
    module = importlib.import_module(f"edgetune.export.{name}")
    return cast(Target, importlib.import_module(f"{module.__name__}.target") if hasattr(module, "__path__") else module)


def reference(target: Target, job: Job, folder: Path) -> Llama:
    """The model that what `folder` holds has to agree with."""
    own = getattr(target, "reference", None)
    return job.model() if own is None else own(job, folder)


def proved_by(target: Target, weights: str) -> str:
    """What reads the form of the weights, for people."""
    also: dict[str, str] = getattr(target, "ALSO_PROVED_BY", {})
    return also.get(weights, target.PROVED_BY)


def seal(target: Target, folder: Path) -> None:
    """What a target does when golden.json has been written."""
    own = getattr(target, "seal", None)
    if own is not None:
        own(folder)


def check_weights(name: str, target: Target, weights: str | None) -> str:
    """The form of the weights, the target's default where None; fp16 and f16 are one. Raises UsageError for one it has not."""
    if weights is None:
        return target.WEIGHTS[0]
    weights = next((spelt for spelt in target.WEIGHTS if spelt in (weights, _SPELT.get(weights))), weights)
    if weights not in target.WEIGHTS:
        known = [known for known in target.WEIGHTS if known]
        if not known:
            raise UsageError(f"export {name} has no --weights {weights}: it writes the adapter alone; leave --weights out.")
        alone = ", or no --weights for the adapter alone" if "" in target.WEIGHTS else ""
        raise UsageError(f"export {name} has no --weights {weights}; expected {_one_of(known)}{alone}.")
    return weights


@dataclass(frozen=True)
class Measured:
    """A form of an export whose `write` measures on texts what is left of model or adapter.

    adapter_as: the --adapter-as that this is so with, None for any. by_reader: whether the target's reader measures, which
    --no-verify leaves out.
    """

    weights: str
    adapter_as: str | None = None
    by_reader: bool = False

    def covers(self, weights: str, adapter_as: str | None, check: bool = True) -> bool:
        """Whether an export is of this form."""
        return self.weights == weights and self.adapter_as in (None, adapter_as) and (check or not self.by_reader)


def check_texts(name: str, target: Target, weights: str, adapter_as: str | None, check: bool) -> None:
    """Raise UsageError for texts that nothing would be measured on. weights: as check_weights gives them."""
    forms: tuple[Measured, ...] = getattr(target, "MEASURED", ())
    if any(form.covers(weights, adapter_as, check) for form in forms):
        return
    typed = _typed(name, weights, adapter_as) + ("" if check else " --no-verify")
    others = " or ".join(f"`{_typed(name, form.weights, form.adapter_as)}`" for form in forms)
    raise UsageError(f"`{typed}` measures nothing on --texts; leave --texts out{f', or type {others}' if forms else ''}.")


def _typed(name: str, weights: str, adapter_as: str | None) -> str:
    options = ((" --weights ", weights), (" --adapter-as ", adapter_as))
    return f"edgetune export {name}" + "".join(option + value for option, value in options if value)


def check_adapter_as(name: str, target: Target, adapter_as: str | None) -> None:
    """Raise UsageError where --adapter-as means nothing to the target."""
    known: tuple[str, ...] = getattr(target, "ADAPTER_AS", ())
    if adapter_as is not None and adapter_as not in known:
        advice = f"expected {_one_of(known)}" if known else "leave it out, it is for coreml"
        raise UsageError(f"export {name} has no --adapter-as {adapter_as}; {advice}.")


def _one_of(known: Sequence[str]) -> str:
    return known[0] if len(known) == 1 else f"one of {', '.join(known)}"


def missing_packages(target: Target, weights: str) -> list[str]:
    """Those that prove an export of this form and are not installed."""
    also: dict[str, tuple[str, ...]] = getattr(target, "ALSO_NEEDS", {})
    return [package for package in (*target.NEEDS[0], *also.get(weights, ())) if importlib.util.find_spec(package) is None]


def check_reader(name: str, target: Target, weights: str) -> None:
    """Raise ResourceError, before anything is written, where packages that prove an export are not installed, naming all."""
    missing, extra = missing_packages(target, weights), target.NEEDS[1]
    if missing:
        raise ResourceError(
            f"Proving export {name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"type pip install 'edgetune[{extra}]', or --no-verify to write it unproved."
        )
