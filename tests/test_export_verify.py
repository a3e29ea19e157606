"""The proof of an export accepts readers that are known to be right and rejects those known to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from adapters import PROMPT, job_for, random_adapter
from torch import Tensor

import edgetune
from edgetune.export import verify
from edgetune.export.job import Job, UserFile
from edgetune.export.memory import StageMemory, sufficient_memory
from edgetune.export.verify import Agreement, Bound, Golden
from edgetune.library.base_models import resolve
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.ops_types import Segment

DEMO = Path(edgetune.__file__).parent / "demo"
FORMS = [("gguf", "q8_0"), ("gguf", "bf16"), ("hf", "bf16"), ("coreml", "nf4"), ("gguf", "f16"), ("peft", "")]


class Fixed:
    """A reader that returns fixed logits."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def logits(self, ids: Sequence[int]) -> Tensor:
        return self._logits


@pytest.fixture(scope="module")
def job() -> Job:
    """Return a job for the demo with an adapter whose effect, KL 0.4, is about that of training on notes."""
    base = open_model(DEMO)
    return job_for(base, random_adapter(base.config, size=0.06))


@pytest.fixture(scope="module")
def expected(job: Job) -> Golden:
    return verify.golden(job, PROMPT, job.model())


def read_as(job: Job, adapter: Adapter | None, expected: Golden) -> Fixed:
    """Return a reader that is right except for its adapter."""
    model = replace(job, adapter=adapter).model()
    positions, n = torch.arange(len(expected.ids)), len(expected.ids)
    with torch.no_grad():
        h = verify.Runner(model).infer(torch.tensor(expected.ids), positions, [Segment(0, n, 0, n)], None)
        return Fixed(model.logits(h).float())


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_without_its_k_proj_or_with_nine_tenths_of_its_scale_is_no_proof(
    form: tuple[str, str], job: Job, expected: Golden
) -> None:
    bound, adapter = verify.BOUNDS[form], job.needed_adapter()
    assert expected.kl_of_adapter is not None
    assert 0.1 < expected.kl_of_adapter < 1.0
    assert verify.compare(expected, read_as(job, adapter, expected), bound).holds(bound)
    tensors = {key: tensor * (key[1] != "k_proj") for key, tensor in adapter.tensors.items()}
    weaker = replace(adapter.config, alpha=0.9 * adapter.config.alpha)
    for wrong in (replace(adapter, tensors=tensors), replace(adapter, config=weaker)):
        assert not verify.compare(expected, read_as(job, wrong, expected), bound).holds(bound)


def test_the_loss_of_a_weak_adapter_is_seen_where_every_figure_is_small(job: Job) -> None:
    """An adapter that changes less than q8_0's rounding is measured by its own effect; one without effect is not measured."""
    bound, base = verify.BOUNDS["gguf", "q8_0"], open_model(DEMO)
    weak = replace(job, adapter=random_adapter(base.config, size=2e-4))
    expected = verify.golden(weak, PROMPT, weak.model())
    assert expected.kl_of_adapter is not None
    assert verify.LEAST_EFFECT < expected.kl_of_adapter < bound.kl / 5
    found = verify.compare(expected, read_as(weak, None, expected), bound)
    assert found.faults(bound) == ["KL is 100% of the adapter's effect (at most 50%)"]
    assert verify.compare(expected, read_as(weak, weak.adapter, expected), bound).holds(bound)
    new = replace(job, adapter=random_adapter(base.config, size=0.0))
    expected = verify.golden(new, PROMPT, new.model())
    found = verify.compare(expected, read_as(new, None, expected), bound)
    assert expected.kl_of_adapter == 0.0
    assert found.adapter_lost is None
    assert found.holds(bound)


@pytest.mark.parametrize(("share", "said"), [(1.0, None), (0.9, "90% of the adapter"), (0.0, "0% of the adapter")])
def test_what_an_adapter_changes_is_compared_where_the_reader_rounds_the_base_otherwise(
    job: Job, share: float, said: str | None
) -> None:
    """The bounds grow by what the two bases differ, and noise hides no missing tenth of the adapter."""
    mine = replace(job, user_file=UserFile(Path("demo.gguf"), "demo", "Q4_1", 1))
    expected = verify.golden(mine, PROMPT, mine.model())
    assert expected.bare is not None
    noise, other_noise = (0.1 * torch.randn(expected.logits.shape) for _ in range(2))
    beside, effect = expected.beside(expected.bare + noise), expected.logits - expected.bare
    bound = verify.BOUNDS["gguf", ""].of(beside)
    assert bound.mean_logit == pytest.approx(verify.EXACT.mean_logit + 2 * float(noise.abs().mean()))
    assert bound.max_logit == pytest.approx(verify.EXACT.max_logit + 5 * float(noise.abs().max()))
    found = verify.compare(beside, Fixed(expected.bare + share * effect + other_noise), bound)
    assert found.applied == pytest.approx(share, abs=0.02)
    centred = effect - effect.mean(1, keepdim=True)  # no softmax sees what is added to a whole row
    assert found.applied_within == pytest.approx(0.05 + 0.75 * float(noise.norm() / centred.norm()) ** 2, rel=0.02)
    assert found.adapter_lost is None
    assert found.holds(bound) is (said is None)
    assert said is None or any(said in fault for fault in found.faults(bound))


