"""Exports an adapter for another program: resolves names, writes, proves, and only then publishes the folder.

>>> edgetune.export_adapter("gguf", model="demo", out="my-model")  # doctest: +SKIP
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgetune
from edgetune.conversion.origin import Origin
from edgetune.documents.reading import read_notes
from edgetune.events import Event
from edgetune.export import verify
from edgetune.export.job import Job, UserFile, Written
from edgetune.export.memory import check_memory
from edgetune.export.targets import TargetSpec, check_adapter_as, check_reader, check_texts, check_weights, load_target
from edgetune.home import expand
from edgetune.library import adapter_registry as registry
from edgetune.library.adapter_notices import adapter_notices
from edgetune.library.exports_made import remember_export
from edgetune.library.loading import load_tokenizer, open_base
from edgetune.lock import lock_output
from edgetune.progress import Stages
from edgetune.runtime.adapter import check_fits
from edgetune.runtime.errors import DataError, EdgetuneError, ModelError, SettingError, UsageError, out_of_memory
from edgetune.runtime.files import atomic_folder, atomic_write, check_place, mend
from edgetune.runtime.json_file import read_object
from edgetune.runtime.memory_meter import MemoryMeter
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.runtime.untrusted_file import EXPORT_RECORD

WARNING = "The notes that were trained on can be extracted from this export: share it only with people who may read them."
"""Notice that comes with every export that contains an adapter."""
FILE_SUFFIXES = (".gguf", ".mlpackage", ".safetensors")
"""Endings by which --out is taken for a file's name; an export is always a folder."""
QUOTED_ERROR = 300
"""Upper bound on the characters of another program's error message that are quoted in ours. Chosen by hand."""


@dataclass(frozen=True)
class Exported:
    """The result of an export: where it is, how large, and how far it agrees with edgetune's own model.

    bytes: size of all files. verified: the target's reader opened it and every figure is within its bound. The four figures
    of agreement (logits, KL in nats, greedy text) are None if nothing was verified. facts: what the target measured, by name.
    commands: what to type to run the export, if another program's command can.
    """

    target: str
    model: str
    adapter: str
    path: str
    bytes: int
    verified: bool
    proved_by: str
    max_logit_difference: float | None
    mean_logit_difference: float | None
    kl: float | None
    greedy_match: bool | None
    seconds: float
    peak_memory_bytes: int
    notices: tuple[str, ...]
    facts: dict[str, float]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class _Outcome:
    """The files a target wrote and how they compare with the reference; `agreement` is None if that was not checked."""

    written: Written
    agreement: verify.Agreement | None
    bound: verify.Bound

    @property
    def proved(self) -> bool:
        return self.agreement is not None and self.agreement.holds(self.bound)


