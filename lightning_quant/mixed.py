"""What quantizing each layer of a model alone costs: `Sensitivity`, as data."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from lightning_quant.recipe import Recipe
from lightning_quant.report import table
from lightning_quant.spec import QuantScheme

# what recipes must agree on to be mixed: a Recipe has one of each
SHARED = ("observer", "observer_options", "weight_observer", "weight_observer_options", "blocks", "fold")


@dataclass(frozen=True)
class Choice:
    """One layer quantized alone with one recipe.

    Args:
        layer: its qualified name; of modules that are quantized together (tied weights, attention and its `out_proj`) the first.
        type: the float module's type.
        recipe: the recipe's label in the `Sensitivity`.
        schemes: qualified name -> scheme (None: float), for every module of the layer.
        numel: weights, shared ones counted once.
        code_bits: of all codes together, without scales.
        bytes: packed, scales and zero points included.
        float_bytes: in float.
        cost: what the model loses, in units that add over layers: see `Sensitivity`.
    """

    layer: str
    type: str
    recipe: str
    schemes: dict[str, QuantScheme | None]
    numel: int
    code_bits: int
    bytes: int
    float_bytes: int
    cost: float

    @property
    def bits(self) -> float:
        """Bits a weight, scales included, as `lq.summary` counts them."""
        return 8 * self.bytes / self.numel


@dataclass(frozen=True)
class Prediction:
    """What a choice for every layer comes to: mean bits a weight of the codes, bytes with scales, and the sum of costs."""

    bits: float
    bytes: int
    cost: float


@dataclass(frozen=True)
class Sensitivity:
    """What each layer costs when it alone is quantized. Prints as a table, the most sensitive layer first.

    Args:
        by: `"sqnr"`: a cost is the noise power over the signal power of the model's output, 10^(-SQNR/10); `"loss"`: the loss's
            increase; else the name of a metric, and a cost is how much worse it gets.
        choices: one a layer and recipe, layers in the model's order.
        recipes: label -> recipe, in the order given.
        batches: how many were measured on.
        baseline: the float model's loss or metric.
        metric_mode: whether the metric is better at `"max"` or `"min"`.
    """

    by: str
    choices: tuple[Choice, ...]
    recipes: dict[str, Recipe]
    batches: int
    baseline: float | None = None
    metric_mode: Literal["max", "min"] | None = None

    def layers(self) -> dict[str, list[Choice]]:
        """The choices of each layer, the most sensitive layer first: by the largest of its costs."""
        found = by_layer(self.choices)
        return dict(sorted(found.items(), key=lambda item: -max(_badness(choice.cost) for choice in item[1])))

    def worst(self, count: int | float) -> list[str]:
        """The names of the most sensitive layers, as patterns for `QATCallback(train=...)`.

        Args:
            count: how many layers; or as a float in 0..1 the share of all costs that the fewest possible layers make up together.

        Raises:
            ValueError: a bad count.
        """
        whole = isinstance(count, int) and not isinstance(count, bool) and count > 0
        if not whole and not (isinstance(count, float) and 0 < count <= 1):
            raise ValueError(f"worst({count!r}): give a number of layers (int from 1), or a share of their costs (float in 0..1)")
        layers = list(self.layers().values())
        costs = [max(max(_badness(choice.cost), 0.0) for choice in choices) for choices in layers]
        if not whole:
            finite = [min(cost, sys.float_info.max / len(costs)) for cost in costs]
            sums = list(accumulate(finite))
            count = next(index for index, done in enumerate(sums, 1) if done >= count * sums[-1] * (1 - 1e-12))
        return [name for choices in layers[: int(count)] for name in choices[0].schemes]

    def table(self, limit: int | None = None) -> str:
        """Rows of layer, recipe, weights, bits (scales included) and cost.

        Args:
            limit: how many layers to show, by default all.
        """
        ranked = list(self.layers().items())[:limit]
        cells: list[tuple[object, ...]] = []
        for name, choices in ranked:
            for choice in sorted(choices, key=lambda choice: -_badness(choice.cost)):
                told = f"{_decibels(choice.cost):.1f}" if self.by == "sqnr" else f"{choice.cost:+.4g}"
                cells.append((name or "(root)", choice.type, choice.recipe, f"{choice.numel:,}", f"{choice.bits:.2f}", told))
        return table(("layer", "type", "recipe", "weights", "bits", "SQNR dB" if self.by == "sqnr" else f"{self.by} cost"), cells)

    def __str__(self) -> str:
        where = f"float {self.by}: {self.baseline:.6g}, " if self.baseline is not None else ""
        return f"{self.table()}\n{where}{self.batches} batches, each layer quantized alone"

    def predict(self, recipe: str | Recipe) -> Prediction:
        """Size and predicted cost of a recipe that `allocate` made, or of one of the recipes measured, by its label.

        Raises:
            ValueError: an unknown label, or a scheme that was not measured.
        """
        if isinstance(recipe, str) and recipe not in self.recipes:
            raise ValueError(f"no recipe {recipe!r} was measured; measured: {', '.join(self.recipes)}")
        picked = {name: self._picked(name, choices, recipe) for name, choices in by_layer(self.choices).items()}
        return predict([choices[0] for choices in by_layer(self.choices).values()], list(picked.values()))

    def _picked(self, name: str, choices: list[Choice], recipe: str | Recipe) -> Choice | None:
        if isinstance(recipe, str):
            return next((choice for choice in choices if choice.recipe == recipe), None)
        wanted = {part: recipe.lookup(part)[0] for part in choices[0].schemes}
        if not any(wanted.values()):
            return None
        found = next((choice for choice in choices if choice.schemes == wanted), None)
        if found is None:
            told = ", ".join(f"{part}: {scheme.label if scheme else 'float'}" for part, scheme in wanted.items())
            raise ValueError(f"{name}: {told} was not measured; measured: {', '.join(choice.recipe for choice in choices)}")
        return found

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which is complete or absent."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["recipes"] = {label: recipe.to_dict() for label, recipe in self.recipes.items()}
        plain["choices"] = [{**asdict(choice), "cost": _plain_number(choice.cost)} for choice in self.choices]
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps(plain, indent=1, allow_nan=False))
        os.replace(temporary, target)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the file is missing, or not one of these.
        """
        try:
            plain = json.loads(Path(path).read_text())
            plain["recipes"] = {label: Recipe.from_dict(recipe) for label, recipe in plain["recipes"].items()}
            plain["choices"] = tuple(_choice_from(choice) for choice in plain["choices"])
            return cls(**plain)
        except FileNotFoundError:
            raise ValueError(f"sensitivity file {str(path)!r} does not exist") from None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} was not written by Sensitivity.to_json: {error!r}") from None


