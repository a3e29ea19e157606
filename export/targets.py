"""List the export targets, and check the options of the command line against what a target offers.

Each target is described by one TargetSpec, the SPEC of its module. The caller (edgetune/exporting.py) gives `write` a private
folder, and moves it to its final name only once it is complete and proved.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from edgetune.export.job import Job, Reader, Written
from edgetune.export.memory import ExportMemory
from edgetune.runtime.errors import ResourceError, SettingError
from edgetune.runtime.model import Llama

_MODULES = {
    "peft": "edgetune.export.peft",
    "hf": "edgetune.export.hf",
    "mlx": "edgetune.export.mlx.target",
    "gguf": "edgetune.export.gguf.target",
    "ollama": "edgetune.export.ollama",
    "coreml": "edgetune.export.coreml.target",
    "mps": "edgetune.export.mps",
}
TARGETS = tuple(_MODULES)
"""Names of the targets, as typed after `edgetune export`."""
_SYNONYMS = {"fp16": "f16", "f16": "fp16"}
"""Two spellings of the same form of the weights; a target's own spelling is used."""


@dataclass(frozen=True)
class MeasuredForm:
    """A form of an export whose `write` measures, on Job.texts, how much of the model or adapter is left.

    adapter_as: the only --adapter-as for which this is true, None for all of them. by_reader: the target's reader does the
    measuring, so --no-verify leaves it out.
    """

    weights: str
    adapter_as: str | None = None
    by_reader: bool = False

    def covers(self, weights: str, adapter_as: str | None, check: bool = True) -> bool:
        """Return True if an export with these options is of this form."""
        return self.weights == weights and self.adapter_as in (None, adapter_as) and (check or not self.by_reader)


def adapted_model(job: Job, folder: Path) -> Llama:
    """Return the base with its adapter, the usual reference of a proof; `folder` is not read."""
    return job.model()


def no_seal(folder: Path) -> None:
    """Leave the folder unchanged, for targets that have nothing to add once golden.json is written."""


def no_bare_logits(job: Job, ids: Sequence[int]) -> Tensor | None:
    """Return None: the reader runs the adapter on the same base as edgetune, or on none."""
    return None