def export_adapter(
    target: str,
    model: str | None = None,
    adapter: str | None = None,
    out: Path | str | None = None,
    weights: str | None = None,
    adapter_as: str | None = None,
    texts: tuple[str, ...] = (),
    memory: int | None = None,
    check: bool = True,
    force: bool = False,
    show: Callable[[Event], None] = lambda event: None,
) -> Exported:
    """Export an adapter, or its base with the adapter merged in, to one of export.targets.TARGETS.

    model and adapter: as on the command line. out: a folder; None is "<adapter>-<target>" in the current folder. weights: a
    form of the weights that the target offers; None is its default. texts: files and folders on which to measure what rounding
    costs, for forms that measure it. memory: limit in bytes. check: prove the export with the target's own reader, which must
    then be installed. force: write the export even if it fails a check. show: receives progress as events.Working.

    Raises a subclass of EdgetuneError; nothing new is left behind then, and an earlier export at `out` stays as it was.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise SettingError(f"memory is {memory!r}; expected a number of bytes, at least 1.")
    spec = load_target(target)
    weights = _check_options(spec, weights, adapter_as, texts, check)
    choice, base = open_base(model, show)
    base.refuse_inf_and_nan(base.long_floats(linears=False))
    adapter_name, loaded = registry.adapter_for(adapter, base)
    if loaded is not None:
        check_fits(loaded, base.config)
    user_file, file_notices = _user_file(spec, weights, choice.path)
    folder = _output_folder(expand(f"{adapter_name}-{target}" if out is None else str(out)), target)
    tokenizer, started = load_tokenizer(choice), time.monotonic()
    documents = _documents(tokenizer, texts) if texts else []
    progress = Stages(show, quiet=0.0, pause=0.0)
    name = choice.public_name
    job = Job(base, name, loaded, weights, adapter_as, memory, documents, force, check, progress, tokenizer.start, user_file)
    check_memory(spec.peak_memory, job)
    outcome, size, peak = _publish(spec, job, folder, tokenizer.prompt_ids(verify.PROMPT), f"{base.digest[:12]}/{adapter_name}")
    return Exported(
        target=target,
        model=choice.name,
        adapter=adapter_name,
        path=str(folder / outcome.written.opens),
        bytes=size,
        verified=outcome.proved,
        proved_by=spec.reader_name(weights),
        **_figures(outcome.agreement),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak,
        notices=(
            *file_notices,
            *_notices(spec, outcome),
            *_start_notice(tokenizer),
            *adapter_notices(adapter, loaded, base, tokenizer),
            *((WARNING,) if loaded is not None else ()),
        ),
        facts={**dict(outcome.written.facts), **_share_applied(outcome.agreement)},
        commands=tuple(shlex.join(words) for words in spec.commands(job, folder)),
    )


def _user_file(spec: TargetSpec, weights: str, model: Path) -> tuple[UserFile | None, tuple[str, ...]]:
    """Return the GGUF file that the model was converted from, if this form of the export runs on it, and notices about it.

    Raises UsageError for a form that needs the file where there is none, or none that is still the same.
    """
    origin = Origin.read(model)
    if origin is None and not spec.needs_user_file(weights):
        return None, ()
    typed = f"`edgetune export {spec.name} --weights {weights}` writes an adapter for the GGUF file that a model came from"
    if origin is None:
        raise UsageError(f"{typed}, and this model is not from one; leave --weights out.")
    if weights != spec.on_user_file:
        shared = spec.on_user_file is not None
        return None, ((_second_copy(origin),) if shared else ())
    gone = origin.why_gone()
    if gone is None:
        return UserFile(Path(origin.path), origin.public_name, origin.quantisation, origin.bytes, origin.in_ollama), ()
    if spec.needs_user_file(weights):
        raise UsageError(f"{typed}, and that cannot be used: {gone.rstrip('.')}. Put it back, or leave --weights out.")
    return None, (f"Your own GGUF file cannot be used, so the export goes on without it: {gone}",)


def _second_copy(origin: Origin) -> str:
    return (
        f"This is a second copy of the model. llama.cpp runs the adapter on your own {origin.public_name}: "
        "type `edgetune export gguf`."
    )


def _share_applied(agreement: verify.Agreement | None) -> dict[str, float]:
    """Return the share of the adapter's effect that arrives on the user's file, by its name among the facts."""
    return {} if agreement is None or agreement.applied is None else {"adapter_effect_applied": agreement.applied}


def _check_options(spec: TargetSpec, weights: str | None, adapter_as: str | None, texts: tuple[str, ...], check: bool) -> str:
    """Raise if the target lacks an option or its reader is missing; return the form of the weights."""
    form = check_weights(spec, weights)
    check_adapter_as(spec, adapter_as)
    if texts:
        check_texts(spec, form, adapter_as, check)
    if check:
        check_reader(spec, form)
    return form


def _figures(agreement: verify.Agreement | None) -> dict[str, Any]:
    """Return the figures of an agreement by their names in Exported, each of them None without one."""
    names = ("max_logit_difference", "mean_logit_difference", "kl", "greedy_match")
    return {name: None if agreement is None else getattr(agreement, name) for name in names}


def _notices(spec: TargetSpec, outcome: _Outcome) -> tuple[str, ...]:
    """Return the sentences for the user about the export itself: a failed proof first, then the target's own."""
    failed = outcome.agreement is not None and not outcome.proved
    return (
        *((_disagreement(spec, outcome, "kept because of --force"),) if failed else ()),
        *outcome.written.notices,
    )


