"""Quantise a base model to 4 bits: find it, calibrate on text where that is asked for, and measure what 4 bits cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgetune._version import __version__
from edgetune.conversion import cost, origin
from edgetune.conversion.cost import Cost, Unmeasured
from edgetune.conversion.origin import Origin
from edgetune.dataset.evaluation_set import Score
from edgetune.documents.reading import read_notes
from edgetune.library.base_models import resolve
from edgetune.progress import Progress, Show, Stages
from edgetune.runtime.batch import Batch, pack
from edgetune.runtime.calibrated_layers import Calibration, calibration_bytes
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.device import compute_dtype
from edgetune.runtime.error_feedback import Documents
from edgetune.runtime.errors import DataError, ModelError
from edgetune.runtime.files import refuse_occupied
from edgetune.runtime.loader import load_llama
from edgetune.runtime.pager import SLOTS
from edgetune.runtime.quantize import QuantizeResult, quantize_folder, quantized
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer, has_tokenizer
from edgetune.scratch import scratch_folder
from edgetune.texts import calibration_text, measuring_text

PIECE_TOKENS = 512
"""Length in tokens of the pieces that a text is cut into, and read in. Chosen by hand."""
CALIBRATION_TOKENS = 8192
"""Upper bound on the tokens to calibrate on. Chosen on SmolLM2-135M (LOG.md, "calibrated NF4")."""
MEASURE_BYTES = 1 << 30
"""Bytes of layers that stay in memory while bits per byte are measured; those of larger models are streamed. Chosen by hand."""


@dataclass(frozen=True)
class Quantised:
    """A model that was quantised. cost: None for a model without a tokenizer, which cannot read a text."""

    result: QuantizeResult
    cost: Cost | None
    seconds: float


def quantise(
    src: str,
    dest: Path | str,
    *,
    double_quant: bool = True,
    head: str = "bf16",
    calibrate: bool = False,
    texts: Sequence[str] = (),
    show: Show = lambda event: None,
) -> Quantised:
    """Write the model that `src` names as a 4-bit folder `dest`, and measure what 4 bits cost on the built-in text.

    src: a folder, a GGUF file, or any other name of a model. calibrate: keep the outputs of the layers on a text, which is the
    built-in one unless `texts` names files and folders. Raises subclasses of EdgetuneError, as quantize_folder does.
    """
    start, stages = time.monotonic(), Stages(show)
    begun = Unmeasured.read(Path(dest))
    if begun is None:
        refuse_occupied(Path(dest))  # before a GGUF model is converted for minutes
    with _dense_folder(src, stages) as source:
        calibration = _calibration(source, texts, stages) if calibrate or texts else None
        work = Unmeasured(_work(source, double_quant, head, calibration))
        if work == begun:  # an earlier command ended while it measured
            result = quantized(open_model(source), Path(dest))
        else:
            result = quantize_folder(
                source,
                dest,
                double_quant=double_quant,
                head=head,
                calibration=calibration,
                records=_records(source, work),
                progress=stages.of("quantising"),
            )
        measured = _measured(source, result.folder, calibration.tokens if calibration else 0, stages.of("measuring"))
    return Quantised(result, measured, time.monotonic() - start)


def _work(source: Path, double_quant: bool, head: str, calibration: Calibration | None) -> str:
    """Return a digest of the model in `source` and of the settings of its quantisation."""
    checkpoint = open_model(source)
    text = None if calibration is None else calibration.digest
    work = [checkpoint.digest, checkpoint.hf_config, double_quant, head, text]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


def _records(source: Path, work: Unmeasured) -> dict[str, str]:
    """Return the records of a quantised folder: the GGUF file that `source` came from, and that its cost is to be measured."""
    made_from = Origin.read(source)
    found = {} if made_from is None else {origin.FILE: made_from.text()}
    return {**found, **({cost.FILE: work.text()} if has_tokenizer(source) else {})}


def memory_to_calibrate(src: str) -> int:
    """Forecast the memory in bytes that calibrating the model which `src` names takes."""
    path = resolve(src).path
    if path.is_dir():
        return calibration_bytes(open_model(path).config, CALIBRATION_TOKENS)
    from edgetune.conversion.gguf_file import GgufFile
    from edgetune.conversion.model import Model

    return calibration_bytes(Model(GgufFile.open(path)).config, CALIBRATION_TOKENS)


@contextlib.contextmanager
def _dense_folder(src: str, stages: Stages) -> Iterator[Path]:
    """Yield the folder of the model that `src` names; of a GGUF model a copy in bf16, which is deleted at the end."""
    choice = resolve(src)
    if choice.path.is_dir():
        yield choice.path
        return
    from edgetune.conversion.convert import convert

    with scratch_folder() as scratch:
        progress = stages.of("converting")
        folder = convert(choice.path, scratch / "model", choice.name, form="bf16", progress=progress).path
        # An interrupted quantisation recognises its source by the times of its files too, and this copy is new each time.
        times = choice.path.stat().st_atime_ns, choice.path.stat().st_mtime_ns
        for file in folder.glob("*.safetensors"):
            os.utime(file, ns=times)
        yield folder


def _calibration(source: Path, texts: Sequence[str], stages: Stages) -> Calibration:
    """Return what to calibrate the model in `source` on. Raises ModelError for a model without a tokenizer, DataError for
    texts that hold nothing."""
    if not has_tokenizer(source):
        raise ModelError(
            f"{source} has no tokenizer, and calibration reads text; copy its tokenizer.json there, or leave --calibrate out."
        )
    tokenizer = Tokenizer.load(source)
    found: Iterable[str] = calibration_text()
    if texts:
        documents = read_notes(texts, progress=stages.of("reading")).documents
        # In the order of their digests: the same text whatever the files are called, and a mixture of all folders.
        found = (document.text for document in sorted(documents, key=lambda document: document.digest))
    pieces = _pieces(tokenizer, found, open_model(source).config, CALIBRATION_TOKENS)
    if not pieces:
        raise DataError("The texts to calibrate on hold no words; name others with --texts, or leave it out.")
    return Calibration(pieces, stages.of("calibrating"))


def _pieces(tokenizer: Tokenizer, texts: Iterable[str], config: LlamaConfig, most: float = math.inf) -> Documents:
    """Return texts as pieces of token ids, each as a text begins, until `most` tokens are reached."""
    pieces: Documents = []
    count, size = 0, min(PIECE_TOKENS, config.max_positions) - len(tokenizer.start_ids)
    for text in texts:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), size):
            piece = [*tokenizer.start_ids, *ids[start : start + size]]
            if count + len(piece) > most:
                return pieces
            if len(piece) > 1:
                pieces.append(piece)
                count += len(piece)
    return pieces


def _measured(source: Path, quantised: Path, calibration_tokens: int, progress: Progress) -> Cost | None:
    """Measure what 4 bits cost and write it into the quantised folder; return None for a model without a tokenizer."""
    if not has_tokenizer(source):
        return None
    before, after = (
        bits_per_byte(folder, lambda done, total, first=first: progress(first * total + done, 2 * total))  # type: ignore[misc]
        for first, folder in enumerate((source, quantised))
    )
    if not (math.isfinite(before) and math.isfinite(after)):
        raise ModelError(
            f"{source} predicts NaN on the built-in text, since numbers in it are too large; copy the model again."
        )
    found = Cost(before, after, calibration_tokens, __version__)
    found.write(quantised)
    return found


def bits_per_byte(folder: Path, progress: Progress = lambda done, total: None, texts: Sequence[str] = ()) -> float:
    """Return the bits per byte of a model on `texts`, by default the built-in text, with its weights as they are stored.

    Layers beyond MEASURE_BYTES are streamed. progress: receives the pieces of text read and all pieces.
    """
    checkpoint, tokenizer = open_model(folder), Tokenizer.load(folder)
    config, texts = checkpoint.config, texts or measuring_text()
    ring = SLOTS * 4 * config.linear_parameters // config.num_layers
    model = load_llama(checkpoint, compute_dtype(torch.device("cpu")), layer_memory=max(MEASURE_BYTES, ring))
    runner, pieces = Runner(model), _pieces(tokenizer, texts, config)
    nats, done = [], 0
    for group in pack(pieces, PIECE_TOKENS):
        progress(done, len(pieces))
        nats.append(float(runner.score(Batch.of(group)).double().sum()))
        done += len(group)
    progress(len(pieces), len(pieces))
    tokens, text_bytes = tuple(len(piece) - 1 for piece in pieces), tuple(float(len(text.encode())) for text in texts)
    return Score(tuple(nats), tokens, text_bytes).bits_per_byte
