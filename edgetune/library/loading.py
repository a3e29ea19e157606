"""Opens a base model by name and loads it: its files are mapped first, its weights read only when they are needed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch

from edgetune.choices import HEADS
from edgetune.config import GenerateConfig
from edgetune.export import mps as bundle
from edgetune.library import adapter_registry as registry
from edgetune.library.base_models import DEMO, ModelChoice, best_here, resolve
from edgetune.library.conversions import converted_folder, forgetting_named
from edgetune.progress import Progress, Show, ignore
from edgetune.runtime import ops
from edgetune.runtime.budget import Vocabulary, WeightForm
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.device import compute_dtype, explain_card_memory, pick_device
from edgetune.runtime.errors import EdgetuneError, ModelError, SettingError, UsageError
from edgetune.runtime.generate import Sampling
from edgetune.runtime.generation_config import SamplingSettings, read_sampling
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.runtime.vocabulary import FILE, fits_nf4_blocks
from edgetune.weight_forms import form_for_writing

SMALLER = "type a smaller --model, or --device cpu"
"""Advice for a model that does not fit on the device."""


@dataclass(frozen=True)
class Loaded:
    """A base model ready to run, with the choice and the checkpoint that it was read from."""

    choice: ModelChoice
    checkpoint: Checkpoint
    model: Llama
    tokenizer: Tokenizer
    recommended: SamplingSettings
    """The sampling settings that the model's publisher recommends."""
    form: WeightForm
    """The form of the linears in memory."""

    def sampling(self, temperature: float | None = None, seed: int | None = None) -> Sampling:
        """Return the settings to sample with: those given, else the publisher's, else GenerateConfig's.

        Raises SettingError for a value that cannot be used.
        """
        own = self.recommended
        given = own.temperature if temperature is None else temperature
        settings = GenerateConfig(temperature=GenerateConfig.temperature if given is None else given, seed=seed)
        top_p = settings.top_p if own.top_p is None else own.top_p
        return Sampling(settings.temperature, top_p, settings.seed, own.top_k or 0, own.repetition_penalty or 1.0)


Base = tuple[ModelChoice, Checkpoint]
"""A base model that was found and opened, but whose weights have not been read yet."""


def choose_model(name: str | None = None) -> ModelChoice:
    """Return the model that every command uses: the one named or, for None, the current adapter's, else the best one here.

    After a rollback to the bare base, that base is used as long as it is there. The demo's adapter holds its model only until a
    real one arrives: if the demo was all there was when that adapter became the current one, and another model is ready now,
    that one is chosen. Raises ModelError.
    """
    current = registry.get_current()
    if name is not None or current is None:
        return (_used_last() if name is None else None) or resolve(name)
    if current.model == DEMO and current.demo_alone and (found := best_here()) is not None:
        return replace(found, why=f"{found.why}; the current adapter is the demo's: to use it, type --model demo")
    try:
        return replace(resolve(current.model), why="the current adapter's")
    except ModelError as error:
        raise ModelError(
            f"The base model of the current adapter, {current.adapter.name}, cannot be used: {str(error).rstrip('.')}. Or name "
            "another with --model."
        ) from error


def _used_last() -> ModelChoice | None:
    """Return the model whose adapter was made current last; None if that is the demo, or not here any more."""
    model = registry.default_model()
    with contextlib.suppress(EdgetuneError):
        return None if model is None or model == DEMO else replace(resolve(model), why="the one used last")
    return None


def open_base(name: str | None, show: Show = lambda event: None) -> Base:
    """Find and open the model that `choose_model` returns, without reading its weights. A GGUF model is converted first.

    show: receives the progress of a conversion, and an events.Converted at its end.
    Raises ModelError, also for a bundle of `export mps` whose files were changed.
    """
    choice = in_folder(choose_model(name), show)
    bundle.check_base(choice.path)
    with forgetting_named(choice.path, choice.name):
        return choice, open_model(choice.path)


def load_tokenizer(choice: ModelChoice) -> Tokenizer:
    """Load the tokenizer of a model in a folder. Raises ModelError for one that is damaged or missing."""
    with forgetting_named(choice.path, choice.name):
        return Tokenizer.load(choice.path)


def in_folder(choice: ModelChoice, show: Show = lambda event: None) -> ModelChoice:
    """Return the choice with the folder that its GGUF file is converted to, now unless it was before; any other as it is."""
    if not choice.gguf:
        return choice
    return replace(choice, path=converted_folder(choice.path, choice.name, show, choice.ignored), gguf=False)


@explain_card_memory(SMALLER)
def load_base(
    base: Base,
    device: str = "auto",
    layer_memory: int | None = None,
    in_file: Vocabulary = Vocabulary.NEITHER,
    head: str = "stored",
    progress: Progress = ignore,
    form: WeightForm | None = None,
) -> Loaded:
    """Load an opened model so that it is ready to run on `device`.

    layer_memory: as in `load_llama`. in_file: which of embedding and head stay in their file, as in a training's Setting.
    head: one of HEADS. progress: receives the layers loaded and all layers. form: that of the linears; None is the one for
    writing without an adapter.
    Raises UsageError for a form that this model's head cannot have.
    """
    target = pick_device(device)
    choice, checkpoint = base
    # Before the weights are read: what does not fit them or is damaged is refused at once.
    tokenizer, recommended = load_tokenizer(choice), read_sampling(choice.path)
    form = form or form_for_writing(GenerateConfig.weights, checkpoint)
    model = load_llama(
        checkpoint,
        compute_dtype(target),
        target,
        None if checkpoint.quant is not None else form.quant,
        layer_memory=layer_memory,
        embedding_in_file=in_file is not Vocabulary.NEITHER,
        head_kind=FILE if in_file is Vocabulary.BOTH else _head_kind(head, target, checkpoint),
        progress=progress,
    )
    return Loaded(choice, checkpoint, model, tokenizer, recommended, form)


def _head_kind(head: str, device: torch.device, checkpoint: Checkpoint) -> str | None:
    """Return the `head_kind` for `load_llama` that gives the form `head` of HEADS. Raises UsageError.

    "auto" is int8 where there are kernels for it: that reads half of bf16's bytes for every token and costs less than 0.0001
    bits per byte (LOG.md, "eight-bit head"). A head that is stored in 4 bits stays as it is.
    """
    if head not in HEADS:
        raise SettingError(f"--head is {head!r}; expected one of {', '.join(HEADS)}.")
    if head == "auto":
        return "int8" if ops.multiplies_int8(device) and not checkpoint.quantized_head else None
    if head == "int8" and checkpoint.quantized_head:
        raise UsageError(
            f"The head of {checkpoint.folder} is stored in 4 bits, which --head int8 cannot undo; leave --head out, or name "
            "the model that this one was quantised from."
        )
    width = checkpoint.config.hidden_size
    if head == "nf4" and not (checkpoint.quantized_head or fits_nf4_blocks(width)):
        raise UsageError(
            f"The head of {checkpoint.folder} has rows of {width} numbers, and --head nf4 needs whole blocks of "
            f"{QuantConfig().block_size}; leave --head out, or type --head int8."
        )
    return None if head == "stored" or checkpoint.quantized_head else head