def _choice_from(plain: dict[str, Any]) -> Choice:
    schemes = {name: scheme and QuantScheme.from_dict(scheme) for name, scheme in plain["schemes"].items()}
    return Choice(**{**plain, "schemes": schemes, "cost": math.inf if plain["cost"] is None else plain["cost"]})


def _plain_number(cost: float) -> float | None:
    return cost if math.isfinite(cost) else None  # JSON has no infinity


def _badness(cost: float) -> float:
    return math.inf if math.isnan(cost) else cost


def _decibels(ratio: float) -> float:
    return math.inf if ratio <= 0 else -10 * math.log10(ratio) if math.isfinite(ratio) else -math.inf


def by_layer(choices: Iterable[Choice]) -> dict[str, list[Choice]]:
    found: dict[str, list[Choice]] = {}
    for choice in choices:
        found.setdefault(choice.layer, []).append(choice)
    return found


def predict(layers: Sequence[Choice], picked: Sequence[Choice | None]) -> Prediction:
    """Size and cost of one choice a layer (None: float). `layers`: any choice of each, for its float size."""
    pairs = list(zip(layers, picked, strict=True))
    code_bits = sum(8 * layer.float_bytes if choice is None else choice.code_bits for layer, choice in pairs)
    size = sum(layer.float_bytes if choice is None else choice.bytes for layer, choice in pairs)
    cost = math.fsum(max(choice.cost, 0.0) for choice in picked if choice is not None)
    return Prediction(code_bits / sum(layer.numel for layer in layers), size, cost)