def test_a_reader_with_another_vocabulary_or_an_adapter_without_effect_is_compared_as_ever(job: Job) -> None:
    mine = replace(job, user_file=UserFile(Path("demo.gguf"), "demo", "Q4_1", 1))
    expected = verify.golden(mine, PROMPT, mine.model())
    assert expected.beside(torch.zeros(len(expected.ids), 7)) is expected
    new = replace(mine, adapter=random_adapter(job.base.config, size=0.0))
    expected = verify.golden(new, PROMPT, new.model())
    assert expected.bare is not None
    beside = expected.beside(expected.bare + 0.1)
    found = verify.compare(beside, Fixed(expected.logits), verify.EXACT.of(beside))
    assert found.applied is None
    assert found.holds(verify.EXACT.of(beside))


def test_golden_says_nothing_of_the_bare_base_in_its_file_or_without_an_adapter(job: Job, expected: Golden) -> None:
    bound = verify.BOUNDS["peft", ""]
    assert set(expected.as_dict(bound)) == {
        "format", "prompt_tokens", "token_ids", "top_token_ids", "top_logits", "bounds"
    }  # fmt: skip
    bare = replace(job, adapter=None)
    assert verify.golden(bare, PROMPT, bare.model()).kl_of_adapter is None


def test_a_bound_grows_with_what_rounding_does_to_a_model_and_never_shrinks(expected: Golden) -> None:
    """The bounds of exact forms stay, and so does the share of the adapter that may be lost."""
    bound = verify.BOUNDS["hf", "bf16"]
    largest, mean, kl = verify.MOVED_BY_BF16
    moved = bound.of(replace(expected, moved_by_bf16=(2 * largest, mean / 2, 3 * kl)))
    assert moved == Bound(2 * bound.max_logit, bound.mean_logit, pytest.approx(3 * bound.kl), bound.lost)
    assert verify.BOUNDS["peft", ""].of(replace(expected, moved_by_bf16=(9.0, 9.0, 9.0))) == verify.BOUNDS["peft", ""]
    assert bound.of(replace(expected, moved_by_bf16=None)) == bound


def test_bf16_may_round_a_real_model_as_much_as_it_does_and_a_tenth_of_the_adapter_is_still_missed(expected: Golden) -> None:
    """SmolLM2 after a whole run: bf16 blocks move it by a KL of 1.035e-3, merged weights in bf16 by 9.53e-4."""
    bound = verify.BOUNDS["hf", "bf16"].of(replace(expected, moved_by_bf16=(0.950, 0.0838, 1.035e-3)))
    assert verify.Agreement(0.741, 0.0697, 9.53e-4, True, 0.01).holds(bound)
    assert not verify.Agreement(0.741, 0.0697, 3e-3, True, 0.01).holds(bound)
    assert not verify.Agreement(0.741, 0.0697, 9.53e-4, True, 0.1).holds(bound)


def test_trying_what_rounding_does_leaves_the_reference_as_it_was(job: Job, expected: Golden) -> None:
    model = job.model()
    found = verify.golden(job, PROMPT, model, rounds=True)
    assert torch.equal(found.logits, expected.logits)
    assert found.kl_of_adapter == expected.kl_of_adapter
    assert model.dtype == torch.float32
    assert found.moved_by_bf16 is not None
    assert all(0.1 < a / b < 10 for a, b in zip(found.moved_by_bf16, verify.MOVED_BY_BF16, strict=True))


def test_only_a_tie_may_go_either_way() -> None:
    """Tokens may swap if their gap is within twice a correct export's change of logits, not within the whole bound."""
    bound = Bound(max_logit=0.5, mean_logit=0.5, kl=0.5)
    logits = torch.zeros(3, 8)
    for gap, holds in ((0.19, True), (0.21, False)):
        logits[:, 1], logits[:, 2] = 5.0 + gap, 5.0
        swapped = logits.clone()
        swapped[:, 1], swapped[:, 2] = 5.0, 5.0 + gap
        found = verify.compare(Golden(1, [0, 1, 1], logits.clone()), Fixed(swapped), bound)
        assert found.holds(bound) is holds
        assert found.faults(bound) == ([] if holds else ["the greedy text is different (expected the same)"])


def test_every_figure_that_is_out_of_bounds_is_named() -> None:
    bound = Bound(0.1, 0.01, 1e-3)
    assert Agreement(0.2, 0.02, 2e-3, False, 0.5).faults(bound) == [
        "logits differ by up to 0.2 (at most 0.1)",
        "logits differ by 0.02 on average (at most 0.01)",
        "KL is 0.002 (at most 0.001)",
        "KL is 50% of the adapter's effect (at most 5%)",
        "the greedy text is different (expected the same)",
    ]
    assert Agreement(float("nan"), 0.0, 0.0, True).faults(bound) == ["logits differ by up to nan (at most 0.1)"]


@pytest.mark.parametrize("family", ["demo", "dense"])
@pytest.mark.parametrize("models", [(0,), (1,), (2,), (0, 1), (2, 1, 0)])
def test_an_amount_that_is_accepted_holds_what_it_makes_of_the_layers(
    tmp_path: Path, family: str, models: tuple[int, ...]
) -> None:
    """With more memory, layers may be loaded (a dense base's as fp32) instead of streamed; the peak stays within it anyway."""
    if family == "dense":
        tiny.save_model(tmp_path / "dense")
    base = open_model(resolve("demo").path if family == "demo" else tmp_path / "dense")
    stages = [StageMemory((20 - n) * base.config.linear_parameters // 10, count) for n, count in enumerate(models)]
    regimes = set()
    for share in range(1, 200):
        memory = share * base.config.linear_parameters // 8
        needed = [stage.needed(base, memory) for stage in stages]
        accepted = sufficient_memory(stages, base, memory)
        assert all(stage.needed(base, accepted) <= accepted for stage in stages)
        assert accepted == memory if max(needed) <= memory else accepted > memory
        regimes.add(tuple(needed))
    assert len(regimes) == (1 if models == (0,) else 2)
