"""config.toml and flags: values of the wrong type or size, names that do not exist, and settings that contradict each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from corpus.case import CASES, Case, Outcome, Place, of_kind, plain_model

FILE = "config.toml"
case = of_kind(FILE)

# Name, a line of the [train] table, and what the refusal names.
REFUSED: tuple[tuple[str, str, str], ...] = (
    ("a rank in quotes", 'rank = "8"', "rank"),
    ("half a rank", "rank = 8.5", "rank"),
    ("true for a rank", "rank = true", "rank"),
    ("an alpha in quotes", 'alpha = "16"', "alpha"),
    ("a dropout in quotes", 'dropout = "0.1"', "dropout"),
    ("a learning rate in quotes", 'lr = "2e-4"', "lr"),
    ("a learning rate of nan", "lr = nan", "lr"),
    ("a negative final learning rate", "final_lr = -3", "final_lr"),
    ("a final learning rate in quotes", 'final_lr = "0.1"', "final_lr"),
    ("a beta above one", "beta1 = 2.0", "beta1"),
    ("a beta of one", "beta2 = 1.0", "beta2"),
    ("a negative warm-up", "warmup_steps = -5", "warmup_steps"),
    ("half a warm-up step", "warmup_steps = 2.5", "warmup_steps"),
    ("a negative weight decay", "weight_decay = -0.1", "weight_decay"),
    ("a clip of infinity", "clip = inf", "clip"),
    ("half a step", "steps = 2.5", "steps"),
    ("steps in quotes", 'steps = "100"', "steps"),
    ("epochs in a list", "epochs = [3]", "epochs"),
    ("\"no\" for a switch", 'rslora = "no"', "rslora"),
    ("0 for a switch", "rslora = 0", "rslora"),
    ("targets in one text", 'targets = "q_proj,v_proj"', "targets"),
    ("a number among the targets", 'targets = ["q_proj", 5]', "targets"),
    ("a target that does not exist", 'targets = ["query"]', "query"),
    ("one text where a list of patterns is meant", 'exclude = "drafts"', "exclude"),
    ("one text where a list of notes is meant", 'notes = "/elsewhere/notes"', "notes"),
    ("a length in quotes", 'seq_len = "512"', "seq_len|seq-len"),
    ("a length of decimals", "seq_len = 512.0", "seq_len|seq-len"),
    ("a batch in quotes", 'batch_tokens = "2048"', "batch_tokens|batch-tokens"),
    ("a seed in quotes", 'seed = "0"', "seed"),
    ("a recipe that does not exist", 'recipe = "note"', "recipe"),
    ("a number for a model", "model = 7", "model"),
    ("a device that does not exist", 'device = "gpu"', "device"),
    ("a list for the output", 'out = ["x"]', "out"),
    ("memory without a unit's name", 'memory = "lots"', "memory"),
    ("a number for the memory", "memory = 2", "memory"),
    ("a clock as a number", "until = 630", "until"),
    ("a clock of TOML", "until = 06:30:00", "until"),
    ("a number format that does not exist", 'compute = "fp8"', "compute"),
    ("true for recomputation", "recompute = true", "recompute"),
    ("a negative number of evaluations", "evaluations = -1", "evaluations"),
    ("a setting of another program", "learning_rate = 1e-4", "learning_rate"),
    ("a day", "minutes = 2024-05-01", "minutes"),
)  # fmt: skip


def configured(place: Place, text: str | bytes) -> Outcome:
    """Write config.toml and run a dry run, which reads the settings of a training run."""
    home = Path(os.environ["EDGETUNE_HOME"])
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (home / "config.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return place.run("train", "--dry-run", place.notes())


def _refusing(line: str, word: str) -> Callable[[Place], None]:
    return lambda place: configured(place, f"[train]\n{line}\n").refused(word, r"config\.toml|--|expected")


CASES.extend(Case(FILE, name, _refusing(line, word)) for name, line, word in REFUSED)


@case("a table of another name")
def _(place: Place) -> None:
    configured(place, "[trian]\nrank = 8\n").refused("trian")


@case("a setting outside the table")
def _(place: Place) -> None:
    configured(place, "rank = 8\n").refused("rank")


@case("a train that is no table")
def _(place: Place) -> None:
    configured(place, "train = 8\n").refused(r"config\.toml")


@case("a table inside the table")
def _(place: Place) -> None:
    configured(place, "[train.data]\nseq_len = 64\n").refused("data")


@case("text that is not TOML")
def _(place: Place) -> None:
    configured(place, "[train]\nrank: 8\n").refused(r"config\.toml", "TOML")


@case("a file in Latin-1")
def _(place: Place) -> None:
    configured(place, '[train]\nout = "caf\xe9"\n'.encode("latin-1")).refused(r"config\.toml")


@case("a byte order mark")
def _(place: Place) -> None:
    outcome = configured(place, b"\xef\xbb\xbf[train]\nrank = 8\n")
    outcome.refused(r"config\.toml") if outcome.code else outcome.taken()


@case("steps and epochs together")
def _(place: Place) -> None:
    configured(place, "[train]\nsteps = 5\nepochs = 2\n").refused("steps", "epochs")


@case("a list of patterns")
def _(place: Place) -> None:
    configured(place, '[train]\nexclude = ["0*.md"]\n').taken("10 excluded")


@case("a whole number for an alpha")
def _(place: Place) -> None:
    configured(place, "[train]\nalpha = 16\nlr = 1\n").taken()


FLAGS = "flags"
case = of_kind(FLAGS)

# Name, the flags of `train`, and what the refusal names.
BAD_FLAGS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("a rank of zero", ("--rank", "0"), ("rank",)),
    ("a rank of a million", ("--rank", "1000000"), ("rank",)),
    ("a rank that is a word", ("--rank", "big"), ("--rank",)),
    ("an alpha of infinity", ("--alpha", "inf"), ("alpha",)),
    ("a dropout of one", ("--dropout", "1"), ("dropout",)),
    ("a learning rate of nan", ("--lr", "nan"), ("lr",)),
    ("a learning rate of five", ("--lr", "5"), ("lr",)),
    ("a length of eight", ("--seq-len", "8"), ("16",)),
    ("a batch shorter than a row", ("--seq-len", "512", "--batch-tokens", "256"), ("batch",)),
    ("a negative seed", ("--seed", "-1"), ("seed",)),
    ("a target that does not exist", ("--targets", "q_proj,lm_head"), ("lm_head",)),
    ("targets of nothing", ("--targets", ""), ("target",)),
    ("a clock of 25 hours", ("--until", "25:00"), ("until",)),
    ("memory in apples", ("--memory", "3 apples"), ("memory",)),
    ("less memory than anything takes", ("--memory", "1KB"), ("memory",)),
    ("minutes below zero", ("--minutes", "-1"), ("minutes",)),
    ("no steps", ("--steps", "0"), ("steps",)),
    ("steps with epochs", ("--steps", "5", "--epochs", "2"), ("steps", "epochs")),
    ("rows longer than the model's positions", ("--seq-len", "4096", "--batch-tokens", "4096"), ("1,?024",)),
    ("an adapter to start from that is not there", ("--from", "yesterday"), ("yesterday",)),
    ("a flag that does not exist", ("--learning-rate", "1"), ("learning-rate",)),
)  # fmt: skip


def _bad_flags(flags: tuple[str, ...], words: tuple[str, ...]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        common = () if "--steps" in flags or "--epochs" in flags else ("--steps", "2")
        place.run("train", "--model", plain_model(), *common, *flags, place.notes()).refused(*words)

    return check


CASES.extend(Case(FLAGS, name, _bad_flags(flags, words)) for name, flags, words in BAD_FLAGS)


@case("spaces between the targets")
def _(place: Place) -> None:
    place.trained(place.notes(), "--targets", "q_proj, v_proj").taken()


@case("a pattern that leaves nothing out")
def _(place: Place) -> None:
    place.trained(place.notes(), "--exclude", "drfats").taken("drfats")


@case("notes that are not there")
def _(place: Place) -> None:
    place.run("train", place.folder / "nowhere").refused("nowhere")


@case("no notes at all")
def _(place: Place) -> None:
    place.run("train").refused("notes")


@case("a model that is not there")
def _(place: Place) -> None:
    place.run("train", "--model", "org/nothing", place.notes()).refused("org/nothing", "edgetune models")


@case("a prompt longer than the model's positions")
def _(place: Place) -> None:
    place.run("generate", "--model", plain_model(), "--adapter", "none", "word " * 3000).refused("1,?024")


@case("a temperature of nan")
def _(place: Place) -> None:
    place.run("generate", "--model", plain_model(), "--adapter", "none", "--temperature", "nan", "hello").refused("temperature")


@case("an empty prompt from a pipe")
def _(place: Place) -> None:
    place.run("generate", "--model", plain_model(), "-", input="").refused("empty")


@case("no tokens to write")
def _(place: Place) -> None:
    place.run("generate", "--model", plain_model(), "--max-tokens", "0", "hello").refused("max-tokens")


@case("a prompt with half of a surrogate pair")
def _(place: Place) -> None:
    place.run("generate", "--model", plain_model(), "--adapter", "none", "--max-tokens", "2", "caf\udce9").taken()
