"""Export to GGUF for llama.cpp and what is built on it: a LoRA adapter, or the merged model with tokenizer and chat template.

llama.cpp itself proves the export. It runs an adapter on the base in f32, written for the proof alone, so that only the
adapter's own file can be at fault. Most people run an adapter on a Q4_K_M base: how much of its gain is left there is measured.
A base that was converted from a GGUF file needs no such stand-ins: the adapter is proved and measured on that very file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgetune.export.gguf.adapter import ADAPTER_FILE, write_adapter
from edgetune.export.gguf.model import GGUF_BYTES, gguf_memory, write_model
from edgetune.export.gguf.quantized_base import measure_on_q4_k_m
from edgetune.export.gguf.reader import LlamaCppReader, LoraReader, check_ids
from edgetune.export.gguf.user_file import UserFileReader, bare_logits, measure_on_user_file, reader_memory
from edgetune.export.gguf.vocabulary import read_vocabulary
from edgetune.export.job import OR_NAME_WEIGHTS, Job, Reader, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime.errors import ResourceError

MODEL_FILE = "model.gguf"


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the memory of the export. An adapter alone takes as much, unless it is proved on the user's own file."""
    if job.user_file is not None:
        return ExportMemory([reference_memory(job, GGUF_BYTES)], [reader_memory(job, job.user_file)])
    return ExportMemory([gguf_memory(job), reference_memory(job, GGUF_BYTES)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """Write adapter.gguf if no --weights are given, otherwise model.gguf with the adapter merged into it."""
    check_writer()
    if not job.weights:
        return write_adapter_alone(job, folder)
    vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
    return Written(MODEL_FILE, write_model(job, folder / MODEL_FILE, job.weights, vocabulary.add_to))


def write_adapter_alone(job: Job, folder: Path) -> Written:
    """Write adapter.gguf, and measure its gain in llama.cpp: on the user's own file, else on a Q4_K_M copy of the base.

    Raises ModelError if the user's file splits texts into other ids than edgetune, unless job.force.
    """
    adapter = job.needed_adapter(OR_NAME_WEIGHTS)
    write_adapter(adapter, job.base.config, folder / ADAPTER_FILE)
    if not job.check or importlib.util.find_spec("llama_cpp") is None:
        return Written(ADAPTER_FILE)
    if job.user_file is not None:
        check_ids(job, job.user_file.path)
        return Written(ADAPTER_FILE, *measure_on_user_file(job, job.user_file, folder / ADAPTER_FILE))
    with job.stage("measuring"):
        return measure_on_q4_k_m(job, folder)


def read(job: Job, folder: Path) -> Reader:
    """Open the export with llama.cpp. Raises ModelError if a model makes other ids of texts than edgetune, unless job.force."""
    if job.user_file is not None:
        return UserFileReader(job.user_file, folder / ADAPTER_FILE)
    if not job.weights:
        return LoraReader(job, folder / ADAPTER_FILE)
    check_ids(job, folder / MODEL_FILE)
    return LlamaCppReader(folder / MODEL_FILE)


def commands(job: Job, folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return llama.cpp's command for the user's own file with the adapter; none for a job without such a file."""
    if job.user_file is None:
        return ()
    return (("llama-cli", "-m", str(job.user_file.path), "--lora", str(folder / ADAPTER_FILE)),)


def check_writer() -> None:
    """Raise ResourceError if the Python package that writes GGUF is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ResourceError("Writing GGUF needs gguf, which is not installed; type pip install 'edgetune[gguf]'.")


SPEC = TargetSpec(
    name="gguf",
    weights=("", "f16", "bf16", "q8_0"),
    proved_by="llama.cpp",
    packages=("llama_cpp", "gguf"),
    extra="gguf",
    measured=(MeasuredForm("", by_reader=True),),
    peak_memory=peak_memory,
    write=write,
    read=read,
    on_user_file="",
    bare_logits=bare_logits,
    commands=commands,
)
