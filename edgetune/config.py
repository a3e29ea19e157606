"""The product's settings, and the only home of their defaults.

A flag overrides config.toml (config_file.py), which overrides the default here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from edgetune.choices import COMPUTE, HEADS, MASKS, RECIPES, RECOMPUTE, SCHEDULERS, WEIGHTS
from edgetune.parsing import PRIVACY, SIZE, check_encoding, parse_bytes, parse_privacy, parse_regions, seconds_until
from edgetune.runtime.config import DEVICES, LEAST_ALPHA, LINEARS, MAX_RANK, MOST_ALPHA, LoraConfig
from edgetune.runtime.errors import SettingError
from edgetune.settings import (
    Choice,
    Names,
    Number,
    Parsed,
    Switch,
    Text,
    Texts,
    Whole,
    check,
    setting,
)

SHADOW_MINUTES = 15.0
"""Longest time for which `edgetune audit` trains a shadow adapter, in minutes; chosen by hand."""
MANUAL_MINUTES = 90.0
"""Longest time of a night that the user begins with `edgetune nightly run`, in minutes; chosen by hand."""
MODEL_HELP = (
    "Base model: a folder, a GGUF file, or a name that `edgetune models` lists. Default: the current adapter's, else the best "
    "found here."
)
"""Help of --model, wherever it is an option."""

REFERENCE_LEARNING_RATE = 2e-4
"""Peak learning rate of a model CHAT_WIDTH wide or wider: the QLoRA paper's for 7B. Higher rates learn more from notes, but
unlearn more of the chat (LOG.md, "learning rate of a chat model")."""
CHAT_WIDTH = 512
"""Hidden size below which a model is too small to answer questions, so that training has no chat to unlearn. Chosen by hand:
the narrowest model known here that answers them is SmolLM2-135M, 576 wide; the built-in model is 384 wide."""
REFERENCE_WIDTH, RATE_EXPONENT = 2048, 1.5
"""Below CHAT_WIDTH the learning rate grows with (REFERENCE_WIDTH / hidden size) to the power RATE_EXPONENT, since the weights
of narrower models are larger: 2.5e-3 for the built-in model, where 1.07e-3 learnt a ninth less."""
ANCHOR_SHARE = 0.12
"""Share of a step's tokens that come from the anchor of a chat model (0 to 1); LOG.md, "keeping the chat"."""
MOST_EXTRACTED = 0.05
"""Largest share of tried passages of the notes that an adapter may write word for word (0 to 1); docs/privacy.md has why."""
EPOCHS, MOST_EPOCHS = 3.0, 8.0
"""Passes over the notes by default, and the most where the notes are few: the best adapter is kept, not the last."""
FEWEST_STEPS = 100
"""Steps below which the default number of epochs of a new adapter grows; chosen by hand. One that has learnt before needs no
more passes over a few new notes, and gets worse at others by them (LOG.md, "passes of a night")."""


READING = ("exclude", "code", "encoding", "me", "mask", "phone_regions")
"""Settings that decide which files of notes are read and what of their text; `eval` has them beside `train`."""
MEMORY = Parsed(parse_bytes, SIZE)
"""The values that --memory takes."""
SEED = Whole(0, 2**32 - 1)
"""The values that --seed takes. Chosen by hand: 32 bits, which every generator takes."""
MOST_NEW_TOKENS = 10**6
"""Most tokens that may be asked for at once. Chosen by hand: a model's own positions are fewer."""
LARGEST_BATCH = 1 << 24
"""Largest batch in tokens: beyond it, an epoch of any notes that one person has is less than a step. Chosen by hand."""
MOST_STEPS, MOST_PASSES, YEAR_MINUTES = 10**9, 10**6, 525_600
"""Largest numbers of steps and epochs, and the minutes in a year, the longest run. Chosen by hand."""


