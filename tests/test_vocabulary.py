"""Quantised heads, and embeddings and heads that stay in their file, give the dense weight's rows and products.

The whole weight is never dequantised at once, or never in memory.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from edgetune.cli.main import cli
from edgetune.library.base_models import resolve
from edgetune.runtime import adapter as adapters
from edgetune.runtime import nf4, ops, vocabulary
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import ModelError, UsageError
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.int8 import PANEL_ROWS, Int8Rows
from edgetune.runtime.loader import load_llama
from edgetune.runtime.memory import anonymous_memory
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Runner
from edgetune.runtime.vocabulary import Head, StoredRows
from edgetune.session import Session

# Whole tiles; a short last panel; rows that do not end where a block ends.
SHAPES = [(96, 64), (PANEL_ROWS + 33, 128), (50, 24)]


def dense(weight: Head) -> torch.Tensor:
    if isinstance(weight, QuantizedTensor):
        return nf4.dequantize(weight, torch.float32)
    if isinstance(weight, StoredRows):
        return weight.rows(torch.arange(weight.shape[0]))
    return weight.codes * weight.scale if isinstance(weight, Int8Rows) else weight


def in_file(folder: Path, weight: torch.Tensor) -> StoredRows:
    """Write the weight to a file after some other bytes, as in a checkpoint; return it as rows that stay in the file."""
    path = folder / "weight"
    path.write_bytes(b"before" + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return StoredRows(path.open("rb", buffering=0), 6, weight.dtype, tuple(weight.shape), weight.device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_its_file_gives_what_it_gives_in_memory(
    tmp_path: Path, shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(stored)
    away, x, dy = in_file(tmp_path, weight), torch.randn(70, shape[1]).to(dtype), torch.randn(70, shape[0]).to(dtype)
    ids = torch.randint(0, shape[0], (70,))
    tolerance = {"rtol": 0.0, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.3}
    assert torch.equal(vocabulary.rows(away, ids, dtype), weight[ids].to(dtype))
    torch.testing.assert_close(vocabulary.logits(x, away), x @ weight.to(dtype).T, **tolerance)
    torch.testing.assert_close(vocabulary.input_gradient(dy, away), dy @ weight.to(dtype), **tolerance)
    with pytest.raises(IndexError, match="expected 0 to"):
        vocabulary.rows(away, torch.tensor([0, shape[0]]), dtype)
    os.truncate(tmp_path / "weight", 100)
    with pytest.raises(ModelError, match="can no longer be read"):
        vocabulary.logits(x, away)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", vocabulary.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 70])
def test_products_are_the_dequantised_heads(
    backend: str, kind: str, shape: tuple[int, int], dtype: torch.dtype, count: int
) -> None:
    if backend == "cpu" and ops.kernels_missing():
        pytest.skip("the kernels were not built")
    weight = vocabulary.quantize(torch.randn(shape) * torch.rand(shape[0], 1), kind)
    assert isinstance(weight, Int8Rows) == (kind == "int8")
    wanted = dense(weight).to(dtype).float()
    x, dy = torch.randn(count, shape[1]).to(dtype), torch.randn(count, shape[0]).to(dtype)
    tolerance = {"rtol": 0.0, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.3}
    with ops.use_backend(backend):
        torch.testing.assert_close(vocabulary.logits(x, weight).float(), x.float() @ wanted.T, **tolerance)
        torch.testing.assert_close(vocabulary.input_gradient(dy, weight).float(), dy.float() @ wanted, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*vocabulary.KINDS, "blocks of 256"])
def test_panels_have_the_dequantised_heads_bits(shape: tuple[int, int], kind: str) -> None:
    """Uses products with unit vectors, which are exact. Blocks of 256 cross the rows of all these shapes."""
    head = torch.randn(shape)
    small = vocabulary.quantize(head, kind) if kind in vocabulary.KINDS else nf4.quantize(head, block_size=256)
    with ops.use_backend("reference"):
        assert torch.equal(vocabulary.logits(torch.eye(shape[1]), small), dense(small).T)


def test_8_bits_are_nearest() -> None:
    weight = torch.randn(100, 64)
    small = vocabulary.quantize(weight, "int8")
    assert isinstance(small, Int8Rows)
    assert ((dense(small) - weight).abs() <= small.scale / 2 * 1.0001).all()
    assert small.nbytes < 0.27 * weight.nbytes


def row() -> Batch:
    ids = torch.randint(0, 128, (61,), generator=torch.Generator().manual_seed(3))
    return Batch(ids[:-1], ids[1:], torch.full((60,), 1 / 60), torch.arange(60), (Segment.packed(0, 60),))


FORMS = {"int8": (False, "int8"), "nf4": (False, "nf4"), "embedding": (True, None), "both": (True, vocabulary.FILE)}
"""Arguments for load_llama: True if the embedding stays in its file, and the kind of the head."""


@pytest.mark.parametrize("family", ["llama-2-grouped", "llama-3.2-tied-scaled"])
@pytest.mark.parametrize("form", FORMS)
def test_training_equals_that_with_the_dense_weight(tmp_path: Path, family: str, form: str) -> None:
    tiny.save_model(tmp_path / "model", family)
    checkpoint, (in_file, kind) = open_model(tmp_path / "model"), FORMS[form]
    special = load_llama(checkpoint, torch.float32, embedding_in_file=in_file, head_kind=kind)
    plain = load_llama(checkpoint, torch.float32)
    assert isinstance(special.embedding, StoredRows) == in_file
    assert (special.embedding is special.head) == ("tied" in family and form == "both")
    plain.head = dense(special.head)
    results = []
    for model in (special, plain):
        adapters.attach_new(model, LoraConfig(rank=4, alpha=8.0), seed=1)
        runner = Runner(model, loss_rows=16)
        loss = runner.train(row())
        results.append([loss, runner.score(row()), *(p.grad for p in adapters.parameters(model) if p.grad is not None)])
    assert len(results[0]) == 2 + 2 * 7 * 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama-2-grouped", "llama-3.2-tied-scaled"])
@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_a_head_of_its_own_kind_leaves_the_embedding_as_it_is(tmp_path: Path, family: str, kind: str) -> None:
    tiny.save_model(tmp_path / "model", family)
    plain, model = (load_llama(open_model(tmp_path / "model"), torch.float32, head_kind=k) for k in (None, kind))
    assert torch.equal(model.embedding, plain.embedding)
    assert not isinstance(model.head, torch.Tensor)
    assert torch.equal(dense(model.head), dense(vocabulary.quantize(plain.head, kind)))


def with_tokenizer(folder: Path, family: str = "llama-2-grouped", **changes: int) -> Path:
    """Write a tiny model with the demo's tokenizer and return its folder."""
    demo = resolve("demo").path
    tiny.save_model(folder, family, vocab_size=open_model(demo).config.vocab_size, **changes)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    return folder


