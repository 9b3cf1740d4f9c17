"""Units as the engine hands them to algorithms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_quant.activations import Budget
from lightning_quant.blocks import Unit, find_layout, units
from lightning_quant.calibration import observing, run_batches
from lightning_quant.outputs import summing_outputs
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantScheme
from lightning_quant.surgery import prepare


@contextlib.contextmanager
def _collected(unit: Unit) -> Iterator[None]:
    with summing_outputs(unit.modules) as sums:
        yield
    unit.statistics["outputs"] = sums


def make_unit(layers: list[nn.Module], batches: list[Tensor], recipe: QuantScheme | Recipe) -> Unit:
    """The first unit of layers in sequence: prepared, with ranges of inputs, calls, float targets, and sums of outputs."""
    model = prepare(nn.Sequential(*layers).eval(), recipe, training=False)
    run = lambda: run_batches(model, batches, len(batches)) and None  # noqa: E731
    with torch.no_grad():
        with observing(model):
            run()
        layout = find_layout(model, lambda: run_batches(model, batches, 1) and None)
        walk = units(model, run, layout, Budget(), path="both", collect=_collected)
        unit = next(walk)
    unit.shared["walk"] = walk  # it clears what it has handed out once it is gone
    for module in unit.modules.values():
        module.observe_weights()
    return unit


@contextlib.contextmanager
def quantized(unit: Unit) -> Iterator[None]:
    """All of a unit's modules run quantized, without gradients."""
    parts = [(part, part.quantizing) for module in unit.modules.values() for _, part in module.quantizers()]
    for part, _ in parts:
        part.quantizing = True
    with torch.no_grad():
        yield
    for part, before in parts:
        part.quantizing = before


def unit_error(unit: Unit) -> float:
    """The squared error of the unit's quantized output."""
    assert unit.calls is not None
    assert unit.targets is not None
    with quantized(unit):
        return sum((unit.output(index) - unit.targets[index]).square().sum().item() for index in range(len(unit.calls)))
