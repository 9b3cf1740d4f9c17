"""Post-training quantization on a function that runs the data: fold, observe, round, convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_quant.algorithms import get_algorithms
from lightning_quant.calibration import evaluating, observing
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.fitting import add_notes
from lightning_quant.fold import eagerly
from lightning_quant.nn.experts import make_unreached_dynamic
from lightning_quant.passes import Passes
from lightning_quant.plan import Plan, plan_model
from lightning_quant.preflight import Estimate, check_layers, check_memory, estimate, measure, note_large_groups, survey
from lightning_quant.recipe import Recipe
from lightning_quant.sequential import Options, has_transforms, input_path, run_algorithms, transform_whole, untie_floats
from lightning_quant.surgery import apply_plan, fake_modules, pack_all
from lightning_quant.work import Work


def check(model: nn.Module, recipe: Recipe, has_data: bool) -> Plan:
    """Everything that can be refused before the model is copied.

    Raises:
        ValueError: unknown algorithms, a recipe that quantizes nothing, static activations or algorithms without data.
    """
    get_algorithms(recipe)
    if recipe.algorithms and not has_data:
        names = ", ".join(recipe.algorithms)
        raise ValueError(f"the recipe's algorithms ({names}) need data: give batches, dataloaders or a datamodule")
    plan = _plan(model, recipe, warn=True)
    static = [match.name for match in plan.matches if match.scheme.needs_data]
    if static and not has_data:
        raise ValueError(
            f"the recipe has static activations ({', '.join(static[:3])}{', ...' * (len(static) > 3)}), whose ranges come from "
            f"data: give batches, dataloaders or a datamodule, or use a dynamic or weight-only recipe (w8a8-dynamic, w4a16, ...)"
        )
    return plan


def _plan(model: nn.Module, recipe: Recipe, example: Callable[[], Any] | None = None, warn: bool = False) -> Plan:
    plan = plan_model(model, recipe, example, warn=warn, training=False)
    note_large_groups(plan)
    return plan


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    run: Callable[[], None] | None = None,
    example: Callable[[], Any] | None = None,
    options: Options | None = None,
    batches: int = 1,
) -> nn.Module:
    """Quantize a float model that is the caller's to change.

    Args:
        model: float; its modules become fake-quantized ones. Its parameters may share their storage with another model's: they get
            new storage where they change.
        run: passes the calibration data through `model`, the same in every pass; may be None if the recipe needs none.
        example: passes one batch through `model`, to see what it goes through.
        options: of algorithms.
        batches: how many there are at most, for what algorithms will take.

    Returns:
        the packed model, a new object.

    Raises:
        ValueError: see `preflight.check_memory` and `preflight.check_layers`; or the `work_dir` is another run's.
    """
    options = options or Options()
    with eagerly(), evaluating(model):
        apply_plan(model, _plan(model, recipe, example), training=False)  # `check` has warned
        if not recipe.algorithms:
            if run is not None and needs_data(model):
                _find_ranges(model, run)
        else:
            assert run is not None  # `check` has seen to it
            assert example is not None
            _run_algorithms(model, recipe, run, example, options, batches)
    return pack_all(model)


def _find_ranges(model: nn.Module, run: Callable[[], None]) -> None:
    with observing(model):
        run()
    add_notes(model, make_unreached_dynamic(fake_modules(model)))


def _run_algorithms(
    model: nn.Module, recipe: Recipe, run: Callable[[], None], example: Callable[[], Any], options: Options, batches: int
) -> None:
    algorithms = get_algorithms(recipe)
    check_layers(model, algorithms)
    untie_floats(model)
    layout, seen = survey(model, recipe, example)
    check_memory(estimate(model, recipe, layout, seen, batches, options))
    transform_whole(model, recipe, run, example)
    data = (0, 0)
    if options.work_dir is not None or input_path(algorithms) == "both":
        run = passes = Passes(model, run, example)
        data = passes.fingerprint()
    work = Work(options.work_dir, model, recipe, data)
    if needs_data(model) and not has_transforms(algorithms):  # else ranges are found after the transforms
        _find_ranges(model, run)
    run_algorithms(model, recipe, run, example, layout, work, options)


def estimate_model(model: nn.Module, recipe: Recipe, example: Callable[[], Any], batches: int, options: Options) -> Estimate:
    """What `quantize_model` with algorithms would take; runs one batch, in float. The model is the caller's to change.

    Args:
        batches: how many there are at most.

    Raises:
        ValueError: see `quantize_model`.
    """
    with eagerly(), evaluating(model):
        apply_plan(model, _plan(model, recipe, example), training=False)
        algorithms = get_algorithms(recipe)
        check_layers(model, algorithms)
        found = measure(model, recipe, example, batches, options)
    check_memory(found)
    return found


def needs_data(model: nn.Module) -> bool:
    """Whether a prepared model has activation ranges to find."""
    found: list[FakeQuantize] = [quantizer for module in fake_modules(model).values() for _, quantizer in module.quantizers()]
    return any(not quantizer.is_weight and not quantizer.spec.dynamic for quantizer in found)
