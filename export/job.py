"""Define what every target receives and returns: the Job to export, the files Written, and the Reader that opens them."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.names import EMBEDDING
from edgetune.runtime.start_tokens import StartTokens

Progress = Callable[[str, int, int], None]
"""Receives the name of a stage, how many of its pieces are done, and how many there are."""
OR_NAME_WEIGHTS = ", or name --weights to write the base as a model"
"""Advice for an export without an adapter, from the targets that can also write whole models."""
LAYER_SHARE = 0.25
"""Share of --memory that the layers of a running model may fill; larger models are streamed. Chosen by hand."""


@dataclass(frozen=True)
class UserFile:
    """The GGUF file on this machine that a base was converted from: an adapter runs on it without another copy of the model."""

    path: Path
    """The file, or the first part of a split one."""
    name: str
    """Its name in messages: an Ollama or LM Studio name, or the file's own name, without the folders above it."""
    quantisation: str
    """The GGUF type of most weights, such as Q4_1."""
    bytes: int
    """The size of the file, all parts together."""
    in_ollama: bool = False
    """True if the file lies in Ollama's folder, where `name` names it."""


@dataclass(frozen=True)
class Job:
    """An export to make: the model, the adapter, and the options of the command line.

    weights: one of TargetSpec.weights. adapter_as: one of TargetSpec.adapter_as, None for the default. memory: limit in
    bytes, None for no limit. texts: token ids of the documents to measure a lossy merge on. force: write the export even if
    it fails a check. check: let the target's own reader prove the export, and measure what only it can measure. progress:
    called at the beginning of each stage and after each of its pieces. start: what texts and chats began with in training.
    user_file: the GGUF file that the base was converted from, for forms that run on it (TargetSpec.on_user_file).
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
    start: StartTokens = field(default_factory=StartTokens)
    user_file: UserFile | None = None

    def counter(self, stage: str, total: int) -> Callable[[str], None]:
        """Begin a stage of `total` pieces; return a function to call with the name of each piece when it is done."""
        self.progress(stage, 0, total)
        numbers = itertools.count(1)
        return lambda name: self.progress(stage, next(numbers), total)

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Report a stage that consists of a single piece."""
        done = self.counter(stage, 1)
        yield
        done(stage)

    def needed_adapter(self, alternative: str = "") -> Adapter:
        """Return the adapter. Raises AdapterError if there is none, followed by `alternative`, what to type instead."""
        if self.adapter is None:
            raise AdapterError(
                f"There is no adapter of {self.base_name} to export; train one, or name one with --adapter{alternative}."
            )
        return self.adapter

    @property
    def layer_memory(self) -> int | None:
        """Return the bytes that the linears of a running model may fill before its layers are streamed; None for no limit."""
        return None if self.memory is None else int(self.memory * LAYER_SHARE)

    @property
    def adapter_bytes(self) -> int:
        """Return the size of the adapter's tensors in bytes, 0 without an adapter."""
        return 0 if self.adapter is None else sum(tensor.nbytes for tensor in self.adapter.tensors.values())

    @property
    def largest_linear(self) -> int:
        """Return the number of weights in the largest linear of a block."""
        return max(rows * columns for rows, columns in self.base.config.linear_shapes().values())

    @property
    def embedding_bytes(self) -> int:
        """Return the bytes of the embedding as stored. The head takes as many, unless it is stored in 4 bits."""
        return self.base.stored[EMBEDDING].nbytes

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the head in fp32, the dtype in which the reference model runs it."""
        return torch.float32.itemsize * self.base.config.vocab_size * self.base.config.hidden_size

    def model(self, dtype: torch.dtype = torch.float32, quant: QuantConfig | None = None) -> Llama:
        """Load the model that the export must agree with: the base on the CPU with its adapter attached.

        quant: quantise the base like this while it is loaded.
        """
        model = load_llama(self.base, dtype, quant=quant, layer_memory=self.layer_memory if quant is None else None)
        if self.adapter is not None:
            adapters.attach(model, self.adapter)
        return model


@dataclass(frozen=True)
class Written:
    """The result of TargetSpec.write.

    opens: the file or folder to open, relative to the export's folder; "" is the folder itself. notices: sentences for the
    user. facts: measured figures to report, by name.
    """

    opens: str = ""
    notices: tuple[str, ...] = ()
    facts: tuple[tuple[str, float], ...] = ()


class Reader(Protocol):
    """A written export, opened with the program that will open it on the user's side."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Run token ids (N,) of one sequence; return logits (N, V) f32."""


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Yield a private scratch folder inside the export's own folder and delete it at the end.

    If the process is killed, the scratch files are deleted together with the unfinished export.
    """
    place = folder / ".work"
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
