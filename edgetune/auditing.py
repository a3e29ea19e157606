"""Audits an adapter for what it gives away of the notes that it was trained on, by three measures (leaks/).

Extraction and membership inference are measured on the adapter itself. Canaries are invented secrets, which no adapter in use
should learn: a shadow adapter is trained on the notes and on them, with the adapter's own settings, and deleted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.config import SHADOW_MINUTES, DataConfig, TrainConfig
from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.documents.document import Document
from edgetune.documents.lineage import Lineage
from edgetune.home import home, private_folder
from edgetune.leaks import canaries
from edgetune.leaks.canaries import Exposed
from edgetune.leaks.extraction import extraction, suspects
from edgetune.leaks.membership import membership, scores_by_document
from edgetune.leaks.reading import ReadWindow, read_windows
from edgetune.library import adapter_registry as registry
from edgetune.library.kept_adapters import record_audit
from edgetune.library.loading import Base, load_base, open_base
from edgetune.progress import Show, Stages
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.errors import AdapterError, DataError, SettingError
from edgetune.runtime.heap import trim_memory
from edgetune.runtime.runner import Runner
from edgetune.scratch import scratch_folder
from edgetune.training.distributed import SingleProcess
from edgetune.training.leak_evidence import MOST_TOKENS, Leaks
from edgetune.training.private_plan import KEY
from edgetune.training.run_notes import learnt_paths, read_and_split
from edgetune.training.setup import fit_rows, prepare_new
from edgetune.training.step import TrainStep
from edgetune.training.tokenized_notes import write_tokens
from edgetune.weight_forms import form_for_writing


@dataclass(frozen=True)
class Audit:
    """The result of `edgetune audit`. leaking: the paths of the notes of which a passage was extracted, for the terminal alone.

    trained, held_out: numbers of documents of either side. kept: True if the figures were written beside the adapter.
    """

    model: str
    adapter: str
    trained: int
    held_out: int
    figures: dict[str, Any]
    leaking: tuple[str, ...]
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the result, JSON-ready: names, counts and numbers, without paths and text of notes."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "leaking"}


@dataclass(frozen=True)
class _Sides:
    """The documents that an adapter was trained on, and those that it never saw."""

    trained: list[Document]
    held_out: list[Document]


def audit(
    config: TrainConfig,
    adapter: str | None = None,
    minutes: float | None = SHADOW_MINUTES,
    show: Show = lambda event: None,
) -> Audit:
    """Audit an adapter over notes that it was trained on, and write the figures into its edgetune.json.

    config: the notes to read, the user's names in them, the model and the device; everything else is as the adapter was
    trained. adapter: a folder, a name, or None for the current adapter. minutes: longest time of the shadow training; None
    leaves the canaries out. show: receives progress as events.Working. Raises subclasses of EdgetuneError.
    """
    stages, base = Stages(show), open_base(config.model, show)
    name, found = registry.adapter_for(adapter, base[1])
    if found is None:
        raise AdapterError("There is no adapter to audit. Train one (edgetune train notes/), or name one with --adapter.")
    config = fit_rows(as_trained(config, found, name), base[1].config)
    sides = _sides(config, found, name, stages)
    with scratch_folder() as folder:
        leaks, leaking = _leaks(config, base, found, sides, folder, stages)
        trim_memory()
        figures = leaks.figures()
        if minutes is not None:
            figures |= _shadow(config, base, folder, minutes, stages)
    return Audit(
        model=base[0].name,
        adapter=name,
        trained=len(sides.trained),
        held_out=len(sides.held_out),
        figures=figures,
        leaking=leaking,
        kept=_keep(registry.find(adapter, base[1].digest), figures),
    )


def as_trained(config: TrainConfig, adapter: Adapter, name: str) -> TrainConfig:
    """Return the settings that an adapter was trained with, on the notes, model and device of `config`.

    Raises AdapterError where its edgetune.json holds none that can be used.
    """
    stored = adapter.about.get("settings")
    try:
        settings = {key: value for key, value in dict(stored or {}).items() if key in _OF_TRAINING}
        data = {key: value for key, value in dict((stored or {}).get("data") or {}).items() if key in _OF_READING}
        if adapter.about.get(KEY) is not None:
            settings["private"] = _spent(adapter.about[KEY])
        return TrainConfig(**settings, data=dataclasses.replace(config.data, **data), model=config.model, device=config.device)
    except (SettingError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise AdapterError(
            f"The adapter {name} has settings of training that cannot be used. Name another one with --adapter."
        ) from error


def _spent(record: Mapping[str, float]) -> str:
    """Return the value of --private with which one run spends what the runs of an adapter's lineage have spent together."""
    return f"epsilon={record['spent']:.4g},delta={record['delta']:.4g}"


