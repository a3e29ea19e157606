"""Decides in which form the frozen base's linears are held in memory: in bf16, in rows of 8 bits, or in NF4.

4 bits cost a small model much of its quality, and bf16 costs a large one too much memory and, in writing, time. A checkpoint
that is stored in 4 bits stays as it is: there is nothing to undo them with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.choices import WEIGHTS
from edgetune.runtime.budget import WeightForm
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import SettingError, UsageError

KEEP_BF16_BYTES = 1_000_000_000
"""Most bytes that all linears may take in bf16 for a model to count as small: about half a billion weights. Chosen by hand."""
RECORDED = "weights"
"""Key of an adapter's edgetune.json that says over which form of its base it was trained."""

_LARGEST_FIRST = (WeightForm.BF16, WeightForm.INT8, WeightForm.NF4)


def is_small(config: LlamaConfig) -> bool:
    """Return True if a model of this shape is kept in bf16 where that fits in memory."""
    return 2 * config.linear_parameters <= KEEP_BF16_BYTES


def forms_for_training(
    weights: str, compute: str, checkpoint: Checkpoint, about: Mapping[str, Any] | None = None
) -> tuple[WeightForm, ...]:
    """Return the forms that training may give the linears of a checkpoint, the best first; the memory chooses among them.

    weights, compute: values of these settings of TrainConfig; products in 8 bits are made of 4-bit weights alone. about: the
    edgetune.json of the adapter to start from: with "auto" it goes on over the form that it was trained over, or a smaller one
    if that does not fit. Raises UsageError for a form that the checkpoint cannot take.
    """
    if checkpoint.quant is not None:
        return (_stored_form(weights, checkpoint),)
    recorded = _recorded(about)
    if weights == "auto" and compute != "int8" and recorded is not None:
        return _LARGEST_FIRST[_LARGEST_FIRST.index(recorded) :]
    return forms_of_shape(weights, compute, checkpoint.config)


def forms_of_shape(weights: str, compute: str, config: LlamaConfig) -> tuple[WeightForm, ...]:
    """Return the same for a dense checkpoint of this shape. Raises SettingError for two settings that exclude each other."""
    if compute == "int8" and weights not in ("auto", "nf4"):
        raise SettingError(
            f"--compute int8 multiplies weights in 4 bits, and --weights {weights} keeps them in another form; leave one of "
            "them out."
        )
    if weights != "auto":
        return (WeightForm(weights),)
    if is_small(config) and compute != "int8":
        return _LARGEST_FIRST
    return (WeightForm.NF4,)


def form_for_writing(weights: str, checkpoint: Checkpoint, about: Mapping[str, Any] | None = None) -> WeightForm:
    """Return the form for writing and for measuring; it depends on nothing that changes from one command to the next.

    weights: one of WEIGHTS. about: an adapter's edgetune.json: "auto" takes the form that it was trained over, if it names one.
    Raises UsageError for a form that the checkpoint cannot take.
    """
    if weights not in WEIGHTS:
        raise SettingError(f"--weights is {weights!r}; expected one of {', '.join(WEIGHTS)}.")
    if checkpoint.quant is not None:
        return _stored_form(weights, checkpoint)
    if weights != "auto":
        return WeightForm(weights)
    if (recorded := _recorded(about)) is not None:
        return recorded
    return WeightForm.BF16 if is_small(checkpoint.config) else WeightForm.NF4


def _recorded(about: Mapping[str, Any] | None) -> WeightForm | None:
    """Return the form of the base that an adapter's edgetune.json names; None if it names none."""
    found = (about or {}).get(RECORDED)
    return WeightForm(found) if isinstance(found, str) and found in list(WeightForm) else None


def _stored_form(weights: str, checkpoint: Checkpoint) -> WeightForm:
    """Return the form of a checkpoint that is stored in 4 bits. Raises UsageError where another one is asked for."""
    if weights not in ("auto", WeightForm.NF4):
        raise UsageError(
            f"The weights of {checkpoint.folder} are stored in 4 bits, which --weights {weights} cannot undo; leave --weights "
            "out, or name the model that this one was quantised from."
        )
    return WeightForm.NF4
