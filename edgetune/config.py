"""The product's settings and the only home of their defaults: dataclass < config.toml < flags given.

`$EDGETUNE_HOME/config.toml` may hold a `[train]` table with any field of TrainConfig or DataConfig by its name.
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
RECOMPUTE = ("auto", "none", "selective", "full")
COMPUTE = ("auto", "bf16", "int8", "fp32")
"""int8: activations are bf16, and the frozen weights' products are in 8 bits while training. auto: that on a CPU with AMX, else
bf16 where the hardware multiplies it, else fp32."""
HEADS = ("auto", "stored", "int8", "nf4")
"""In what form a session holds the head: as its folder does, in one of vocabulary.KINDS, or as is fastest at no cost."""
CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut."""

    notes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recipe: str = "notes"  # front matter dropped, chats trained on the assistant's turns
    seq_len: int = 512  # QLoRA's; a note of this kind is 300 tokens long on average
    batch_tokens: int = 2048  # four full windows: a small folder still gives some dozen steps an epoch
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
    """A training run. Where the QLoRA paper (arXiv 2305.14314) gives a value it stands; the reason for another is beside it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = None
    device: str = "auto"
    out: str | None = None
    steps: int | None = None
    epochs: float | None = (
        None  # 3 where nothing else limits the run: notes are few, and the best adapter is kept, not the last
    )
    minutes: float | None = None
    until: str | None = None
    memory: str | None = None
    rank: int = 16  # the paper: rank hardly matters once every linear is adapted; 16 keeps the adapter small
    alpha: float = 16.0  # the paper's
    dropout: float = 0.05  # the paper's for its large models; 0.1 for its small ones was on 10,000 chats, not on 50 notes
    targets: tuple[str, ...] = LINEARS  # every linear but the head: the paper's
    rslora: bool = False
    lr: float | None = None  # see `learning_rate`
    warmup_steps: int = 10  # Adam's second moment needs some steps before it can be trusted at a small model's rate
    final_lr: float = 0.1  # linear decay to a tenth: the last tokens of a short run are then remembered, not fought over
    weight_decay: float = 0.0  # the paper's
    beta1: float = 0.9
    beta2: float = 0.999  # the paper's
    clip: float = 1.0  # the paper's 0.3 would bind at every step of a small model's short run
    recompute: str = "auto"  # the fastest that fits
    compute: str = "auto"  # the fastest here: COMPUTE
    evaluations: int = 5  # readings of the held-out notes during the run: enough to catch the turn, under a tenth of its time
    from_adapter: str | None = None

    def __post_init__(self) -> None:
        self.lora()
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"The number of steps is {self.steps}; expected at least 1. Type e.g. --steps 100.")
        for name, value in (("epochs", self.epochs), ("minutes", self.minutes), ("lr", self.lr), ("clip", self.clip)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name} is {value}; expected a positive number.")
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
        """The adapter's shape; raises UsageError for one that cannot be."""
        return LoraConfig(self.rank, self.alpha, self.dropout, tuple(self.targets), self.rslora)

    def learning_rate(self, hidden_size: int) -> float:
        """The peak rate: 2e-4, the paper's for 7B, for models 2,048 wide and wider; more for narrower ones, whose weights
        are larger (2.5e-3 for the built-in 384, where 1.07e-3 learnt a ninth less)."""
        return self.lr if self.lr is not None else 2e-4 * max(1.0, (2048 / hidden_size) ** 1.5)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the paths of notes."""
        values = dataclasses.asdict(self)
        values["data"].pop("notes")
        return values


def default_epochs(steps_per_epoch: int) -> float:
    """Three passes over the notes; up to eight where three are fewer than 100 steps. The best adapter is kept, not the last."""
    return min(8.0, max(3.0, 100 / steps_per_epoch))


def train_config(flags: dict[str, Any]) -> TrainConfig:
    """TrainConfig from defaults, config.toml and the flags that were given (by field name), in that order."""
    values = {**_from_file(), **{name: value for name, value in flags.items() if value is not None and value != ()}}
    data_names = {item.name for item in dataclasses.fields(DataConfig)}
    data = {name: values.pop(name) for name in list(values) if name in data_names}
    return TrainConfig(data=DataConfig(**data), **values)


def _from_file() -> dict[str, Any]:
    path = home() / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("train", {})
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no readable TOML ({error}); mend it or delete it.") from error
    fields = {item.name: item for owner in (TrainConfig, DataConfig) for item in dataclasses.fields(owner)}
    unknown = sorted(set(table) - set(fields) - {"data"}) + (["data"] if "data" in table else [])
    if unknown:
        raise UsageError(f"{path} sets {', '.join(unknown)}, which are no settings of `edgetune train`; delete or rename them.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """ "2GB" -> 2,000,000,000; "1.5GiB" and plain numbers of bytes too. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"The memory is {text!r}; expected a size such as 2GB or 900MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def seconds_until(clock: str, now: datetime | None = None) -> float:
    """Seconds from now to the next HH:MM on the local clock. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,2}):(\d{2})", clock)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise UsageError(f"--until is {clock!r}; expected a time of day such as 06:30.")
    now = now or datetime.now()
    end = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    if end <= now:
        end += timedelta(days=1)
    return (end - now).total_seconds()
