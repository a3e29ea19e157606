"""The plan of a run, and the record that lets an interrupted run resume it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from edgetune.runtime.budget import Setting, Vocabulary, WeightForm
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.runner import Recompute
from edgetune.training.anchor import ANCHOR, AnchorPlan
from edgetune.training.private_plan import PrivatePlan
from edgetune.training.samples import Prompt

TOKENS, HELD_OUT = "tokens", "held-out"
"""Folders of the run's two token stores: notes to train on, and held-out notes."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, settled before step 1. The same plan on the same machine gives the same bits."""

    steps: int
    steps_per_epoch: int
    batch_tokens: int
    setting: Setting
    weights: WeightForm
    """The form of the base's linears in memory."""
    base_bytes: int
    """Bytes of the base that stay in memory: layers, embedding and head."""
    seq_len: int
    learning_rate: float
    warmup_steps: int
    evaluate_every: int
    """Steps between two evaluations of the held-out notes."""
    evaluate_tokens: int
    """Most tokens that an evaluation reads."""
    published_scores: int
    """Scores of the base as it was published at the end of the run (training/published.py): 2, fewer where memory is short, and
    0 where there is none to compare with."""
    gate_scores: int
    """Scores that the gate takes at the end of the run (training/gate_evidence.py)."""
    leak_tokens: int
    """Most tokens of the trained notes, and of the held-out ones, that the audit for leaks reads at the end of the run
    (training/leak_evidence.py)."""
    compute_dtype: str
    int8: bool
    """True if training multiplies the frozen weights in 8 bits."""
    backend: str
    threads: int
    predicted_peak_bytes: int
    data_digest: str
    base: str
    """Digest of the base model."""
    settings: dict[str, Any]
    """The TrainConfig, JSON-ready."""
    anchor: AnchorPlan | None = None
    private: PrivatePlan | None = None
    """The mechanism of private training (--private); None for other training."""

    def as_dict(self) -> dict[str, Any]:
        """Return the plan, JSON-ready."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunRecord:
    """A run's plan, and everything about its start that cannot be found out later: the notes may change or go away."""

    run: str
    """Name of the run and of its adapter."""
    plan: Plan
    lora: LoraConfig
    documents: int
    heldout_paths: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    """Beginnings of notes and questions of chats, which the model continues before and after training."""
    notes: str
    """Digest of all documents, held-out ones included."""
    torch: str
    """Version of torch."""
    files: dict[str, str]
    """SHA-256 of each file of tokens and of the anchor, by its path in the run's folder."""
    notices: tuple[str, ...] = ()
    """Sentences for the user about what was not read as it is."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Marks of the notes for the next adapter (documents/lineage.py)."""
    masked: dict[str, int] = field(default_factory=dict)
    """Numbers of masked secrets and identifiers, by kind."""
    new_documents: int = 0
    """Documents that the adapter to start from does not know, held-out ones included."""
    changed_documents: int = 0
    """Documents that have another text than it knows, held-out ones included."""
    noise_key: str = ""
    """Key of the secret randomness of private training, in hexadecimal; empty for other training."""

    def as_dict(self) -> dict[str, Any]:
        """Return the record, JSON-ready."""
        return dataclasses.asdict(self)

    def for_followers(self) -> RunRecord:
        """Return the part that other processes of the run need: no path, no text, nothing about the held-out notes."""
        files = {name: digest for name, digest in self.files.items() if name.startswith((f"{TOKENS}/", f"{ANCHOR}/"))}
        plan = dataclasses.replace(self.plan, settings={})
        private: dict[str, Any] = {"heldout_paths": (), "prompts": (), "notes": "", "notices": (), "lineage": {}, "masked": {}}
        return dataclasses.replace(self, run="", plan=plan, files=files, noise_key="", **private)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunRecord:
        """Return the record that `as_dict` turned into JSON."""
        lora = LoraConfig(**{**values["lora"], "targets": tuple(values["lora"]["targets"])})
        tuples = {name: tuple(values[name]) for name in ("heldout_paths", "prompts", "notices")}
        planned = values["plan"]
        setting = setting_from_dict(planned["setting"])
        anchor = None if planned["anchor"] is None else AnchorPlan.from_dict(planned["anchor"])
        private = None if planned["private"] is None else PrivatePlan(**planned["private"])
        made = {"setting": setting, "weights": WeightForm(planned["weights"]), "anchor": anchor, "private": private}
        plan = Plan(**{**planned, **made})
        return cls(**{**values, "plan": plan, "lora": lora, **tuples})


def setting_from_dict(values: dict[str, Any]) -> Setting:
    """Return the memory setting that a plan holds as JSON."""
    return Setting(**{**values, "recompute": Recompute(values["recompute"]), "in_file": Vocabulary(values["in_file"])})
