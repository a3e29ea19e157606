"""One Llama class gives transformers' logits for every family: in one pass, step by step, and for packed documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from edgetune.runtime import ops
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.generate import Generator, Sampling
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import KVCache, Llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.runner import Runner

# The largest absolute error allowed in fp32.
TOLERANCE = 1e-4
# Longer than every sliding window, and no multiple of a block size.
LENGTH = 75


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, object]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny.save_model(folder, request.param)
    return load_llama(open_model(folder), torch.float32), theirs


def token_ids(seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed))


def their_logits(model: object, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]  # type: ignore[operator]


@pytest.mark.parametrize("backend", ["reference", "best"])
def test_logits_equal_transformers(pair: tuple[Llama, object], backend: str) -> None:
    ours, theirs = pair
    ids = token_ids()
    with ops.use_backend("reference") if backend == "reference" else torch.no_grad():
        h = Runner(ours).infer(ids, torch.arange(LENGTH), [Segment(0, LENGTH, 0, LENGTH)], None)
        logits = ours.logits(h)
    torch.testing.assert_close(logits, their_logits(theirs, ids), atol=TOLERANCE, rtol=0)


def test_decoding_step_by_step_gives_the_same_logits(pair: tuple[Llama, object]) -> None:
    ours, theirs = pair
    ids = token_ids(1)
    generator = Generator(Runner(ours), LENGTH)
    wanted = their_logits(theirs, ids)
    with torch.no_grad():
        torch.testing.assert_close(generator.prefill(ids[:40].tolist()), wanted[39], atol=TOLERANCE, rtol=0)
    for at in range(40, LENGTH):
        torch.testing.assert_close(generator.step(int(ids[at])), wanted[at], atol=TOLERANCE, rtol=0)


def test_prefill_in_pieces_equals_prefill_at_once(pair: tuple[Llama, object]) -> None:
    ours, theirs = pair
    ids, runner = token_ids(2), Runner(ours)
    cache = KVCache(ours.config, LENGTH, torch.float32, torch.device("cpu"))
    pieces = []
    for start, end in ((0, 20), (20, 21), (21, LENGTH)):
        h = runner.infer(ids[start:end], torch.arange(start, end), [Segment(0, end - start, 0, end)], cache)
        pieces.append(ours.logits(h))
    torch.testing.assert_close(torch.cat(pieces), their_logits(theirs, ids), atol=TOLERANCE, rtol=0)


def test_packed_documents_do_not_see_each_other(pair: tuple[Llama, object]) -> None:
    ours, theirs = pair
    first, second = token_ids(3, 30), token_ids(4, 45)
    positions = torch.cat([torch.arange(30), torch.arange(45)])
    with torch.no_grad():
        h = Runner(ours).infer(torch.cat([first, second]), positions, [Segment(0, 30, 0, 30), Segment(30, 75, 30, 75)], None)
        logits = ours.logits(h)
    wanted = torch.cat([their_logits(theirs, first), their_logits(theirs, second)])
    torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0)


def test_greedy_text_equals_transformers(pair: tuple[Llama, object]) -> None:
    ours, theirs = pair
    prompt = token_ids(5, 12)
    wanted = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[attr-defined]
    written = list(Generator(Runner(ours), 64).generate(prompt.tolist(), 20, Sampling(temperature=0.0)))
    assert written == wanted[0, 12:].tolist()


def test_a_stop_id_ends_the_text_and_a_seed_fixes_it(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    runner = Runner(load_llama(open_model(tmp_path / "model"), torch.float32))
    first = list(Generator(runner, 64).generate([1, 5, 9], 30, Sampling(1.0, seed=7)))
    assert first == list(Generator(runner, 64).generate([1, 5, 9], 30, Sampling(1.0, seed=7)))
    stopped = list(Generator(runner, 64).generate([1, 5, 9], 30, Sampling(1.0, seed=7), stop_ids=[first[10]]))
    assert stopped == first[: first.index(first[10])]


def test_a_second_turn_reuses_the_cache(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    runner = Runner(load_llama(open_model(tmp_path / "model"), torch.float32))
    kept = Generator(runner, 64)
    list(kept.generate([1, 5, 9], 8, Sampling(0.0)))
    prompt = [*kept.tokens, 3, 4]
    with torch.no_grad():
        again = kept.prefill(prompt)
        fresh = Generator(runner, 64).prefill(prompt)
    torch.testing.assert_close(again, fresh, atol=TOLERANCE, rtol=0)
