"""Post-training quantization on a function that runs the data: fold, observe, round, convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_quant.algorithms import get_algorithms
from lightning_quant.calibration import evaluating, observing
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.fold import eagerly
from lightning_quant.plan import Plan, plan_model
from lightning_quant.recipe import Recipe
from lightning_quant.surgery import apply_plan, convert, fake_modules


def check(model: nn.Module, recipe: Recipe, has_data: bool) -> Plan:
    """Everything that can be refused before work starts.

    Raises:
        ValueError: unknown algorithms, a recipe that quantizes nothing, or static activations without data.
    """
    get_algorithms(recipe.algorithms)
    if recipe.algorithms and not has_data:
        names = ", ".join(recipe.algorithms)
        raise ValueError(f"the recipe's algorithms ({names}) need data: give batches, dataloaders or a datamodule")
    plan = plan_model(model, recipe)
    static = [match.name for match in plan.matches if match.scheme.needs_data]
    if static and not has_data:
        raise ValueError(
            f"the recipe has static activations ({', '.join(static[:3])}{', ...' * (len(static) > 3)}), whose ranges come from "
            f"data: give batches, dataloaders or a datamodule, or use a dynamic or weight-only recipe (w8a8-dynamic, w4a16, ...)"
        )
    return plan


def quantize_model(
    model: nn.Module, recipe: Recipe, run: Callable[[], None] | None = None, example: Callable[[], Any] | None = None
) -> nn.Module:
    """Quantize a float model that is the caller's to change.

    Args:
        model: float; its modules become fake-quantized ones.
        run: passes the calibration data through `model`; may be None if the recipe needs none.
        example: passes one batch through `model`, to find BatchNorms where tracing does not get through.

    Returns:
        the packed model, a new object.
    """
    with eagerly():
        return _quantize(model, recipe, run, example)


def _quantize(model: nn.Module, recipe: Recipe, run: Callable[[], None] | None, example: Callable[[], Any] | None) -> nn.Module:
    algorithms = get_algorithms(recipe.algorithms)
    with evaluating(model):
        apply_plan(model, plan_model(model, recipe, example, warn=False), training=False)  # `check` has warned
    if run is not None and needs_data(model):
        with observing(model):
            run()
    for algorithm in algorithms:
        assert run is not None  # `check` has seen to it
        algorithm(model, run)
    return convert(model)


def needs_data(model: nn.Module) -> bool:
    """Whether a prepared model has activation ranges to find."""
    found: list[FakeQuantize] = [quantizer for module in fake_modules(model).values() for _, quantizer in module.quantizers()]
    return any(not quantizer.is_weight and not quantizer.spec.dynamic for quantizer in found)