@pytest.mark.skipif(ops.kernels_missing() is not None, reason="the kernels were not built")
@pytest.mark.parametrize("family", ["llama-2-grouped", "llama-3.2-tied-scaled"])
def test_a_session_holds_the_head_in_the_form_asked_for(tmp_path: Path, family: str) -> None:
    with_tokenizer(tmp_path / "model", family)
    forms = {"auto": Int8Rows, "stored": torch.Tensor, "int8": Int8Rows, "nf4": QuantizedTensor}
    for head, form in forms.items():
        session = Session.load(str(tmp_path / "model"), "none", "cpu", head)
        assert isinstance(session.model.head, form)
        assert isinstance(session.model.embedding, torch.Tensor)
        assert session.generate("The shed", 4, 0.0).tokens == 4
    # The reference back end has no products in 8 bits, so rounding gains nothing and is done only on request.
    with ops.use_backend("reference"):
        assert isinstance(Session.load(str(tmp_path / "model"), "none", "cpu").model.head, torch.Tensor)
        assert isinstance(Session.load(str(tmp_path / "model"), "none", "cpu", "int8").model.head, Int8Rows)
    with pytest.raises(UsageError, match="expected one of auto, stored, int8, nf4"):
        Session.load(str(tmp_path / "model"), "none", "cpu", "q6_k")


