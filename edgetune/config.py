"""The product's settings, and the only home of their defaults.

A flag overrides config.toml, which overrides the default here. `$EDGETUNE_HOME/config.toml` may hold a `[train]` table with any
field of TrainConfig or DataConfig by its name.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from edgetune.home import home
from edgetune.runtime.config import LINEARS, LoraConfig
from edgetune.runtime.errors import UsageError

RECIPES = ("notes", "raw", "chat")
"""Ways to read notes. notes: front matter dropped, chats trained on the assistant's turns. raw: front matter kept, chats
trained as a whole, in Guanaco's form. chat: only chats are read."""
RECOMPUTE = ("auto", "none", "selective", "full")
"""Activations that are recomputed in the backward pass instead of kept; auto is the fastest choice that fits in memory."""
COMPUTE = ("auto", "bf16", "int8", "fp32")
"""Number formats of products. int8: activations are bf16, and training multiplies the frozen weights in 8 bits. auto: int8 on a
CPU with AMX, else bf16 where the hardware multiplies it, else fp32."""
HEADS = ("auto", "stored", "int8", "nf4")
"""Forms in which a session holds the head: as stored, in 8 or 4 bits, or (auto) the fastest at next to no cost in quality."""
CONFIG_FILE = "config.toml"

REFERENCE_LEARNING_RATE = 2e-4
"""Peak learning rate of a model REFERENCE_WIDTH wide or wider: the QLoRA paper's for 7B."""
REFERENCE_WIDTH = 2048
"""Hidden size below which the learning rate grows."""
RATE_EXPONENT = 1.5
"""The learning rate grows with (REFERENCE_WIDTH / hidden size) to this power, since the weights of narrower models are larger:
2.5e-3 for the built-in model, 384 wide, where 1.07e-3 learnt a ninth less."""
EPOCHS, MOST_EPOCHS = 3.0, 8.0
"""Passes over the notes by default, and the most where the notes are few: the best adapter is kept, not the last."""
FEWEST_STEPS = 100
"""Steps below which the default number of epochs grows; chosen by hand."""


@dataclass(frozen=True)
class DataConfig:
    """The notes to read, and how they are cut into sequences and batches."""

    notes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recipe: str = "notes"
    seq_len: int = 512  # the QLoRA paper's; notes of the kind that we measured are 300 tokens long on average
    batch_tokens: int = 2048  # four full windows: even a small folder gives a few dozen steps per epoch
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UsageError(f"The recipe is {self.recipe!r}; expected one of {', '.join(RECIPES)}.")
        if not 16 <= self.seq_len <= 131072:
            raise UsageError(f"The sequence length is {self.seq_len}; expected 16 to 131072 tokens. Type e.g. --seq-len 512.")
        if self.batch_tokens < self.seq_len:
            raise UsageError(
                f"A batch of {self.batch_tokens} tokens cannot hold a sequence of {self.seq_len}; "
                f"type --batch-tokens {4 * self.seq_len} or a shorter --seq-len."
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"The seed is {self.seed}; expected 0 to 4294967295.")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. Defaults are the QLoRA paper's (arXiv 2305.14314) or have their reason beside them."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = None
    device: str = "auto"
    out: str | None = None
    steps: int | None = None
    epochs: float | None = None  # see `default_epochs`
    minutes: float | None = None
    until: str | None = None
    memory: str | None = None
    rank: int = 16  # the paper: rank hardly matters once all linears are adapted; 16 keeps the adapter small
    alpha: float = 16.0  # the paper's
    dropout: float = 0.05  # the paper's for large models; its 0.1 for small ones was for 10,000 chats, not for 50 notes
    targets: tuple[str, ...] = LINEARS  # every linear but the head: the paper's
    rslora: bool = False
    lr: float | None = None  # see `learning_rate`
    warmup_steps: int = 10  # Adam's second moment is unreliable in the first steps, and small models have high rates
    final_lr: float = 0.1  # linear decay to a tenth of the peak, so that the last batches of a short run are still learnt
    weight_decay: float = 0.0  # the paper's
    beta1: float = 0.9
    beta2: float = 0.999  # the paper's
    clip: float = 1.0  # the paper's 0.3 would clip every step of a small model's short run
    recompute: str = "auto"  # the fastest that fits in memory
    compute: str = "auto"  # the fastest on this machine
    evaluations: int = 5  # enough to catch where overfitting begins; a short run has fewer
    evaluation_share: float = 0.1  # upper bound on the share of the run's work that evaluations take (0 to 1)
    from_adapter: str | None = None

    def __post_init__(self) -> None:
        self.lora()
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"The number of steps is {self.steps}; expected at least 1. Type e.g. --steps 100.")
        for name, value in (("epochs", self.epochs), ("minutes", self.minutes), ("lr", self.lr), ("clip", self.clip)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name} is {value}; expected a positive number.")
        if not 0 < self.evaluation_share <= 1:
            raise UsageError(f"evaluation_share is {self.evaluation_share}; expected a share above 0 and up to 1, such as 0.1.")
        if self.lr is not None and self.lr > 1:
            raise UsageError(f"--lr is {self.lr}; expected at most 1. Type e.g. --lr 2e-4.")
        if self.recompute not in RECOMPUTE:
            raise UsageError(f"--recompute is {self.recompute!r}; expected one of {', '.join(RECOMPUTE)}.")
        if self.compute not in COMPUTE:
            raise UsageError(f"--compute is {self.compute!r}; expected one of {', '.join(COMPUTE)}.")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.until is not None:
            seconds_until(self.until)

    def lora(self) -> LoraConfig:
        """Return the adapter's shape. Raises UsageError for impossible values."""
        return LoraConfig(self.rank, self.alpha, self.dropout, tuple(self.targets), self.rslora)

    def learning_rate(self, hidden_size: int) -> float:
        """Return the peak learning rate: --lr, or the default for a model of this hidden size."""
        if self.lr is not None:
            return self.lr
        return REFERENCE_LEARNING_RATE * max(1.0, (REFERENCE_WIDTH / hidden_size) ** RATE_EXPONENT)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings, JSON-ready, without the paths of notes."""
        values = dataclasses.asdict(self)
        values["data"].pop("notes")
        return values


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of writing text: `generate`, `ask`, `chat`, Session, and the samples of a training run."""

    device: str = "auto"
    head: str = "auto"
    max_tokens: int = 256  # chosen by hand
    temperature: float = 0.7  # chosen by hand
    top_p: float = 0.95  # chosen by hand
    context_tokens: int = 4096  # positions that the KV cache has room for, in a model that has as many; chosen by hand


