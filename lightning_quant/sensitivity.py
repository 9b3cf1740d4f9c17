"""`lq.sensitivity`: quantizes one layer at a time and measures what the model loses, on data found as by `lq.quantize`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from lightning_quant.algorithms import get_algorithms
from lightning_quant.calibration import Forward, evaluating, has_ranks, observing, share_buffers
from lightning_quant.fold import eagerly
from lightning_quant.loop import _quiet_trainer
from lightning_quant.mixed import SHARED, Choice, Sensitivity
from lightning_quant.plan import Match, Plan, plan_model
from lightning_quant.probes import Batches, LossProbe, MetricProbe, OutputProbe, Probe, Score
from lightning_quant.quantize import _check_copyable, _copy, _find_runner, _kept_rng, _uncompiled
from lightning_quant.recipe import Recipe, as_recipe
from lightning_quant.report import plan_summary
from lightning_quant.sharding import is_sharded, plain_copy
from lightning_quant.spec import QuantScheme
from lightning_quant.surgery import apply_plan, fake_modules


def sensitivity(
    model: nn.Module,
    recipes: Sequence[str | Recipe | QuantScheme | dict[str, Any]],
    *,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    datamodule: L.LightningDataModule | None = None,
    dataloaders: Any = None,
    trainer: L.Trainer | None = None,
    by: str = "sqnr",
    metric_mode: Literal["max", "min"] | None = None,
    calibration_batches: int = 4,
) -> Sensitivity:
    """Quantize each layer alone with each recipe, everything else in float, and measure what the model loses.

    Weights are rounded to nearest, whatever algorithms the recipes name (Pandey et al. 2023, arXiv:2302.05397, phase 1). It takes
    layers x recipes x batches forward passes. The model given is not changed.

    Args:
        model: a float `nn.Module` or `LightningModule`.
        recipes: presets, schemes or Recipes to choose from. They need the same observers, `fold` and `blocks`.
        batches, forward, datamodule, dataloaders, trainer: the data and the step, as in `lq.quantize`; batches are fetched once.
        by: `"sqnr"`: the signal-to-quantization-noise ratio of the final output: the `logits` or the largest float tensor of what
            `forward` or the model returns, or of the last part that a LightningModule's step calls. `"loss"`: the increase of what
            `forward` returns, of the output's `.loss`, or of what `validation_step`, else `training_step`, returns. Any other name:
            a metric that `trainer.validate` logs.
        metric_mode: for a metric: whether it is better at `"max"` or `"min"`.
        calibration_batches: how many batches calibrate static activations and are measured on; validation batches for a metric.

    Returns:
        the costs, for `lq.allocate` and `lq.plot_sensitivity`.

    Raises:
        ValueError: a recipe does not fit the model or the others, there is no data, or the output holds nothing to measure.

    Warns:
        UserWarning: no batch reached a layer; it is left out, and stays in float.

    Example:
        >>> import torch, lightning_quant as lq
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> found = lq.sensitivity(net, ["w4a16", "w8a16"], batches=[torch.randn(16, 64)])
        >>> [(choice.layer, choice.recipe) for choice in found.choices]
        [('0', 'w4a16'), ('0', 'w8a16'), ('2', 'w4a16'), ('2', 'w8a16')]
    """
    if isinstance(calibration_batches, bool) or not isinstance(calibration_batches, int) or calibration_batches < 1:
        raise ValueError(f"calibration_batches={calibration_batches!r}: must be a positive int")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    named = _named(recipes)
    in_metric = _check_by(model, by, metric_mode, batches, forward)
    if trainer is not None and getattr(trainer, "fast_dev_run", False):
        calibration_batches = 1
    if is_sharded(model):
        model = plain_copy(model)
        if has_ranks():
            share_buffers(model)
    plans = [plan_model(model, recipe, training=False) for recipe in named.values()]
    units = _Units(model, plans)
    _check_copyable(model)
    in_loop = isinstance(model, L.LightningModule) and batches is None
    kept = Batches(forward, (trainer or _quiet_trainer()) if in_loop else None)
    runner = _find_runner(model, batches, kept.keep, datamodule, dataloaders, kept.trainer)
    if runner is None and not (in_metric and not any(match.scheme.needs_data for plan in plans for match in plan.matches)):
        raise ValueError("costs are measured on data: give batches, dataloaders or a datamodule")
    del plans
    probe: Probe = OutputProbe(kept)
    if by == "loss":
        probe = LossProbe(kept)
    if in_metric:
        assert metric_mode is not None
        assert kept.trainer is not None
        if datamodule is None and dataloaders is None:
            datamodule = getattr(kept.trainer, "datamodule", None)
        probe = MetricProbe(by, metric_mode, kept.trainer, datamodule, dataloaders, calibration_batches)
    with eagerly(), _kept_rng():
        if runner is not None:
            runner(_uncompiled(_copy(model)), calibration_batches)
        choices = _measure(model, named, units, kept, probe)
    count = calibration_batches if in_metric else len(kept.kept)
    return Sensitivity(by, tuple(choices), named, count, probe.baseline, metric_mode)


# --- what can be refused before work starts -------------------------------------------------------------------------


def _named(recipes: Any) -> dict[str, Recipe]:
    """Label -> recipe."""
    if isinstance(recipes, (str, Recipe, QuantScheme, dict)) or not isinstance(recipes, Iterable):
        raise ValueError(f"recipes={recipes!r}: give a list of recipes to choose from, such as ['w2a16', 'w4a16', 'w8a16']")
    named: dict[str, Recipe] = {}
    for given in recipes:
        recipe = as_recipe(given)
        get_algorithms(recipe)
        label = given if isinstance(given, str) else recipe.scheme.label if recipe.scheme else "schemes"
        alike = sum(other.partition(" #")[0] == label for other in named)
        named[f"{label} #{alike + 1}" if alike else label] = recipe
    if not named:
        raise ValueError("recipes is empty: give the recipes to choose from")
    first_label, first = next(iter(named.items()))
    for label, recipe in named.items():
        for key in SHARED:
            if getattr(recipe, key) != getattr(first, key):
                raise ValueError(
                    f"recipes {first_label!r} and {label!r} differ in {key} ({getattr(first, key)!r}, {getattr(recipe, key)!r}), "
                    f"of which a mixed recipe has one: give all the same"
                )
    return named


def _check_by(model: nn.Module, by: str, mode: str | None, batches: Any, forward: Any) -> bool:
    """Whether `by` is a metric."""
    if by in ("sqnr", "loss"):
        if mode is not None:
            raise ValueError(f"metric_mode={mode!r}: only for a metric, not by={by!r}")
        return False
    if mode not in ("max", "min"):
        raise ValueError(
            f"by={by!r}, metric_mode={mode!r}: by is 'sqnr', 'loss', or the name of a validation metric, and a metric needs "
            f"metric_mode='max' or 'min' to say which is better"
        )
    if batches is not None or forward is not None:
        raise ValueError(f"by={by!r} is what trainer.validate logs: give dataloaders or a datamodule, and no batches or forward")
    if not isinstance(model, L.LightningModule) or not is_overridden("validation_step", model):
        raise ValueError(
            f"by={by!r} is what trainer.validate logs, but {type(model).__name__} is no LightningModule with a validation_step: "
            f"use by='sqnr' or 'loss'"
        )
    return True


# --- layers ---------------------------------------------------------------------------------------------------------


def _weights(match: Match) -> list[int]:
    return [id(value) for value in match.module._parameters.values() if value is not None and value.dim() > 1]


@dataclass
class _Option:
    """A unit under one recipe: the fake modules' names to switch on, and the choice but for its cost."""

    unit: int
    names: list[str]
    choice: Choice