def test_a_head_in_4_bits_of_rows_that_are_no_whole_blocks_is_refused(tmp_path: Path) -> None:
    """A request for 4 bits never silently gives 8; without a request, the best form for this model is used."""
    model = with_tokenizer(tmp_path / "model", hidden_size=96, num_attention_heads=4)
    with pytest.raises(UsageError, match=r"rows of 96 numbers, .* whole blocks of 64; leave --head out, or type --head int8"):
        Session.load(str(model), "none", "cpu", "nf4")
    result = CliRunner().invoke(cli, ["generate", "--model", str(model), "--device", "cpu", "--head", "nf4", "The shed"])
    assert isinstance(result.exception, UsageError)
    assert result.stdout == ""
    assert isinstance(Session.load(str(model), "none", "cpu", "int8").model.head, Int8Rows)
    assert isinstance(Session.load(str(model), "none", "cpu", "stored").model.head, torch.Tensor)
    Session.load(str(model), "none", "cpu")


def test_a_head_that_is_stored_in_4_bits_is_not_said_to_have_8(tmp_path: Path) -> None:
    model = quantize_folder(with_tokenizer(tmp_path / "dense"), tmp_path / "four", head="nf4").folder
    with pytest.raises(UsageError, match="in 4 bits, which --head int8 cannot undo; leave --head out, or name the model"):
        Session.load(str(model), "none", "cpu", "int8")
    for head in ("auto", "stored", "nf4"):
        assert isinstance(Session.load(str(model), "none", "cpu", head).model.head, QuantizedTensor)


@pytest.mark.skipif(ops.kernels_missing() is not None, reason="the kernels were not built")
def test_writing_with_the_head_in_8_bits_costs_next_to_nothing_on_the_demo() -> None:
    """Compares, token by token with the decoding step, the likelihood of a text and the most likely tokens."""
    losses, tops = [], []
    for head in ("stored", "int8"):
        session = Session.load("demo", "none", "cpu", head)
        generator = Generator(Runner(session.model), 256)
        ids = session.tokenizer.prompt_ids((resolve("demo").path / "README.md").read_text())[:200]
        generator.prefill(ids[:1])
        logits = torch.stack([generator.step(id).float() for id in ids[1:-1]])
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[2:]))))
        tops.append(logits.argmax(1))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] != losses[0]
    assert (tops[0] == tops[1]).float().mean() > 0.97


@pytest.mark.parametrize("kind", vocabulary.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_a_quantised_head_writes(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """In fp32 the text is that of the dense weight, whichever decoding step the back end has."""
    tiny.save_model(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model")
    model, plain = (load_llama(checkpoint, dtype, head_kind=k) for k in (kind, None))
    plain.head = dense(model.head).to(dtype)
    texts = [list(Generator(Runner(m), 64).generate([1, 5, 9], 20, Sampling(0.0))) for m in (model, plain)]
    assert len(texts[0]) == 20
    assert dtype != torch.float32 or texts[0] == texts[1]


def test_a_head_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny.transformers_model("llama-2-grouped")
    model.lm_head.weight.data[5, 5] = torch.inf
    model.save_pretrained(tmp_path / "model")
    for kind in vocabulary.KINDS:
        with pytest.raises(ModelError, match=r"holds inf or NaN in lm_head\.weight"):
            load_llama(open_model(tmp_path / "model"), torch.float32, head_kind=kind)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")
@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_quantising_and_using_it_takes_little_more_than_it_weighs(kind: str) -> None:
    weight = torch.randn(32000, 512).bfloat16()  # 33 MB, or 66 MB in fp32
    x = torch.randn(64, 512).bfloat16()
    vocabulary.logits(x, vocabulary.quantize(weight[:4096], kind))
    before = anonymous_memory()
    small = vocabulary.quantize(weight, kind)
    vocabulary.input_gradient(vocabulary.logits(x, small), small)
    assert anonymous_memory() - before < small.nbytes + 36e6
