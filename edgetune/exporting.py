"""An adapter to where it is used: resolve names, write, prove, and only then let the export appear.

>>> edgetune.export_adapter("gguf", model="demo", out="my-model")  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import edgetune
from edgetune.documents.reading import read_notes
from edgetune.events import Event, Exporting
from edgetune.export import verify
from edgetune.export.targets import (
    Job,
    Target,
    Written,
    check_adapter_as,
    check_memory,
    check_reader,
    check_texts,
    check_weights,
    load_target,
    proved_by,
    reference,
    seal,
)
from edgetune.home import expand
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import open_base
from edgetune.lock import lock_output
from edgetune.runtime.adapter import check_fits, read_json
from edgetune.runtime.errors import AdapterError, DataError, EdgetuneError, ModelError, UsageError
from edgetune.runtime.files import atomic_folder, atomic_write, check_place, mend
from edgetune.runtime.memory_meter import MemoryMeter
from edgetune.runtime.tokenizer import Tokenizer

WARNING = "What it was trained on can be drawn from this export: give it only to those you would give the notes."


@dataclass(frozen=True)
class Exported:
    """What was written and how far it agrees with the reference; None where it was not verified."""

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
    """Write an adapter, or the model it makes of its base, for one of export.target's TARGETS.

    model and adapter: as the command line takes them. out: a folder; None is "<adapter>-<target>" here. weights: as the
    target has them; None is its default. texts: files and folders to measure what rounding costs on, for forms that do measure.
    check: prove it with the target's own reader, which must be installed then. show: told how far it is, by events.Exporting.
    Raises EdgetuneError's children; nothing is left behind then, and what was at `out` is still there.
    """
    module = load_target(target)
    form = check_weights(target, module, weights)
    check_adapter_as(target, module, adapter_as)
    if texts:
        check_texts(target, module, form, adapter_as, check)
    if check:
        check_reader(target, module, form)
    choice, base = open_base(model)
    name, own = registry.adapter_for(adapter, base)
    if own is not None:
        check_fits(own, base.config)
    folder = _free_folder(expand(f"{name}-{target}" if out is None else str(out)), target)
    tokenizer, begun = Tokenizer.load(choice.path), time.monotonic()
    documents = _documents(tokenizer, texts) if texts else []
    progress = _Events(show, begun)
    job = Job(base, _public(choice.name), own, form, adapter_as, memory, documents, force, check, progress)
    check_memory(module, job)
    with lock_output(folder), MemoryMeter(base.files) as meter:
        mend(folder)
        with atomic_folder(folder) as temporary:
            written, agreement, bound = _write(target, module, job, temporary, _tokens(tokenizer, verify.PROMPT))
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
            peak = meter.peak()
    proved = agreement is not None and agreement.holds(bound)
    kept = () if agreement is None or proved else (_out_of_bounds(target, agreement, bound, "kept by --force"),)
    return Exported(
        target=target,
        model=choice.name,
        adapter=name,
        path=str(folder / written.opens),
        bytes=size,
        verified=proved,
        proved_by=proved_by(module, form),
        max_logit_difference=None if agreement is None else agreement.max_logit_difference,
        mean_logit_difference=None if agreement is None else agreement.mean_logit_difference,
        kl=None if agreement is None else agreement.kl,
        greedy_match=None if agreement is None else agreement.greedy_match,
        seconds=time.monotonic() - begun,
        peak_memory_bytes=peak,
        notices=(*kept, *written.notices, *((WARNING,) if own is not None else ())),
        facts=dict(written.facts),
    )


def _documents(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[list[int]]:
    """The token ids of each text. Raises DataError where none is long enough for a token to follow another."""
    found = [ids for document in read_notes(texts).documents if len(ids := _tokens(tokenizer, document.text)) > 1]
    if not found:
        raise DataError("No text of --texts is longer than a token: nothing can be measured on them; name others.")
    return found


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.start_ids, *tokenizer.encode(text)]


def _write(
    target: str, module: Target, job: Job, folder: Path, prompt: list[int]
) -> tuple[Written, verify.Agreement | None, verify.Bound]:
    """All that the folder is to hold, how far it agrees with the reference where that is to be checked, and how far it should.

    Raises ModelError where it does not, unless the job insists.
    """
    written = module.write(job, folder)
    usual = verify.BOUNDS[target, job.weights]
    with job.stage("measuring"):
        expected = verify.golden(job, prompt, reference(module, job, folder), usual.rounds)
    bound = usual.of(expected)
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    about = {
        "edgetune": edgetune.__version__,
        "target": target,
        "weights": job.weights,
        "base": job.base.digest,
        "files": files,
        "bounds_for": proved_by(module, job.weights),
    }
    atomic_write(folder / verify.GOLDEN_FILE, verify.golden_json(expected, bound, about))
    seal(module, folder)
    if not job.check:
        return written, None, bound
    with job.stage("proving"):
        agreement = _prove(target, module, job, folder, expected, bound)
    if not agreement.holds(bound) and not job.force:
        raise ModelError(f"{_out_of_bounds(target, agreement, bound, 'not kept')} Type --force to keep it all the same.")
    return written, agreement, bound


class _Events:
    """A Job's progress as events: each stage's begin and end, and every whole percent between."""

    def __init__(self, show: Callable[[Event], None], begun: float) -> None:
        self._show, self._begun = show, begun
        self._last = ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = (stage, done * 100 // max(total, 1))
        if now != self._last:
            self._last = now
            self._show(Exporting(stage, done, total, time.monotonic() - self._begun))


def _prove(
    target: str, module: Target, job: Job, folder: Path, expected: verify.Golden, bound: verify.Bound
) -> verify.Agreement:
    """Open and compare. Whatever the other program says against a folder becomes one sentence."""
    try:
        return verify.compare(expected, module.read(job, folder), bound)
    except (EdgetuneError, MemoryError):
        raise
    except Exception as error:
        said, reader = " ".join(str(error).split())[:300], proved_by(module, job.weights)
        raise ModelError(
            f"{reader} does not open the export to {target} ({type(error).__name__}: {said}), so it was not kept; "
            "type --no-verify to write it unproved."
        ) from error


def _free_folder(folder: Path, target: str) -> Path:
    """`folder` in full, if nothing is there or an earlier export to the same target and no more, which is then replaced.

    Raises UsageError for one where anything of somebody else's would go.
    """
    if folder.suffix in (".gguf", ".mlpackage", ".safetensors"):
        raise UsageError(f"--out {folder} names a file; expected a folder, which will hold it: --out {folder.with_suffix('')}.")
    folder = folder.resolve()
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise UsageError(f"--out {folder} is where you are; name a folder that the export may be: --out {folder / target}.")
    check_place(folder)
    try:
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be read ({error.strerror}); name another folder.") from error
    try:
        earlier = read_json(folder / verify.GOLDEN_FILE) if folder.is_dir() else {}
    except AdapterError:
        earlier = {}
    ours = {folder / str(name) for name in earlier.get("files", ())} | {folder / verify.GOLDEN_FILE}
    stranger = next((path for path in found if path not in ours), None)
    if earlier.get("target") != target or stranger is not None:
        what = f"is no export to {target}" if stranger is None else f"holds {stranger.name}, which is of no export to {target}"
        raise UsageError(f"{folder} is there already and {what}; name another --out folder.")
    return folder


def _out_of_bounds(target: str, found: verify.Agreement, bound: verify.Bound, fate: str) -> str:
    return f"The export to {target} does not agree with edgetune's own model and was {fate}: {'; '.join(found.faults(bound))}."


def _public(model: str) -> str:
    """A model's name without the folders above it, which tell whose it is."""
    return Path(model).name if Path(model).is_absolute() else model
