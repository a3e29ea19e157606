"""Export for Ollama: the merged model as a GGUF, and a Modelfile with its chat template and stop texts.

`ollama create NAME -f Modelfile` reads both. The grammar is that of Ollama's Modelfile reference (docs.ollama.com).

An adapter alone needs exactly the base that it was trained on, so it is offered only for a base that was converted from a GGUF
file on this machine. Its Modelfile names that file, or Ollama's own name of it. Ollama 0.34.1 removed the instruction ADAPTER
(its pull request 14969), so the merged model stays the default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgetune.export.gguf import target as gguf
from edgetune.export.gguf.adapter import ADAPTER_FILE
from edgetune.export.gguf.model import GGUF_BYTES, gguf_memory, write_model
from edgetune.export.gguf.user_file import bare_logits
from edgetune.export.gguf.vocabulary import CONTROL, Vocabulary, read_vocabulary
from edgetune.export.go_template import Derived, derive
from edgetune.export.job import Job, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime.errors import UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.generation_config import SamplingSettings
from edgetune.runtime.tokenizer import Tokenizer

MODELFILE = "Modelfile"
LAST_WITH_ADAPTERS = "0.34.0"
"""The last version of Ollama that takes adapters."""


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the same as for a whole GGUF model, or for an adapter on the user's own file."""
    if job.user_file is not None:
        return gguf.peak_memory(job)
    return ExportMemory([gguf_memory(job), reference_memory(job, GGUF_BYTES)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """Write model.gguf and the Modelfile; for --weights none, adapter.gguf and a Modelfile that names the user's own file.

    Raises UsageError for --weights none if there is no such file, or no Modelfile can hold its name.
    """
    gguf.check_writer()
    if SPEC.needs_user_file(job.weights):
        return _write_adapter(job, folder)
    vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
    text, notices = _described(job, vocabulary, f"./{gguf.MODEL_FILE}")
    notices += write_model(job, folder / gguf.MODEL_FILE, job.weights, vocabulary.add_to)
    atomic_write(folder / MODELFILE, text)
    return Written(MODELFILE, notices)


def _write_adapter(job: Job, folder: Path) -> Written:
    """Write adapter.gguf and a Modelfile that puts it on the user's own file. A model of Ollama's keeps its own settings."""
    file = job.user_file
    if file is None:
        raise UsageError("--weights none is for a model that came from a GGUF file on this machine; leave it out.")
    base = file.name if file.in_ollama else str(file.path)
    if not _fits(base) or '"' in base or "\n" in base:
        raise UsageError(f"No Modelfile can hold the name {file.path}; give the file a plain one, or leave --weights out.")
    notices: tuple[str, ...] = (
        f"Ollama takes adapters up to version {LAST_WITH_ADAPTERS}; for a newer one, leave --weights out.",
    )
    if file.in_ollama:
        text = modelfile(None, [], SamplingSettings(), base, ADAPTER_FILE)
    else:
        vocabulary = read_vocabulary(job.base.folder, job.base.config.vocab_size)
        text, more = _described(job, vocabulary, base, ADAPTER_FILE)
        here = (
            f"This folder is for this machine: its Modelfile holds the path of your {file.name}, which `ollama create` copies "
            "into Ollama's own folder."
        )
        notices += (here, *more)
    written = gguf.write_adapter_alone(job, folder)
    atomic_write(folder / MODELFILE, text)
    return Written(MODELFILE, notices + written.notices, written.facts)


def _described(job: Job, vocabulary: Vocabulary, base: str, adapter: str = "") -> tuple[str, tuple[str, ...]]:
    """Return the Modelfile of a base that Ollama knows nothing of yet, and notices about its template.

    Ollama puts the vocabulary's bos before every text if the GGUF says so, as it does if training put it there. If the chat
    template writes it too, it is left out of the Go template.
    """
    tokenizer = Tokenizer.load(job.base.folder)
    derived = None
    notices: tuple[str, ...] = ()
    if tokenizer.has_template:
        bos = vocabulary.tokens[vocabulary.ids["bos"]] if "bos" in vocabulary.ids else ""
        derived = derive(tokenizer.render_chat, bos if vocabulary.adds_bos else "")
        notices = _notices(derived, vocabulary.template or "")
    stop = stops(vocabulary, tokenizer.eos_ids, derived)
    return modelfile(derived, stop, vocabulary.sampling, base, adapter), notices


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


def modelfile(
    derived: Derived | None,
    stop: Sequence[str],
    sampling: SamplingSettings,
    base: str = f"./{gguf.MODEL_FILE}",
    adapter: str = "",
) -> str:
    """Return the text of the Modelfile. sampling: the model's own settings, which become Ollama's defaults.

    base: a file, or the name of a model that Ollama has. adapter: the name of the adapter's file beside the Modelfile, if any.
    """
    lines = ["# Type: ollama create NAME -f Modelfile", f"FROM {base}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
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


def commands(job: Job, folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return Ollama's commands that make the model and run it, under the folder's name."""
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip(".-_") or "mine"
    return (("ollama", "create", name, "-f", str(folder / MODELFILE)), ("ollama", "run", name))


SPEC = TargetSpec(
    name="ollama",
    weights=("q8_0", "f16", "bf16", "none"),
    proved_by=gguf.SPEC.proved_by,
    packages=gguf.SPEC.packages,
    extra=gguf.SPEC.extra,
    peak_memory=peak_memory,
    write=write,
    read=gguf.read,
    measured=(MeasuredForm("none", by_reader=True),),
    on_user_file="none",
    bare_logits=bare_logits,
    commands=commands,
)
