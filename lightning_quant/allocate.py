"""Mixed precision: the scheme for each layer with which all together lose least within a budget."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lightning_quant.mixed import SHARED, Choice, Sensitivity, by_layer
from lightning_quant.recipe import Recipe, _patterns, matches
from lightning_quant.spec import QuantScheme

# states of the exact search; where there are more, evenly spaced ones are kept
MAX_STATES = 2**14


@dataclass
class Frontier:
    """The choices for all layers that no other beats in both size and cost.

    Costs add up over layers. Layer by layer, every kept (size, cost) is combined with every choice, and what is beaten is dropped:
    exact dynamic programming, up to `MAX_STATES` kept ones.

    Args:
        layers: the choices of each layer; float is one more, of cost 0.
        size: of a choice, in bits.
        float_size: the same in float.
        sizes, costs: of the states kept, sizes ascending and costs descending.
        whole: the size of all layers in float.
    """

    layers: list[list[Choice]]
    size: Callable[[Choice], int]
    float_size: Callable[[Choice], int]
    sizes: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    costs: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    whole: int = 0
    _steps: list[tuple[list[Choice | None], Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for choices in self.layers:
            # a cost that is not finite is a model that broke
            usable: list[Choice | None] = [None, *(choice for choice in choices if math.isfinite(choice.cost))]
            self._add(usable, self.float_size(choices[0]))
            self.whole += self.float_size(choices[0])

    def _add(self, options: list[Choice | None], float_size: int) -> None:
        states = len(self.sizes)
        size = torch.tensor([float_size if option is None else self.size(option) for option in options])
        cost = torch.tensor([0.0 if option is None else max(option.cost, 0.0) for option in options], dtype=torch.float64)
        sizes, costs = (self.sizes + size[:, None]).flatten(), (self.costs + cost[:, None]).flatten()
        order = costs.argsort(stable=True)
        order = order[sizes[order].argsort(stable=True)]
        best = costs[order].cummin(0).values
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = costs[order][1:] < best[:-1]
        kept = order[better]
        if len(kept) > MAX_STATES:
            kept = kept[torch.linspace(0, len(kept) - 1, MAX_STATES, dtype=torch.float64).round().long()]
        self.sizes, self.costs = sizes[kept], costs[kept]
        self._steps.append((options, kept // states, kept % states))

    def pick(self, index: int) -> list[Choice | None]:
        """The choice of each layer in a state; None: float."""
        picked: list[Choice | None] = []
        for options, chosen, before in reversed(self._steps):
            picked.append(options[int(chosen[index])])
            index = int(before[index])
        return picked[::-1]


def code_frontier(layers: list[list[Choice]]) -> Frontier:
    """Sizes are those of codes alone."""
    return Frontier(layers, lambda choice: choice.code_bits, lambda choice: 8 * choice.float_bytes)


def byte_frontier(layers: list[list[Choice]]) -> Frontier:
    """Sizes include scales and zero points."""
    return Frontier(layers, lambda choice: 8 * choice.bytes, lambda choice: 8 * choice.float_bytes)


def allocate(
    sensitivity: Sensitivity,
    budget: str | int | None = None,
    *,
    max_drop: float | None = None,
    ignore: str | Sequence[str] = (),
    overhead: bool = False,
    algorithms: str | Sequence[str] | None = None,
    algorithm_options: dict[str, dict[str, Any]] | None = None,
) -> Recipe:
    """The recipe that gives each layer the scheme with which all layers together cost least within a budget.

    Costs of layers quantized alone are added (Pandey et al. 2023, arXiv:2302.05397; one below 0 counts as 0), and the best sum is
    found exactly, as on the Pareto frontier of HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852). Of equal costs the smaller model
    wins. Staying float is always among the choices.

    Args:
        sensitivity: what `lq.sensitivity` measured.
        budget: `"3.5 bits"`: mean bits a weight of the layers considered, of the codes alone, so that w3 and w4 choices meet it;
            with `overhead=True` scales and zero points count, as in `lq.summary`. An int: bytes of the layers considered, scales
            and zero points always included.
        max_drop: instead of a budget: the largest sum of costs, in the unit of `Sensitivity` (for `"sqnr"` 10^(-dB/10)); the
            smallest model within it is taken, scales included.
        ignore: patterns of layers that stay float and do not count.
        overhead: see `budget`.
        algorithms, algorithm_options: of the recipe made; by default those of the recipes measured.

    Returns:
        a recipe that names every layer measured; what was not measured stays float.

    Raises:
        ValueError: no choice meets the budget (the message has the smallest and the largest size), all layers would stay float,
            or the recipes measured have different algorithms.

    Example:
        >>> import lightning_quant as lq
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> found = lq.sensitivity(net, ["w2a16", "w4a16", "w8a16"], batches=[torch.randn(16, 64)])
        >>> recipe = lq.allocate(found, "6 bits")
        >>> sorted(scheme.weight.bits for scheme in recipe.schemes.values())
        [4, 8]
    """
    if (budget is None) == (max_drop is None):
        raise ValueError(f"budget={budget!r}, max_drop={max_drop!r}: give one of the two")
    made_with: dict[str, Any] = {"algorithms": algorithms, "algorithm_options": algorithm_options}
    made_with = {key: _agreed(sensitivity, key) if value is None else value for key, value in made_with.items()}
    layers, ignored = _considered(sensitivity, ignore)
    numel = sum(choices[0].numel for choices in layers)
    if budget is None:
        frontier, limit = byte_frontier(layers), None
    else:
        limit, in_bytes = _limit(budget, numel)
        frontier = byte_frontier(layers) if in_bytes or overhead else code_frontier(layers)
    picked = frontier.pick(_best(frontier, limit, max_drop, numel, budget))
    if not any(picked):
        given = f"max_drop={max_drop!r}" if budget is None else f"budget={budget!r}"
        raise ValueError(f"{given}: every layer would stay float; the float layers take {_told(frontier.whole, numel)}")
    schemes: dict[str, QuantScheme | None] = {}
    for choices, choice in zip(layers, picked, strict=True):
        schemes.update({name: None if choice is None else choice.schemes[name] for name in choices[0].schemes})
    schemes.update({name: None for choices in ignored for name in choices[0].schemes})
    first = next(iter(sensitivity.recipes.values()))
    root = schemes.pop("", None)  # no pattern names the root alone
    return Recipe(
        root,
        schemes={_exact(name): scheme for name, scheme in schemes.items()},
        edges=None,
        **made_with,
        **{name: getattr(first, name) for name in SHARED},
    )


def _exact(name: str) -> str:
    """A pattern that names one module: its name, unless that reads as a glob, or as a type. `.*.` stands for all experts."""
    if re.search(r"[?[:]", name) or name[:1].isupper():
        return "re:" + re.escape(name).replace(r"\.\*\.", r"\.[^.]+\.") + "$"
    return name


def _agreed(sensitivity: Sensitivity, key: str) -> Any:
    """What all recipes measured have."""
    found = {label: getattr(recipe, key) for label, recipe in sensitivity.recipes.items()}
    first = next(iter(found.values()))
    if any(value != first for value in found.values()):
        told = "; ".join(f"{label}: {value or 'none'}" for label, value in found.items())
        raise ValueError(f"the recipes measured have different {key} ({told}): say which to use, allocate({key}=...)")
    return first


def _considered(sensitivity: Sensitivity, ignore: str | Sequence[str]) -> tuple[list[list[Choice]], list[list[Choice]]]:
    patterns, layers = _patterns(ignore, "ignore"), list(by_layer(sensitivity.choices).values())

    def hits(pattern: str, choices: list[Choice]) -> bool:
        return any(matches(pattern, name, [choices[0].type]) for name in choices[0].schemes)

    for pattern in patterns:
        if not any(hits(pattern, choices) for choices in layers):
            warnings.warn(f"ignore={pattern!r} matches no layer that was measured", stacklevel=3)
    ignored = [choices for choices in layers if any(hits(pattern, choices) for pattern in patterns)]
    kept = [choices for choices in layers if choices not in ignored]
    if not kept:
        raise ValueError(f"ignore={list(patterns)} leaves no layer to quantize")
    return kept, ignored


def _limit(budget: str | int, numel: int) -> tuple[int, bool]:
    """A budget in bits of the whole, and whether it was given in bytes."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return 8 * budget, True
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*", budget) if isinstance(budget, str) else None
    if not found:
        raise ValueError(f"budget={budget!r}: give mean bits a weight as text, such as '4.5 bits', or bytes as an int")
    return math.floor(Fraction(found[1]) * numel), False


def _told(bits: int, numel: int) -> str:
    return f"{bits / numel:.4g} bits a weight, {-(-bits // 8):,} bytes"


def _best(frontier: Frontier, limit: int | None, max_drop: float | None, numel: int, budget: str | int | None) -> int:
    """The state of the smallest cost within a size, or of the smallest size within a cost."""
    if limit is None:
        assert max_drop is not None
        if not max_drop >= 0:
            raise ValueError(f"max_drop={max_drop!r}: the smallest possible is 0, all layers in float")
        return int((frontier.costs > max_drop).sum())
    index = int(torch.searchsorted(frontier.sizes, limit, right=True)) - 1
    if index < 0:
        raise ValueError(
            f"budget={budget!r}: no choice is that small. The layers considered take from "
            f"{_told(int(frontier.sizes[0]), numel)} to {_told(frontier.whole, numel)} (float)"
        )
    return index