@dataclass(frozen=True)
class DataConfig:
    """The notes to read, and how they are cut into sequences and batches."""

    notes: tuple[str, ...] = setting((), Texts(), "Folders and files of notes.", flag="", example=("notes/",))
    exclude: tuple[str, ...] = setting(
        (), Texts(), "Leave out files that match; may be repeated.", metavar="GLOB", example=("drafts/",)
    )
    recipe: str = setting(
        "notes",
        Choice(RECIPES),
        "How notes become training text. raw keeps front matter and trains on both sides of chats; chat reads chats alone.",
    )
    code: bool = setting(False, Switch(), "Read source code among the notes too.", example=True)
    encoding: str | None = setting(
        None,
        Parsed(check_encoding, "the name of an encoding, such as windows-1250, shift_jis or gb18030"),
        "Encoding of notes that are not UTF-8. Without it, UTF-16 and Windows-1252 are recognised, and others are refused.",
        metavar="NAME",
        example="windows-1250",
    )
    me: tuple[str, ...] = setting(
        (),
        Texts(),
        "Your name, number or id in the exports of chat apps, as they write it; may be repeated. What you wrote is learnt.",
        metavar="NAME",
        example=("Anna Example",),
    )
    mask: str = setting(  # a model can repeat what it was trained on
        "all",
        Choice(MASKS),
        "What placeholders replace before training. all: secrets (keys, passwords) and personal identifiers (e-mail addresses, "
        "phone and card numbers, ids, the words in private.txt).",
    )
    phone_regions: str | None = setting(
        None,
        Parsed(parse_regions, "two-letter country codes separated by commas, such as US,DE"),
        "Countries whose way of writing phone numbers is recognised without a country code. Default: twenty.",
        metavar="LIST",
        example="US,DE",
    )
    seq_len: int = setting(  # the QLoRA paper's; notes of the kind that we measured are 300 tokens long on average
        512, Whole(16, 131072), "Longest sequence in tokens; longer notes are split.", metavar="T"
    )
    batch_tokens: int = setting(  # four full windows: even a small folder gives a few dozen steps per epoch
        2048, Whole(16, LARGEST_BATCH), "Tokens per step."
    )
    seed: int = setting(0, SEED, "Seed of all randomness.", metavar="S")
    left_out: tuple[tuple[str, str], ...] = ()
    """Absolute paths of files that a night leaves out, each with its reason (documents/document.py); no setting of a user's."""

    def __post_init__(self) -> None:
        check(self)
        if self.batch_tokens < self.seq_len:
            raise SettingError(
                f"A batch of {self.batch_tokens} tokens cannot hold a sequence of {self.seq_len}; "
                f"type --batch-tokens {4 * self.seq_len} or a shorter --seq-len."
            )


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. Defaults are the QLoRA paper's (arXiv 2305.14314) or have their reason beside them.

    A list becomes a tuple. Raises SettingError for a value that no run could use.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = setting(None, Text(), MODEL_HELP, metavar="M", example="demo")
    device: str = setting("auto", Choice(DEVICES), "Device to run on.")
    out: str | None = setting(
        None,
        Text(),
        "Folder for the trained adapter. Default: one in edgetune's own data folder.",
        metavar="DIR",
        example="my-adapter",
    )
    steps: int | None = setting(
        None,
        Whole(1, MOST_STEPS),
        "Number of steps. Each updates the adapter once, from one batch of notes.",
        example=100,
    )
    epochs: float | None = setting(  # see `default_epochs`
        None,
        Number(0, MOST_PASSES, above=True),
        f"Number of passes over the notes. Default: {EPOCHS:g}, or more for a new adapter of few notes.",
        metavar="E",
        example=EPOCHS,
    )
    minutes: float | None = setting(
        None,
        Number(0, YEAR_MINUTES, above=True),
        "Stop after this many minutes, at the end of a step.",
        metavar="N",
        example=30,
    )
    until: str | None = setting(
        None,
        Parsed(seconds_until, "a time of day such as 06:30"),
        "Stop at this time of day, at the end of a step.",
        metavar="HH:MM",
        example="06:30",
    )
    memory: str | None = setting(
        None,
        MEMORY,
        "Limit on peak memory; settings are chosen to fit. Default: most of what is free.",
        metavar="2GB",
        example="2GB",
    )
    rank: int = setting(  # the paper: rank hardly matters once all linears are adapted; 16 keeps the adapter small
        16, Whole(1, MAX_RANK), "Rank (size) of the adapter.", metavar="R"
    )
    alpha: float = setting(  # the paper's
        16.0, Number(LEAST_ALPHA, MOST_ALPHA), "The adapter is scaled by alpha/rank.", metavar="A"
    )
    dropout: float = setting(  # the paper's for large models; its 0.1 for small ones was for 10,000 chats, not for 50 notes
        0.05, Number(0, 1, below=True), "LoRA dropout.", metavar="P"
    )
    targets: tuple[str, ...] = setting(  # every linear but the head: the paper's
        LINEARS, Names(LINEARS), "Linear layers to adapt, separated by commas."
    )
    rslora: bool = setting(False, Switch(), "Scale the adapter by alpha/sqrt(rank) instead of alpha/rank.", example=True)
    lr: float | None = setting(  # see `learning_rate`
        None,
        Number(0, 1, above=True),
        f"Peak learning rate. Default: {REFERENCE_LEARNING_RATE:g}, or more for models too small to answer questions.",
        example=REFERENCE_LEARNING_RATE,
    )
    warmup_steps: int = setting(  # Adam's second moment is unreliable in the first steps, and small models have high rates
        10, Whole(0, MOST_STEPS), "Steps in which the learning rate rises to its peak.", flag=""
    )
    final_lr: float = setting(  # linear decay to a tenth, so that the last batches of a short run are still learnt
        0.1, Number(0, 1), "Learning rate of the last step, as a share of the peak.", flag=""
    )
    weight_decay: float = setting(0.0, Number(0, 1), "AdamW's weight decay.", flag="")  # the paper's
    beta1: float = setting(0.9, Number(0, 1, below=True), "AdamW's decay of the first moment.", flag="")
    beta2: float = setting(0.999, Number(0, 1, below=True), "AdamW's decay of the second moment.", flag="")  # the paper's
    clip: float = setting(  # the paper's 0.3 would clip every step of a small model's short run
        1.0, Number(0, 1e9, above=True), "Largest norm of the gradient; larger ones are scaled down to it.", flag=""
    )
    recompute: str = setting(  # the fastest that fits in memory
        "auto",
        Choice(RECOMPUTE),
        "Activations to recompute: slower, but takes less memory. {default}, the fastest that fits.",
    )
    compute: str = setting(  # the fastest on this machine
        "auto",
        Choice(COMPUTE),
        "Number format of matrix products. int8: 8-bit products with the base model's weights, on a CPU. "
        "{default}, the fastest on this machine.",
    )
    weights: str = setting(  # a small model loses more to 4 bits than it gains: see weight_forms.py
        "auto",
        Choice(WEIGHTS),
        "Form of the base model's weights in memory. {default}: bf16 for a small model where that fits, else nf4 (4 bits).",
    )
    evaluations: int = setting(  # enough to catch where overfitting begins, in less than a tenth of the run's time
        5, Whole(1, 1000), "Evaluations of the held-out notes in a run.", flag=""
    )
    evaluation_share: float = setting(
        0.1, Number(0, 1, above=True), "Largest share of a run's work that evaluations take.", flag=""
    )
    from_adapter: str | None = setting(
        None, Text(), "Start from this adapter instead of a new one.", flag="--from", metavar="A", example="my-adapter"
    )
    anchor: float | None = setting(  # see `anchor_share`
        None,
        Number(0, 0.5),
        "Share of each step's tokens on which the model must keep predicting as it does untrained: its own answers to "
        f"built-in questions. 0: none. Default: {ANCHOR_SHARE:g} for models that answer questions, else 0.",
        metavar="S",
        example=ANCHOR_SHARE,
    )
    replay: float = setting(  # chosen by hand
        0.25,
        Number(0, 0.9),
        "With --from: share of the text that comes from notes which that adapter has learnt already, beside new ones.",
        metavar="S",
    )
    most_extracted: float = setting(  # see docs/privacy.md, "How much leaks"
        MOST_EXTRACTED,
        Number(0, 1),
        "Largest share of passages of your notes that a new adapter may write word for word and still come into use. 1: any.",
        metavar="S",
    )
    most_recognised: float | None = setting(
        None,
        Number(0.5, 1),
        "Largest success of membership inference (area under its ROC curve; 0.5 is chance) with which a new adapter may come "
        "into use. Default: not measured in training.",
        metavar="A",
        example=0.8,
    )
    private: str | None = setting(
        None,
        Parsed(parse_privacy, PRIVACY),
        "Train with differential privacy (DP-SGD): what an adapter tells of any one document stays within this epsilon, in all "
        "runs that led to it. epsilon=8,delta=1e-6,runs=30 says more; delta is 1/(10 documents) by default.",
        metavar="EPSILON",
        example="8",
    )
    only_new: bool = False
    """True for a night, which ends where no note is new to the adapter that it starts from; no setting of a user's."""

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.data, DataConfig):
            raise SettingError("data is not a DataConfig; type TrainConfig(data=DataConfig(notes=[...])).")
        if self.steps is not None and self.epochs is not None:
            raise SettingError(
                f"--steps {self.steps} and --epochs {self.epochs:g} both say how long to train; leave one of them out."
            )

    def lora(self) -> LoraConfig:
        """Return the adapter's shape. Raises UsageError for impossible values."""
        return LoraConfig(self.rank, self.alpha, self.dropout, tuple(self.targets), self.rslora)

    def learning_rate(self, hidden_size: int) -> float:
        """Return the peak learning rate: --lr, or the default for a model of this hidden size."""
        if self.lr is not None:
            return self.lr
        growth = (REFERENCE_WIDTH / hidden_size) ** RATE_EXPONENT if hidden_size < CHAT_WIDTH else 1.0
        return REFERENCE_LEARNING_RATE * growth

    def anchor_share(self, hidden_size: int, has_template: bool) -> float:
        """Return the share of a step's tokens that come from the anchor: --anchor, or the default for such a model."""
        if self.anchor is not None:
            return self.anchor
        return ANCHOR_SHARE if has_template and hidden_size >= CHAT_WIDTH else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the settings, JSON-ready, without the paths of notes, the user's names, and what a night decides itself."""
        values = dataclasses.asdict(self)
        values.pop("only_new")
        for private in ("notes", "me", "left_out"):
            values["data"].pop(private)
        return values


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of writing text: `generate`, `ask`, `chat`, Session, and the samples of a training run.

    Raises SettingError for a value that cannot be used.
    """

    device: str = setting("auto", Choice(DEVICES), "Device to run on.")
    head: str = setting(
        "auto",
        Choice(HEADS),
        "Number format of the output layer: as stored, 8 bits, or 4 bits (fastest, slightly worse). {default}, which is int8 "
        "on a CPU that has kernels for it, else as stored.",
    )
    weights: str = setting(
        "auto",
        Choice(WEIGHTS),
        "Form of the base model's weights in memory. {default}, the one that the adapter was trained over.",
    )
    max_tokens: int = setting(256, Whole(1, MOST_NEW_TOKENS), "Maximum number of tokens to write.")  # chosen by hand
    temperature: float = setting(  # chosen by hand
        0.7,
        Number(0, 10),
        "Randomness in choosing words; 0 always takes the likeliest word. {default}, unless the model recommends another.",
    )
    seed: int | None = setting(
        None, SEED, "Seed of that randomness: the same seed gives the same words.", metavar="S", example=1
    )
    top_p: float = setting(  # chosen by hand
        0.95, Number(0, 1, above=True), "Only the likeliest words that together have this probability are chosen from.", flag=""
    )
    context_tokens: int = setting(  # positions that the KV cache has room for, in a model that has as many; chosen by hand
        4096, Whole(1, MOST_NEW_TOKENS), "Tokens of a conversation that are kept ready.", flag=""
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class NightlyConfig:
    """The settings of `edgetune nightly install`: when a night may work. Raises SettingError for an impossible value."""

    at: str = setting(  # chosen by hand: most people sleep then, and no country changes its clocks between 03:30 and 07:00
        "01:00",
        Parsed(seconds_until, "a time of day such as 01:00"),
        "Local time at which a night begins.",
        metavar="HH:MM",
    )
    until: str = setting(  # chosen by hand
        "07:00",
        Parsed(seconds_until, "a time of day such as 07:00"),
        "Local time by which a night has ended.",
        metavar="HH:MM",
    )
    battery: int | None = setting(
        None,
        Whole(1, 100),
        "Also work on battery while its charge is at or above this percentage. Default: on mains power alone.",
        metavar="PERCENT",
        example=60,
    )
    wake: bool = setting(
        False, Switch(), "Let the machine wake from sleep for a night (Windows alone offers this to users).", example=True
    )
    notify: bool = setting(
        False, Switch(), "Show a notification on the desktop when a night has ended, with what it came to.", example=True
    )
    scheduler: str = setting(
        "auto", Choice(SCHEDULERS), "Program of this system that starts the nights. {default}, the one that this system has."
    )

    def __post_init__(self) -> None:
        check(self)
        if self.at.rjust(5, "0") == self.until.rjust(5, "0"):
            raise SettingError(f"--at and --until are both {self.at}, so a night would have no time; type a later --until.")


def default_epochs(steps_per_epoch: int, is_new: bool) -> float:
    """Return the passes over the notes where neither --steps nor --epochs is given: 3, or up to 8 to reach 100 steps.

    is_new: the adapter is a new one; another, from an earlier run, is trained for 3 in any case.
    """
    return min(MOST_EPOCHS, max(EPOCHS, FEWEST_STEPS / steps_per_epoch)) if is_new else EPOCHS