def no_commands(job: Job, folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return no commands, for targets that apps open."""
    return ()


@dataclass(frozen=True)
class TargetSpec:
    """A target of `edgetune export`: the options it takes, the packages it needs, and the functions that do its work.

    name: as in TARGETS. weights: values of --weights, the default first; "" is the adapter alone. packages: Python packages
    that the reader imports. extra: the extra of edgetune that installs them. also_needs: further packages, by form of the
    weights. proved_by: the reader's name for people; the bounds in golden.json are for it. also_proved_by: names of other
    readers, by form of the weights. adapter_as: values of --adapter-as, the default first. measured: the forms that measure
    something on --texts. on_user_file: the form that is an adapter for the GGUF file that the base was converted from.

    peak_memory(job) forecasts the bytes of writing and proving. write(job, folder) fills an empty private folder. read(job,
    folder) opens the export with the target's own reader. reference(job, folder) loads the model that the export must agree
    with; targets that round weights to few bits on purpose load the rounded ones. seal(folder) runs after golden.json has
    been written into the folder. bare_logits(job, ids) runs ids (N,) with the reader on its own form of the base, without the
    adapter, and returns logits (N, V) f32. commands(job, folder) returns the commands that run the finished export, word by
    word.
    """

    name: str
    weights: tuple[str, ...]
    proved_by: str
    peak_memory: Callable[[Job], ExportMemory]
    write: Callable[[Job, Path], Written]
    read: Callable[[Job, Path], Reader]
    packages: tuple[str, ...] = ()
    extra: str = ""
    also_needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    also_proved_by: Mapping[str, str] = field(default_factory=dict)
    adapter_as: tuple[str, ...] = ()
    measured: tuple[MeasuredForm, ...] = ()
    reference: Callable[[Job, Path], Llama] = adapted_model
    seal: Callable[[Path], None] = no_seal
    on_user_file: str | None = None
    bare_logits: Callable[[Job, Sequence[int]], Tensor | None] = no_bare_logits
    commands: Callable[[Job, Path], tuple[tuple[str, ...], ...]] = no_commands

    def needs_user_file(self, weights: str) -> bool:
        """Return True for a form that can only be written for a base converted from a GGUF file that is still here."""
        return bool(weights) and weights == self.on_user_file

    def reader_name(self, weights: str) -> str:
        """Return the name, for people, of what proves this form of the weights."""
        return self.also_proved_by.get(weights, self.proved_by)

    def missing_packages(self, weights: str) -> list[str]:
        """Return the packages that the proof of this form of the weights needs and that are not installed."""
        needed = (*self.packages, *self.also_needs.get(weights, ()))
        return [package for package in needed if importlib.util.find_spec(package) is None]


def load_target(name: str) -> TargetSpec:
    """Import a target and return its TargetSpec. Raises SettingError for an unknown name."""
    if name not in _MODULES:
        raise SettingError(f"Unknown target {name!r}; expected one of {', '.join(TARGETS)}.")
    spec: TargetSpec = importlib.import_module(_MODULES[name]).SPEC
    return spec


def check_weights(spec: TargetSpec, weights: str | None) -> str:
    """Return --weights in the target's spelling, its default for None. Raises SettingError for a form it does not write."""
    if weights is None:
        return spec.weights[0]
    weights = next((form for form in spec.weights if form in (weights, _SYNONYMS.get(weights))), weights)
    if weights not in spec.weights:
        forms = [form for form in spec.weights if form]
        if not forms:
            raise SettingError(
                f"export {spec.name} has no --weights {weights}: it writes the adapter alone; leave --weights out."
            )
        alone = ", or no --weights for the adapter alone" if "" in spec.weights else ""
        raise SettingError(f"export {spec.name} has no --weights {weights}; expected {_one_of(forms)}{alone}.")
    return weights


def check_texts(spec: TargetSpec, weights: str, adapter_as: str | None, check: bool) -> None:
    """Raise SettingError if the export would measure nothing on --texts. weights: as check_weights returns it."""
    if any(form.covers(weights, adapter_as, check) for form in spec.measured):
        return
    typed = _command(spec.name, weights, adapter_as) + ("" if check else " --no-verify")
    others = " or ".join(f"`{_command(spec.name, form.weights, form.adapter_as)}`" for form in spec.measured)
    advice = f", or type {others}" if others else ""
    raise SettingError(f"`{typed}` measures nothing on --texts; leave --texts out{advice}.")


def check_adapter_as(spec: TargetSpec, adapter_as: str | None) -> None:
    """Raise SettingError if the target does not offer this --adapter-as."""
    if adapter_as is not None and adapter_as not in spec.adapter_as:
        advice = f"expected {_one_of(spec.adapter_as)}" if spec.adapter_as else "leave it out, it is for coreml"
        raise SettingError(f"export {spec.name} has no --adapter-as {adapter_as}; {advice}.")


def check_reader(spec: TargetSpec, weights: str) -> None:
    """Raise ResourceError if packages that the proof needs are not installed; the message names all of them."""
    missing = spec.missing_packages(weights)
    if missing:
        raise ResourceError(
            f"Proving export {spec.name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed; type pip install 'edgetune[{spec.extra}]', or --no-verify to write it unproved."
        )


def _command(name: str, weights: str, adapter_as: str | None) -> str:
    options = ((" --weights ", weights), (" --adapter-as ", adapter_as))
    return f"edgetune export {name}" + "".join(option + value for option, value in options if value)


def _one_of(forms: Sequence[str]) -> str:
    return forms[0] if len(forms) == 1 else f"one of {', '.join(forms)}"