def default_epochs(steps_per_epoch: int) -> float:
    """Return the passes over the notes where neither --steps nor --epochs is given: 3, or up to 8 to reach 100 steps."""
    return min(MOST_EPOCHS, max(EPOCHS, FEWEST_STEPS / steps_per_epoch))


def train_config(flags: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run from defaults, config.toml and `flags` (those given, by field name), later ones winning."""
    values = {**_from_file(), **{name: value for name, value in flags.items() if value is not None and value != ()}}
    data_names = {item.name for item in dataclasses.fields(DataConfig)}
    data = {name: values.pop(name) for name in list(values) if name in data_names}
    return TrainConfig(data=DataConfig(**data), **values)


def _from_file() -> dict[str, Any]:
    """Return the [train] table of config.toml; empty if there is no such file. Raises UsageError for unknown settings."""
    path = home() / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("train", {})
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not valid TOML ({error}). Correct it or delete it.") from error
    fields = {item.name: item for owner in (TrainConfig, DataConfig) for item in dataclasses.fields(owner)}
    unknown = sorted(set(table) - set(fields) - {"data"}) + (["data"] if "data" in table else [])
    if unknown:
        raise UsageError(f"{path} sets {', '.join(unknown)}, which `edgetune train` does not know. Delete or rename them.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as "2GB" (2,000,000,000), "1.5GiB" or "4096" stands for. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"--memory is {text!r}; expected a size such as 2GB or 900MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def seconds_until(clock: str, now: datetime | None = None) -> float:
    """Return the seconds from `now` until the local clock next shows HH:MM, however it is changed until then.

    now: local time, the present by default. A time that a change of the clock leaves out is taken as if the clock had not
    changed; of one that the clock shows twice, the next is meant. Raises UsageError.
    """
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})", clock)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise UsageError(f"--until is {clock!r}; expected a time of day such as 06:30.")
    now = now or datetime.now()
    start = now.timestamp()
    today = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    days = (today, today + timedelta(days=1))
    return min(moment for day in days for moment in _moments(day) if moment > start) - start


def _moments(local: datetime) -> list[float]:
    """Return the times, in seconds since 1970, at which the local clock shows `local`: one, or two where it is set back."""
    moments = [local.replace(fold=fold).timestamp() for fold in (0, 1)]
    return [moment for moment in moments if datetime.fromtimestamp(moment) == local.replace(fold=0)] or moments[:1]