def _start_notice(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return a notice if notes began with a token that other programs do not put before a text by themselves."""
    if not tokenizer.start.text or tokenizer.start.adds_bos:
        return ()
    return (
        f"In training, notes began with {tokenizer.start_text}, which other programs do not add: put it before a text to "
        "continue. Chats begin as the chat template writes them.",
    )


def _documents(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[list[int]]:
    """Return the token ids of each text. Raises DataError if every text is too short to predict a token of it."""
    documents = [ids for document in read_notes(texts).documents if len(ids := tokenizer.prompt_ids(document.text)) > 1]
    if not documents:
        raise DataError("No text in --texts is longer than one token, so nothing can be measured; name other texts.")
    return documents


def _publish(spec: TargetSpec, job: Job, folder: Path, prompt: list[int], adapter: str) -> tuple[_Outcome, int, int]:
    """Write and prove the export in a temporary folder, then move it to `folder`; return size and peak memory in bytes too.

    adapter: what the list of exports calls the adapter (library/exports_made.py).
    """
    with lock_output(folder), MemoryMeter(job.base.files) as meter:
        mend(folder)
        remember_export(folder, adapter)
        with atomic_folder(folder) as temporary:
            outcome = _write_and_prove(spec, job, temporary, prompt)
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
            return outcome, size, meter.peak()


def _write_and_prove(spec: TargetSpec, job: Job, folder: Path, prompt: list[int]) -> _Outcome:
    """Fill the folder, golden.json included, and compare it with the reference model if job.check says so.

    Raises ModelError if they do not agree, unless job.force.
    """
    written = spec.write(job, folder)
    form_bound = verify.BOUNDS[spec.name, job.weights]
    with job.stage("measuring"):
        expected = verify.golden(job, prompt, spec.reference(job, folder), form_bound.rounds)
        if job.check:
            expected = expected.beside(spec.bare_logits(job, expected.ids))
    bound = form_bound.of(expected)
    atomic_write(folder / verify.GOLDEN_FILE, verify.golden_json(expected, bound, _export_record(spec, job, folder)))
    spec.seal(folder)
    if not job.check:
        return _Outcome(written, None, bound)
    with job.stage("proving"):
        outcome = _Outcome(written, _prove(spec, job, folder, expected, bound), bound)
    if not outcome.proved and not job.force:
        raise ModelError(f"{_disagreement(spec, outcome, 'discarded')} Type --force to keep it anyway.")
    return outcome


def _export_record(spec: TargetSpec, job: Job, folder: Path) -> dict[str, Any]:
    """Return what golden.json says about the export itself; the list of files is what a later export may replace."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "edgetune": edgetune.__version__,
        "target": spec.name,
        "weights": job.weights,
        "base": job.base.digest,
        "start_ids": list(job.start.text),
        "chat_start_ids": list(job.start.chat),
        "files": files,
        "bounds_for": spec.reader_name(job.weights),
    }


def _prove(spec: TargetSpec, job: Job, folder: Path, expected: verify.Golden, bound: verify.Bound) -> verify.Agreement:
    """Open the export with the target's reader and compare it. Turns any error of the other program into one sentence."""
    try:
        return verify.compare(expected, spec.read(job, folder), bound)
    except EdgetuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        message, reader = " ".join(str(error).split())[:QUOTED_ERROR], spec.reader_name(job.weights)
        raise ModelError(
            f"{reader} cannot open the export to {spec.name} ({type(error).__name__}: {message}), so it was discarded; "
            "type --no-verify to write it unproved."
        ) from error


def _disagreement(spec: TargetSpec, outcome: _Outcome, fate: str) -> str:
    """Say which figures are out of bounds and what became of the export."""
    assert outcome.agreement is not None
    faults = "; ".join(outcome.agreement.faults(outcome.bound))
    return f"The export to {spec.name} does not agree with edgetune's own model and was {fate}: {faults}."


def _output_folder(folder: Path, target: str) -> Path:
    """Return `folder` as an absolute path that may be written: free, or holding nothing but an earlier export to `target`.

    Raises UsageError for a place that cannot be written or that holds any file of someone else's.
    """
    if folder.suffix in FILE_SUFFIXES:
        raise UsageError(
            f"--out {folder} looks like a file name; expected a folder to write into: type --out {folder.with_suffix('')}."
        )
    folder = folder.resolve()
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise UsageError(
            f"--out {folder} is the current folder or contains it; name a folder of its own: type --out {folder / target}."
        )
    check_place(folder)
    try:
        occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if occupied and folder.is_dir() else []
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be read ({error.strerror}); name another folder.") from error
    if occupied:
        _check_replaceable(folder, found, target)
    return folder


def _check_replaceable(folder: Path, found: list[Path], target: str) -> None:
    """Raise UsageError unless golden.json lists every file in `folder` as part of an earlier export to `target`."""
    try:
        earlier = read_object(folder / verify.GOLDEN_FILE, EXPORT_RECORD) if folder.is_dir() else {}
    except ModelError:
        earlier = {}
    exported = {folder / str(name) for name in earlier.get("files", ())} | {folder / verify.GOLDEN_FILE}
    foreign = next((path for path in found if path not in exported), None)
    if foreign is not None:
        raise UsageError(
            f"{folder} already exists and contains {foreign.name}, which is not part of an export to {target}; "
            "name another --out folder."
        )
    if earlier.get("target") != target:
        raise UsageError(f"{folder} already exists and is not an export to {target}; name another --out folder.")
