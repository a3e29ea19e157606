"""Run llama.cpp on an export: the reader that proves a GGUF model, and a GGUF adapter on its base."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from edgetune.export.gguf import llamacpp
from edgetune.export.gguf.model import write_model
from edgetune.export.job import Job, work_folder
from edgetune.export.probes import PROBES, refuse_misread
from edgetune.runtime.errors import ResourceError
from edgetune.runtime.tokenizer import Tokenizer

BASE_DISK_BYTES = 5
"""Bytes of disk per parameter of the base while an adapter is proved: 4 for f32, the rest for a Q4_K_M copy of it."""


class LlamaCppReader:
    """A GGUF model that llama.cpp runs."""

    def __init__(self, model: Path) -> None:
        self._model = model

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read token ids (N,); return logits (N, V) f32."""
        return llamacpp.logits(self._model, None, ids)


class LoraReader:
    """A GGUF adapter that llama.cpp runs on its base in f32. The base's file exists only during each call."""

    def __init__(self, job: Job, lora: Path) -> None:
        self._job, self._lora = job, lora

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read token ids (N,); return logits (N, V) f32."""
        with bare_base(self._job, self._lora.parent) as base:
            return llamacpp.logits(base, self._lora, ids)


def check_ids(job: Job, model: Path) -> None:
    """Raise ModelError if llama.cpp splits any of PROBES into other ids than edgetune does, unless job.force."""
    tokenizer = Tokenizer.load(job.base.folder)
    found = llamacpp.tokenize(model, PROBES)
    wrong = sum(tokenizer.encode(text) != ids for text, ids in zip(PROBES, found, strict=True))
    refuse_misread(job, "llama.cpp", wrong, len(PROBES))


@contextmanager
def bare_base(job: Job, near: Path) -> Iterator[Path]:
    """Write the base without adapter and tokenizer as an f32 GGUF into the export's folder `near`; yield it, then delete it.

    Raises ResourceError where the disk has no room for it and a Q4_K_M copy.
    """
    needed = BASE_DISK_BYTES * job.base.config.parameters
    if shutil.disk_usage(near).free < needed:
        raise ResourceError(
            f"Proving the adapter takes {needed >> 20} MB of temporary files in {near.parent}, and the disk has less free. "
            "Free some space, or type --no-verify."
        )
    with work_folder(near) as folder:
        path = folder / "base.gguf"
        bare = Job(job.base, job.base_name, None, "f32", memory=job.memory)
        write_model(bare, path, "f32", _no_vocabulary)
        yield path


def _no_vocabulary(writer: Any) -> None:
    writer.add_tokenizer_model("no_vocab")
