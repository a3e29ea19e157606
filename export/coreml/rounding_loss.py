"""Measure what rounding the weights again cost the model, and refuse a package that lost too much."""

from __future__ import annotations

from pathlib import Path

from edgetune.export import effect, verify
from edgetune.export.coreml.contents import Contents
from edgetune.export.coreml.reference import bare_model, stored_model
from edgetune.export.job import Job
from edgetune.runtime import adapter as adapters
from edgetune.runtime.tokenizer import Tokenizer

TEXTS, TEXT_TOKENS = 16, 256
"""Number of texts, and tokens of each, on which the effect of rounding is measured. Chosen by hand."""
LEAST_KL = 1e-12
"""Stands in for an adapter's effect of zero nats in a division. Chosen by hand, far below any effect."""


def measure_loss(job: Job, folder: Path) -> dict[str, float]:
    """Measure KL in nats of the engine's model to the stored one and to the bare base, on job.texts or the golden prompt."""
    texts = [list(text[:TEXT_TOKENS]) for text in job.texts if len(text) > 1][:TEXTS]
    trained = bare_model(job, folder)
    if job.adapter is not None:
        adapters.attach(trained, job.adapter)
    found = effect.measure(trained, stored_model(job, folder), texts or [_prompt(job)])
    return {"kl_of_rounding": found.kl_merged, **({} if job.adapter is None else {"kl_of_adapter": found.kl_base})}


def check_loss(contents: Contents, loss: dict[str, float]) -> None:
    """Raise ModelError where rounding cost too much. The stored model is compared with the model as it was trained."""
    where = "the texts" if contents.job.texts else "the golden prompt"
    if contents.merges:
        lost = loss["kl_of_rounding"] / max(loss["kl_of_adapter"], LEAST_KL)
        effect.hold_kept(contents.job, 1.0 - lost, where, "type --adapter-as inputs, which keeps it whole")
    else:
        effect.hold_rounding(contents.job, loss["kl_of_rounding"], where, "type --weights nf4")


def _prompt(job: Job) -> list[int]:
    """Return the token ids of the golden prompt."""
    tokenizer = Tokenizer.load(job.base.folder)
    return tokenizer.start.before_text(tokenizer.encode(verify.PROMPT))


def loss_notice(contents: Contents, loss: dict[str, float]) -> str:
    """Say what rounding did to the model, and to the adapter if it was merged."""
    form, rounding, adapter_effect = contents.job.weights, loss["kl_of_rounding"], loss.get("kl_of_adapter")
    if not contents.merges or adapter_effect is None:
        return (
            f"Rounding the weights to {form} moved the model by KL {rounding:.2g} from the model as it was trained. "
            "--weights nf4 keeps it as it was."
        )
    lost = "so the adapter's effect is lost" if rounding >= adapter_effect else "so some of the adapter's effect may be lost"
    return (
        f"The adapter was merged into weights rounded to {form}. Rounding moves the model by KL {rounding:.2g}, the whole "
        f"adapter by {adapter_effect:.2g}, {lost}; --adapter-as inputs keeps it whole."
    )