class _Units:
    """What is quantized together: modules that share a weight, attention and its `out_proj`, a place's experts; else one module."""

    def __init__(self, model: nn.Module, plans: list[Plan]) -> None:
        groups: list[tuple[set[object], list[str]]] = []  # tokens by which groups join, places
        self.weight: dict[str, object] = {}  # name -> what it shares with modules of the same weight
        for match in (match for plan in plans for match in plan.matches):
            place = match.place or match.name
            own = place == match.name
            weights = tuple(_weights(match)) if own else ()
            self.weight[match.name] = weights or match.name
            tokens: set[object] = {place, *weights, id(match.module)}
            if isinstance(match.module, nn.MultiheadAttention):
                tokens.add(id(match.module.out_proj))
            joined = [group for group in groups if group[0] & tokens]
            groups = [group for group in groups if not group[0] & tokens]
            places = [name for group in joined for name in group[1]]
            groups.append((tokens.union(*(group[0] for group in joined)), places + [place] * (place not in places)))
        order = {name: index for index, (name, _) in enumerate(model.named_modules())}
        ranked = [sorted(places, key=lambda place: order[place.partition(".*.")[0]]) for _, places in groups]
        self.places = sorted(ranked, key=lambda places: order[places[0].partition(".*.")[0]])
        self.sizes: dict[str, dict[str, tuple[int, int]]] = {}  # place -> name -> (weights, float bytes)
        for plan in plans:
            for match, row in zip(plan.matches, plan_summary(model, plan).rows, strict=True):
                numel = row.bytes_before // next(match.module.parameters()).element_size()
                self.sizes.setdefault(match.place or match.name, {})[match.name] = (numel, row.bytes_before)

    def options(self, model: nn.Module, plan: Plan, label: str) -> list[_Option]:
        """The units that a plan quantizes, in the model's order."""
        rows = {match.name: (match, row) for match, row in zip(plan.matches, plan_summary(model, plan).rows, strict=True)}
        found = []
        for unit, places in enumerate(self.places):
            names = [name for place in places for name in self.sizes[place]]
            here = [name for name in names if name in rows]
            if not here:
                continue
            schemes = {place: self._scheme(place, {name: rows[name][0].scheme for name in here}) for place in places}
            packed = {(self.weight[name], rows[name][0].scheme.weight): rows[name] for name in here}
            numels = {self.weight[name]: size for place in places for name, size in self.sizes[place].items()}
            left = {self.weight[name]: numels[self.weight[name]][1] for name in names if name not in rows}
            codes = sum(numels[key][0] * spec.bits for key, spec in packed if spec is not None)
            choice = Choice(
                layer=places[0],
                type=rows[here[0]][1].type,
                recipe=label,
                schemes=schemes,
                numel=sum(size[0] for size in numels.values()),
                code_bits=codes + 8 * sum(left.values()),
                bytes=sum(row.bytes_after for _, row in packed.values()) + sum(left.values()),
                float_bytes=sum(size[1] for size in numels.values()),
                cost=float("nan"),
            )
            found.append(_Option(unit, here, choice))
        return found

    def _scheme(self, place: str, schemes: dict[str, QuantScheme]) -> QuantScheme | None:
        mine = [schemes.get(name) for name in self.sizes[place]]
        if len(set(mine)) > 1:
            raise ValueError(
                f"{place}: a recipe gives these experts different schemes, but they are measured as one: name all alike"
            )
        return mine[0]


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class _Reached:
    """Which prepared modules a pass goes through."""

    names: set[str] = field(default_factory=set)
    handles: list[RemovableHandle] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        for name, fake in fake_modules(model).items():
            for _, part in fake.quantizers():
                self.handles.append(part.register_forward_pre_hook(lambda *_, name=name: self.names.add(name)))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _measure(model: nn.Module, recipes: dict[str, Recipe], units: _Units, kept: Batches, probe: Probe) -> list[Choice]:
    found: dict[int, list[Choice]] = {}
    known: dict[tuple[int, str], float] = {}
    missed: set[str] = set()
    with tqdm(total=len(recipes) * len(units.places), desc="sensitivity", unit="layer", disable=None) as bar:
        for label, recipe in recipes.items():
            working = _uncompiled(_copy(model))
            options = _prepare(working, recipe, units, kept, label)
            reached = _Reached()
            reached.watch(working)

            def measure(
                score: Score, working: nn.Module = working, options: list[_Option] = options, reached: _Reached = reached
            ) -> None:
                reached.stop()
                fakes = fake_modules(working)
                for option in options:
                    bar.update()
                    if not reached.names & set(option.names):
                        missed.add(option.choice.layer)
                        continue
                    key = option.unit, repr(sorted(option.choice.schemes.items()))
                    if key not in known:
                        parts = [part for name in option.names for _, part in fakes[name].quantizers()]
                        for part in parts:
                            part.quantizing = True
                        known[key] = score()
                        for part in parts:
                            part.quantizing = False
                    found.setdefault(option.unit, []).append(Choice(**{**vars(option.choice), "cost": known[key]}))

            probe.session(working, measure)
            bar.update(len(units.places) - len(options))
    if missed:
        told = ", ".join(sorted(missed))
        if not found:
            raise ValueError(f"no batch reached any of the layers that the recipes quantize ({told})")
        warnings.warn(f"no batch reached {told}: nothing is known of what they cost, and they stay in float", stacklevel=3)
    return [choice for unit in sorted(found) for choice in found[unit]]


def _prepare(working: nn.Module, recipe: Recipe, units: _Units, kept: Batches, label: str) -> list[_Option]:
    """Give a copy its quantizers, all off, with ranges from the data."""

    def first() -> None:
        next(kept.run(working))

    def each() -> None:
        for _ in kept.run(working):
            pass

    example = (lambda: kept.inside(working, first)) if kept.kept else None
    plan = plan_model(working, recipe, example, warn=False, training=False)
    options = units.options(working, plan, label)
    with evaluating(working):
        apply_plan(working, plan, training=False)
    if any(match.scheme.needs_data for match in plan.matches):
        with observing(working):
            kept.inside(working, each)
    return options
