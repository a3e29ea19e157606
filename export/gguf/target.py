"""Export to GGUF for llama.cpp and what is built on it: a LoRA adapter, or the merged model with tokenizer and chat template.

llama.cpp itself proves the export. It runs an adapter on the base in f32, written for the proof alone, so that only the
adapter's own file can be at fault. Most people run an adapter on a Q4_K_M base: how much of its gain is left there is measured.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgetune.export.gguf.adapter import ADAPTER_FILE, write_adapter
from edgetune.export.gguf.model import GGUF_BYTES, gguf_memory, write_model
from edgetune.export.gguf.quantized_base import measure_on_q4_k_m
from edgetune.export.gguf.reader import LlamaCppReader, LoraReader, check_ids
from edgetune.export.gguf.vocabulary import read_vocabulary
from edgetune.export.job import OR_NAME_WEIGHTS, Job, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime.errors import ResourceError

MODEL_FILE = "model.gguf"


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the memory of the export. An adapter alone takes as much: it is proved on its base in f32."""
    return ExportMemory([gguf_memory(job), reference_memory(job, GGUF_BYTES)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """Write adapter.gguf if no --weights are given, otherwise model.gguf with the adapter merged into it."""
    check_writer()
    if not job.weights:
        adapter = job.needed_adapter(OR_NAME_WEIGHTS)
        write_adapter(adapter, job.base.config, folder / ADAPTER_FILE)
        if not job.check or importlib.util.find_spec("llama_cpp") is None:
            return Written(ADAPTER_FILE)
        with job.stage("measuring"):
            return measure_on_q4_k_m(job, folder)
    vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
    return Written(MODEL_FILE, write_model(job, folder / MODEL_FILE, job.weights, vocabulary.add_to))


def read(job: Job, folder: Path) -> LlamaCppReader | LoraReader:
    """Open the export with llama.cpp. Raises ModelError if it splits texts into other ids than edgetune, unless job.force."""
    if not job.weights:
        return LoraReader(job, folder / ADAPTER_FILE)
    check_ids(job, folder / MODEL_FILE)
    return LlamaCppReader(folder / MODEL_FILE)


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
)
