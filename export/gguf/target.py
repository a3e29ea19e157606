"""GGUF for llama.cpp and what is built on it: a LoRA adapter, or the merged model with its tokenizer and chat template.

The proof runs llama.cpp itself. The adapter's is on the base in f32, written for that moment, so that nothing but the
adapter's own file could be at fault. What users run beneath an adapter is more often a Q4_K_M base: how much of the
adapter's gain is left there is measured and told.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.gguf import llamacpp
from edgetune.export.gguf.adapter import write_adapter
from edgetune.export.gguf.model import GGUF_BYTES, gguf_memory, write_model
from edgetune.export.gguf.vocabulary import read_vocabulary
from edgetune.export.job import OR_NAME_WEIGHTS, Job, Written, work_folder
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime.errors import ModelError, ResourceError
from edgetune.runtime.files import PRIVATE_FILE
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer

ADAPTER_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"
LEAST_KEPT = 0.8
"""The share of an adapter's gain under which a Q4_K_M base is warned of."""
DOCUMENTS, DOCUMENT_TOKENS = 8, 256
"""Texts that the gain is measured on, at most, and their length."""
WRITTEN_DOCUMENTS, WRITTEN_TOKENS = 4, 64
"""The same, where no texts are given and the adapted model writes them."""
LEAST_GAIN = 1e-3
"""Nats a token. Below it the share that is left of a gain is noise."""
PROBES = (
    "The lighthouse keeper wrote it down.",
    "In 2021 we had 12,345 tomatoes; 67 in 2022!",
    "def f(x):\n    if x:\n        return [x**2, 'y']\n\treturn None  # ok\n",
    "Größe, façade, naïve, señor, łódź; Привет, мир",
    "日本語の文章 مرحبا بالعالم บ้าน",
    "emoji 😀👩‍👧🇩🇪 \u00a0\u3000\u200b.",
    "I don't, they'RE wide_words  with   many spaces ",
    "a</s>b<s> <unk> <|eot_id|><|im_end|>\n",
)
"""Texts whose ids must be ours; none begins with a space, to which llama.cpp and sentencepiece add another."""


def peak_memory(job: Job) -> ExportMemory:
    """The adapter alone is tried on a bare base in f32."""
    return ExportMemory([gguf_memory(job), reference_memory(job, GGUF_BYTES)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """adapter.gguf, or model.gguf with the adapter merged into it."""
    check_writer()
    if not job.weights:
        adapter = job.needed_adapter(OR_NAME_WEIGHTS)
        write_adapter(adapter, job.base.config, folder / ADAPTER_FILE)
        if not job.check or importlib.util.find_spec("llama_cpp") is None:
            return Written(ADAPTER_FILE)
        with job.stage("measuring"):
            return _measured_on_q4_k_m(job, folder)
    vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
    return Written(MODEL_FILE, write_model(job, folder / MODEL_FILE, job.weights, vocabulary.add_to))


class LlamaCppReader:
    """A GGUF model in llama.cpp."""

    def __init__(self, model: Path) -> None:
        self._model = model

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        return llamacpp.logits(self._model, None, ids)


class LoraReader:
    """A GGUF adapter in llama.cpp, on its base in f32, which is there while it is asked."""

    def __init__(self, job: Job, lora: Path) -> None:
        self._job, self._lora = job, lora

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        with _bare_base(self._job, self._lora.parent) as base:
            return llamacpp.logits(base, self._lora, ids)


def read(job: Job, folder: Path) -> LlamaCppReader | LoraReader:
    """What was written, in llama.cpp. Raises ModelError for a model whose ids of a text are not ours, unless job.force."""
    if not job.weights:
        return LoraReader(job, folder / ADAPTER_FILE)
    check_ids(job, folder / MODEL_FILE)
    return LlamaCppReader(folder / MODEL_FILE)


def check_ids(job: Job, model: Path) -> None:
    """Raise ModelError where llama.cpp makes other ids of PROBES than edgetune does."""
    tokenizer = Tokenizer.load(job.base.folder)
    found = llamacpp.tokenize(model, PROBES)
    wrong = sum(tokenizer.encode(text) != ids for text, ids in zip(PROBES, found, strict=True))
    if wrong and not job.force:
        raise ModelError(
            f"llama.cpp reads {wrong} of {len(PROBES)} test texts as other tokens than the model was trained on; type "
            "`edgetune export hf`, or --force to write the GGUF all the same."
        )


def check_writer() -> None:
    """Raise ResourceError where the package that writes GGUF is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ResourceError("Writing GGUF needs gguf, which is not installed; type pip install 'edgetune[gguf]'.")


@contextmanager
def _bare_base(job: Job, near: Path) -> Iterator[Path]:
    """The base without its adapter as an f32 GGUF with no tokenizer, within the export's folder `near`, gone afterwards."""
    needed = 5 * job.base.config.parameters  # and a Q4_K_M of it
    if shutil.disk_usage(near).free < needed:
        raise ResourceError(
            f"Proving the adapter takes {needed >> 20} MB of disk beside {near.parent} for a moment, which are not free; free "
            "them, or type --no-verify."
        )
    with work_folder(near) as folder:
        path = folder / "base.gguf"
        bare = Job(job.base, job.base_name, None, "f32", memory=job.memory)
        write_model(bare, path, "f32", _no_vocabulary)
        yield path


def _no_vocabulary(writer: Any) -> None:
    writer.add_tokenizer_model("no_vocab")


def _measured_on_q4_k_m(job: Job, folder: Path) -> Written:
    """What the adapter gains on its own base and on llama.cpp's Q4_K_M of it, in nats a token of the same texts."""
    texts = [list(text[:DOCUMENT_TOKENS]) for text in job.texts if len(text) > 1]
    documents = texts[:: -(-len(texts) // DOCUMENTS)] if texts else _written(job)
    lora = folder / ADAPTER_FILE
    with _bare_base(job, folder) as base:
        small = base.with_name("q4_k_m.gguf")
        small.touch(PRIVATE_FILE)  # llama.cpp writes into the file that is there
        llamacpp.quantize(base, small)
        gain, left = (llamacpp.loss(model, None, documents) - llamacpp.loss(model, lora, documents) for model in (base, small))
    if gain < LEAST_GAIN:
        return Written(
            ADAPTER_FILE,
            (f"The adapter gains {gain:.2g} nats a token on the texts it was measured on: too little to say what a Q4_K_M "
             "base leaves of it.",),
        )  # fmt: skip
    share = left / gain
    notices: tuple[str, ...] = ()
    if share < LEAST_KEPT:
        notices = (f"On a Q4_K_M base llama.cpp keeps {share:.0%} of what the adapter gains; run it on a Q8_0 or F16 base.",)
    return Written(ADAPTER_FILE, notices, (("adapter_gain_kept_on_q4_k_m", share),))


def _written(job: Job) -> list[list[int]]:
    """Texts of the adapted model's own, by which it differs from its base as much as it does at all."""
    model = job.model()
    start = Tokenizer.load(job.base.folder).start_ids or [0]
    room = min(WRITTEN_TOKENS, model.config.max_positions)
    documents = []
    for seed in range(WRITTEN_DOCUMENTS):
        generator = Generator(Runner(model), room)
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        with torch.no_grad():
            documents.append([*start, *generator.generate(start, room - len(start), sampling)])
    return documents


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
