"""LoftQ against what its paper says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.loftq import loftq, round_to_grid
from lightning_quant.spec import QuantSpec

SPECS = [
    QuantSpec(4, "nf4", granularity="group", group_size=64),
    QuantSpec(4, "nf4", granularity="group", group_size=64, double_quant=True),
    QuantSpec(4, granularity="group", group_size=32),
    QuantSpec(2, granularity="group", group_size=32, symmetric=False),
    QuantSpec(8, "float8_e4m3fn"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_the_grid_is_that_of_packing(spec: QuantSpec) -> None:
    weight = torch.randn(24, 96)
    rounded = round_to_grid(weight, spec)
    packed = lq.quantize(with_weight(weight), lq.Recipe(lq.QuantScheme(spec)))
    assert torch.equal(packed[0].dequantized_weight(), rounded)


def with_weight(weight: torch.Tensor) -> nn.Module:
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[0].weight.data = weight
    return net


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_iterations_bring_the_sum_closer(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 6) @ torch.randn(6, 96) + 0.3 * torch.randn(48, 96)
    errors = []
    for iterations in (0, 1, 5):
        rest, down, up = loftq(weight, spec, 8, iterations)
        errors.append((weight - round_to_grid(rest, spec) - up @ down).norm().item())
    assert errors[1] < errors[0]
    assert errors[2] <= 1.02 * errors[1]


def test_the_low_rank_term_is_the_best_one() -> None:
    weight, spec = torch.randn(32, 64), SPECS[2]
    rest, down, up = loftq(weight, spec, 4)
    assert torch.equal(rest, weight)
    error = weight - round_to_grid(weight, spec)
    values = torch.linalg.svdvals(error)
    assert (error - up @ down).norm().item() == pytest.approx(values[4:].norm().item(), rel=5e-3)


def test_it_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    weight, state = torch.randn(32, 64), torch.get_rng_state()
    first = loftq(weight, SPECS[0], 4, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert all(map(torch.equal, first, loftq(weight, SPECS[0], 4, 3)))


def test_a_rank_above_the_weights_own() -> None:
    rest, down, up = loftq(torch.randn(4, 64), SPECS[0], 8)
    assert down.shape == (8, 64)
    assert up.shape == (4, 8)
    assert rest.shape == (4, 64)