_OF_TRAINING = {field.name for field in dataclasses.fields(TrainConfig)} - {
    "data", "model", "device", "out", "minutes", "until", "from_adapter", "only_new", "memory",
}  # fmt: skip
"""Settings of the adapter's own training that the shadow adapter is trained with."""
_OF_READING = {field.name for field in dataclasses.fields(DataConfig)} - {"notes", "me", "exclude", "left_out"}
"""Settings by which its notes were read."""


def _sides(config: TrainConfig, adapter: Adapter, name: str, stages: Stages) -> _Sides:
    """Read the notes and tell those that the adapter was trained on from those held out. Raises AdapterError and DataError."""
    lineage = Lineage.of_adapter(adapter.about)
    if not lineage.nights:
        raise AdapterError(
            f"The adapter {name} does not say which notes it was trained on, so it cannot be audited. Name one with --adapter "
            "that edgetune trained on this machine."
        )
    reading, split = read_and_split(config, stages.of("reading"), lineage)
    learnt = learnt_paths(reading.documents, lineage)
    trained = [document for document in split.train if document.path in learnt]
    if not trained:
        raise DataError(
            f"The adapter {name} was trained on none of the {len(reading.documents)} notes there as they read today. Name the "
            "folder of notes that it was trained on."
        )
    return _Sides(trained, split.held_out)


def _leaks(
    config: TrainConfig, base: Base, adapter: Adapter, sides: _Sides, folder: Path, stages: Stages
) -> tuple[Leaks, tuple[str, ...]]:
    """Measure extraction and membership; return them with the paths of the notes that leak."""
    form = form_for_writing("auto", base[1], adapter.about)
    loaded = load_base(base, config.device, progress=stages.of("loading"), form=form)
    runner, rows = Runner(loaded.model), config.data.batch_tokens
    progress = stages.of("tokenizing")
    trained, held_out = (
        write_tokens(config, documents, loaded.tokenizer, folder / side, True, progress)
        for side, documents in (("trained", sides.trained), ("held-out", sides.held_out))
    )
    members, others = (EvaluationSet.of(store, config.data.seq_len) for store in (trained, held_out))
    members, others = (windows.limited(MOST_TOKENS) if len(windows.order) else windows for windows in (members, others))

    def read() -> tuple[list[ReadWindow], list[ReadWindow]]:
        first, second = (
            read_windows(runner, windows, rows, stages.of("auditing"), held_out=held_out) for windows in (members, others)
        )
        return first, second

    bare = read()
    adapters.attach(loaded.model, adapter)
    adapted = read()
    found = extraction(adapted[0], [read for read in bare[0] if read.window in suspects(adapted[0])])
    scores = [scores_by_document(*both) for both in zip(adapted, bare, strict=True)]
    return Leaks(found, membership(*scores)), tuple(trained.documents[number].path for number in found.documents)


def _shadow(config: TrainConfig, base: Base, folder: Path, minutes: float, stages: Stages) -> dict[str, Any]:
    """Train a shadow adapter on the notes and on canaries, and return the figures of their exposure. It is not kept.

    That of a private adapter is trained privately too. Since nobody ever sees it, it spends nothing of the privacy ledger.
    """
    seed, made = config.data.seed, canaries.make_canaries(config.data.seed)
    run = prepare_new(config, base, private_folder(folder / "shadow"), stages=stages, also=canaries.inserted(made))
    train_step, progress, ends = TrainStep(run, SingleProcess()), stages.of("shadow training"), time.monotonic() + 60 * minutes
    done = 0
    while done < run.plan.steps and not (done and time.monotonic() >= ends):
        progress(done, run.plan.steps)
        train_step.run(done)
        done += 1
    del train_step
    rows = run.plan.setting.row_tokens
    tokenizer, scored = run.loaded.tokenizer, private_folder(folder) / "canaries"
    found = canaries.exposures(run.runner, tokenizer, made, scored, rows, seed, stages.of("auditing"))
    return {**_exposure_figures(found), "shadow_steps": done, "shadow_steps_planned": run.plan.steps}


def _exposure_figures(found: list[Exposed]) -> dict[str, Any]:
    bits = {f"canary_bits_{exposed.repetitions}": exposed.bits for exposed in found}
    return {
        **{name: value if math.isfinite(value) else None for name, value in bits.items()},
        "canaries": sum(exposed.canaries for exposed in found),
        "canary_largest_bits": math.log2(canaries.CODES),
    }


def _keep(folder: Path | None, figures: dict[str, Any]) -> bool:
    """Write the figures into the record of an adapter in edgetune's own folder; return False for any other adapter."""
    kept = folder is not None and folder.resolve().parent.parent == (home() / "adapters").resolve()
    if folder is None or not kept or not (folder / peft_folder.EDGETUNE_FILE).is_file():
        return False
    record_audit(folder, {name: value for name, value in figures.items() if value is not None})
    return True
