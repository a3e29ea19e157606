"""Export for Ollama: the merged model as a GGUF, and a Modelfile with its chat template and stop texts.

`ollama create NAME -f Modelfile` reads both. The grammar is that of Ollama's Modelfile reference (docs.ollama.com). The adapter
alone is not offered: Ollama's ADAPTER needs exactly the base that it was trained on, which Ollama's library does not have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgetune.export.gguf import target as gguf
from edgetune.export.gguf.model import GGUF_BYTES, gguf_memory, write_model
from edgetune.export.gguf.vocabulary import CONTROL, Vocabulary, read_vocabulary
from edgetune.export.go_template import Derived, derive
from edgetune.export.job import Job, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.runtime.files import atomic_write
from edgetune.runtime.generation_config import SamplingSettings
from edgetune.runtime.tokenizer import Tokenizer

MODELFILE = "Modelfile"


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the same as for a whole GGUF model."""
    return ExportMemory([gguf_memory(job), reference_memory(job, GGUF_BYTES)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """Write model.gguf and the Modelfile.

    Ollama puts the vocabulary's bos before every text if the GGUF says so, as it does if training put it there. If the chat
    template writes it too, it is left out of the Go template.
    """
    gguf.check_writer()
    tokenizer = Tokenizer.load(job.base.folder)
    vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
    derived = None
    notices: tuple[str, ...] = ()
    if tokenizer.has_template:
        bos = vocabulary.tokens[vocabulary.ids["bos"]] if "bos" in vocabulary.ids else ""
        derived = derive(tokenizer.render_chat, bos if vocabulary.adds_bos else "")
        notices = _notices(derived, vocabulary.template or "")
    notices += write_model(job, folder / gguf.MODEL_FILE, job.weights, vocabulary.add_to)
    stop = stops(vocabulary, tokenizer.eos_ids, derived)
    atomic_write(folder / MODELFILE, modelfile(derived, stop, vocabulary.sampling))
    return Written(MODELFILE, notices)


def _notices(derived: Derived | None, jinja: str) -> tuple[str, ...]:
    """Return what the user should know about the Modelfile's template. jinja: source of the model's own."""
    if derived is None or not _fits(derived.source):
        return (
            "The model's chat template cannot be converted to Ollama's format, so the Modelfile has no TEMPLATE and Ollama "
            "guesses one from the GGUF: compare its answers with those of `edgetune ask`.",
        )
    notices = []
    if not derived.takes_system:
        notices.append("The model's chat template takes no system message: Ollama will ignore SYSTEM.")
    if "strftime_now" in jinja:
        notices.append("The model's chat template inserts the current date; the Modelfile has today's, which you can edit.")
    return tuple(notices)


def modelfile(derived: Derived | None, stop: Sequence[str], sampling: SamplingSettings) -> str:
    """Return the text of the Modelfile. sampling: the model's own settings, which become Ollama's defaults."""
    lines = ["# Type: ollama create NAME -f Modelfile", f"FROM ./{gguf.MODEL_FILE}"]
    if derived is not None and _fits(derived.source):
        lines.append(f'TEMPLATE """{derived.source}"""')
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    parameters = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repeat_penalty": sampling.repetition_penalty,
    }
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items() if value is not None]
    return "\n".join(lines) + "\n"


def _fits(text: str) -> bool:
    """Return True if a Modelfile's triple quotes can contain the text: they know no escape and drop unprintable characters."""
    return '"""' not in text and not text.endswith('"') and all(char.isprintable() or char in "\n\t" for char in text)


def stops(vocabulary: Vocabulary, eos_ids: Sequence[int], derived: Derived | None) -> list[str]:
    """Return the texts at which Ollama ends an answer: the eos tokens, and what the template writes before the next question.

    The latter stops models that were never trained to end an answer and would continue with the user's turn.
    """
    rows = len(vocabulary.tokens)
    found = [vocabulary.tokens[id] for id in eos_ids if id < rows]
    if derived is not None:
        control = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL and token]
        pattern = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True))
        parts = re.split(f"({pattern})", derived.between) if pattern else [derived.between]
        bos = vocabulary.tokens[vocabulary.ids["bos"]] if "bos" in vocabulary.ids else None
        # re.split with a group returns text, control token, text, …; plain text stops only if it has a sign such as "###".
        found += [text.strip() for n, text in enumerate(parts) if n % 2 == 1 and text != bos]
        found += [text.strip() for n, text in enumerate(parts) if n % 2 == 0 and re.search(r"\w\W|\W\w", text.strip())]
    return [text for text in dict.fromkeys(found) if text and '"' not in text and text.isprintable()]


SPEC = TargetSpec(
    name="ollama",
    weights=("q8_0", "f16", "bf16"),
    proved_by=gguf.SPEC.proved_by,
    packages=gguf.SPEC.packages,
    extra=gguf.SPEC.extra,
    peak_memory=peak_memory,
    write=write,
    read=gguf.read,
)
