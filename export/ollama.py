"""For Ollama: the merged model as a GGUF, and a Modelfile that names it, its template and where it stops.

`ollama create NAME -f Modelfile` takes both. The grammar is that of Ollama's Modelfile reference (docs.ollama.com). The
adapter alone is not offered: Ollama's ADAPTER wants the very base it was trained on, which its own library has not.
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
from edgetune.runtime.tokenizer import Tokenizer

MODELFILE = "Modelfile"


def peak_memory(job: Job) -> ExportMemory:
    """As a GGUF model."""
    return ExportMemory([gguf_memory(job), reference_memory(job, GGUF_BYTES)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """model.gguf and the Modelfile.

    Ollama begins every text with the vocabulary's bos where the GGUF says so. A model whose template writes none was
    trained without it, so that the GGUF says no; where the template writes one, Ollama's stands for it.
    """
    gguf.check_writer()
    tokenizer = Tokenizer.load(job.base.folder)
    vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
    derived = None
    notices: tuple[str, ...] = ()
    if tokenizer.has_template:
        bos = vocabulary.tokens[vocabulary.ids["bos"]] if "bos" in vocabulary.ids else ""
        begins = tokenizer.render_chat([{"role": "user", "content": "?"}]).startswith(bos) if bos else False
        vocabulary.adds_bos = vocabulary.adds_bos and begins
        derived = derive(tokenizer.render_chat, bos if vocabulary.adds_bos else "")
        notices = _notices(derived, vocabulary.template or "")
    notices += write_model(job, folder / gguf.MODEL_FILE, job.weights, vocabulary.add_to)
    atomic_write(folder / MODELFILE, modelfile(derived, stops(vocabulary, tokenizer.eos_ids, derived)))
    return Written(MODELFILE, notices)


def _notices(derived: Derived | None, jinja: str) -> tuple[str, ...]:
    if derived is None or not _fits(derived.source):
        return (
            "The model's chat template is of a form that has no Go template here, so the Modelfile has no TEMPLATE and "
            "Ollama guesses one from the GGUF: compare its answers with `edgetune ask`.",
        )
    notices = []
    if not derived.takes_system:
        notices.append("The model's chat template takes no system message: Ollama drops what SYSTEM says.")
    if "strftime_now" in jinja:
        notices.append("The model's chat template writes the day's date; the Modelfile has today's: change it as you like.")
    return tuple(notices)


def modelfile(derived: Derived | None, stop: Sequence[str]) -> str:
    """The Modelfile's text."""
    lines = ["# Type: ollama create NAME -f Modelfile", f"FROM ./{gguf.MODEL_FILE}"]
    if derived is not None and _fits(derived.source):
        lines.append(f'TEMPLATE """{derived.source}"""')
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    return "\n".join(lines) + "\n"


def _fits(text: str) -> bool:
    """Whether a Modelfile's triple quotes hold it: they know no escape, and signs that print nothing are dropped."""
    return '"""' not in text and not text.endswith('"') and all(sign.isprintable() or sign in "\n\t" for sign in text)


def stops(vocabulary: Vocabulary, eos_ids: Sequence[int], derived: Derived | None) -> list[str]:
    """Texts at which Ollama ends an answer: the model's own ends, and what its template writes before the next question.

    The latter for models that were never taught to end, and would go on with the user's part.
    """
    rows = len(vocabulary.tokens)
    found = [vocabulary.tokens[id] for id in eos_ids if id < rows]
    if derived is not None:
        spelled = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL and token]
        pattern = "|".join(re.escape(token) for token in sorted(spelled, key=len, reverse=True))
        parts = re.split(f"({pattern})", derived.between) if pattern else [derived.between]
        begins = vocabulary.tokens[vocabulary.ids["bos"]] if "bos" in vocabulary.ids else None
        found += [text.strip() for n, text in enumerate(parts) if n % 2 == 1 and text != begins]
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
