"""Rounding with error feedback preserves products with the inputs, and a refined absmax preserves them better still."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model
from torch import Tensor

from edgetune.runtime import error_feedback, nf4
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, QuantConfig
from edgetune.runtime.error_feedback import Feedback, nearest, rounded_layers, with_feedback
from edgetune.runtime.errors import ModelError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.names import linear_weight
from edgetune.runtime.nf4_grid import FACTORS, Nf4Grid, refined_absmax
from edgetune.runtime.runner import Runner

QUANT = QuantConfig()


def correlated(count: int, columns: int, seed: int) -> Tensor:
    """Return inputs (count, columns) that correlate and differ in size, as those of a model do; all seeds share a mixture."""
    mixture = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(0, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns // 4, generator=generator) @ mixture
    return (x + 0.5 * torch.randn(count, columns, generator=generator)) * sizes


def error(rounded: nf4.QuantizedTensor, weight: Tensor, x: Tensor) -> float:
    """Return the mean squared error of the products with x (N, in)."""
    return float((x @ (nf4.dequantize(rounded, torch.float32) - weight).T).square().mean())


@pytest.mark.parametrize("columns", [128, 96])  # blocks of 64 cross the rows of 96
def test_feedback_keeps_products_that_nearest_loses_also_with_inputs_it_has_not_seen(columns: int) -> None:
    weight = torch.randn(96, columns) * 0.05
    seen, unseen = correlated(2048, columns, 2), correlated(2048, columns, 3)
    feedback = Feedback.of(seen)
    plain, refined = Nf4Grid.of(weight, QUANT), Nf4Grid.of(weight, QUANT, feedback.power)
    for x in (seen, unseen):
        near = error(plain.weight(nearest(weight, plain)), weight, x)
        for grid in (plain, refined):
            assert error(grid.weight(with_feedback(weight, grid, feedback)), weight, x) < 0.5 * near


@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (3, 7)])
def test_a_refined_absmax_has_the_smaller_weighted_error(shape: tuple[int, int]) -> None:
    """An input that is never used weighs nothing: the others then get the finer steps of a smaller absmax."""
    weight, power = torch.randn(shape), torch.logspace(0, 3, shape[1])
    absmax = nf4.quantize(weight, double_quant=False).state.absmax
    refined = refined_absmax(weight, absmax, power, 64)
    single = QuantConfig(double_quant=False)
    own, better = Nf4Grid.of(weight, single), Nf4Grid.of(weight, single, power)
    losses = [
        float(((nf4.dequantize(grid.weight(nearest(weight, grid)), torch.float32) - weight).square() * power).sum())
        for grid in (own, better)
    ]
    assert losses[1] < losses[0]
    assert torch.equal(better.weight(nearest(weight, better)).state.absmax, refined)
    assert torch.isin((refined / absmax).mul(100).round() / 100, torch.tensor(FACTORS)).all()
    outlier, unused = torch.tensor([[1.0] + [0.74] * 63]), torch.tensor([0.0] + [1.0] * 63)
    assert refined_absmax(outlier, torch.ones(1), unused, 64).item() == pytest.approx(0.74)  # the code of 1 is then exact


@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (3, 7)])
def test_the_nearest_codes_are_the_quantisers_own(shape: tuple[int, int]) -> None:
    """Few codes differ: ours are nearest for the doubly quantised scales, which nf4.quantize does not know yet."""
    weight = torch.randn(shape)
    grid, quantized = Nf4Grid.of(weight, QUANT), nf4.quantize(weight)
    ours = grid.weight(nearest(weight, grid))
    assert torch.equal(ours.state.absmax, quantized.state.absmax)
    expected, found = (nf4.dequantize(each, torch.float32) for each in (quantized, ours))
    assert (found - weight).abs().sum() <= (expected - weight).abs().sum() + 1e-4
    assert (found != expected).float().mean() < 0.1


def test_a_weight_that_is_on_the_grid_already_stays_as_it_is() -> None:
    """A base that was 4-bit before loses nothing: its own absmax is the best, and no error is fed back."""
    weight = nf4.dequantize(nf4.quantize(torch.randn(32, 128), double_quant=False), torch.float32)
    feedback = Feedback.of(correlated(512, 128, 2))
    grid = Nf4Grid.of(weight, QuantConfig(double_quant=False), feedback.power)
    rounded = grid.weight(with_feedback(weight, grid, feedback))
    assert torch.equal(nf4.dequantize(rounded, torch.float32), weight)


@pytest.mark.parametrize("piece", [1024, 16, 10])
def test_the_factor_is_the_cholesky_factor_of_the_inverse_however_many_pieces_it_is_made_in(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_feedback, "_PIECE", piece)
    x = correlated(400, 48, 2)
    feedback = Feedback.of(x)
    moment = (x.T @ x).double()
    assert torch.allclose(feedback.power.double(), moment.diagonal(), rtol=1e-5)
    assert (feedback.power[feedback.order].diff() <= 0).all()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(48)
    inverse = damped[feedback.order][:, feedback.order].inverse()
    assert torch.equal(feedback.factor, feedback.factor.triu())
    assert torch.allclose(feedback.factor.double(), torch.linalg.cholesky(inverse, upper=True), rtol=1e-3, atol=1e-7)


def test_inputs_that_are_always_zero_or_not_finite() -> None:
    x = correlated(64, 64, 2)
    x[:, 5] = 0.0
    assert torch.isfinite(Feedback.of(x).factor).all()
    x[3, 7] = torch.inf
    with pytest.raises(ModelError, match="computes inf or NaN on the calibration text"):
        Feedback.of(x)


@pytest.mark.parametrize("family", ["llama-2-grouped", "qwen2", "qwen3", "mistral-window"])
def test_each_linear_sees_the_inputs_that_the_rounded_layers_before_it_make(family: str, tmp_path: Path) -> None:
    """Rounding that changes nothing sees the inputs of the model itself: the walk computes what the runner computes."""
    save_model(tmp_path, family)
    base, documents = open_model(tmp_path), [[1, *range(3, 40)], [1, *range(60, 20, -1)]]
    powers: dict[str, Tensor] = {}

    def keep(name: str, feedback) -> Tensor:
        powers[name] = feedback().power
        return base.dense(name)

    assert list(rounded_layers(base, documents, keep)) == [0, 1]
    assert list(powers) == [linear_weight(layer, name) for layer in range(2) for name in LINEARS]
    runner, inputs = Runner(load_llama(base, torch.float32)), {}
    for document in documents:
        seen = []
        ids = torch.tensor(document)
        segments = [error_feedback.Segment.packed(0, len(ids))]

        def watch(linears, x, seen=seen) -> None:
            seen.append((linears, x))

        assert len(list(runner.layers(ids, torch.arange(len(ids)), segments, watch=watch))) == 2
        for number, (linears, x) in enumerate(seen):
            for place in range(len(linears)):
                inputs[number, place] = inputs.get((number, place), 0) + x.square().sum(0)
    for found, expected in zip(powers.values(), inputs.values(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
