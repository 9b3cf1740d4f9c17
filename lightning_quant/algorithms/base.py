"""What a PTQ algorithm looks like.

Each is maths on tensors in plain functions, and a few lines that apply them to a `Unit`: a transform edits float weights and leaves
the float function the same, a rounder puts weights on their grids, a correction repairs what rounding did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_quant.blocks import Unit
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import FakeModule
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import why_no_rows


@dataclass(frozen=True)
class Algorithm:
    """An entry of `ALGORITHMS`.

    Args:
        apply: `apply(unit, **options)`; edits the unit's modules in place.
        kind: transforms come first in a recipe, then at most one rounder, then corrections.
        statistics: what it reads of `unit.statistics`, keys of `statistics.KINDS`.
        reconstructs: whether it compares a unit's outputs with float ones.
        whole: whether it takes the whole model at once, before anything else is done.
    """

    apply: Callable[..., None]
    kind: Literal["transform", "rounder", "correction"]
    statistics: tuple[str, ...] = ()
    reconstructs: bool = False
    whole: bool = False


def weight_spec(module: FakeModule) -> QuantSpec:
    assert module.scheme.weight is not None
    return module.scheme.weight


def weight_quantizer(module: FakeModule) -> FakeQuantize:
    quantizer = module.weight_fake_quant
    assert isinstance(quantizer, FakeQuantize)
    return quantizer


def suited(unit: Unit, what: str, statistic: str | None = None) -> dict[str, FakeModule]:
    """The layers of a unit that are a matrix of integer codes; the others are noted, for `lq.summary`.

    Args:
        what: the algorithm, and what becomes of a layer without it, as in `"gptq: rounded to nearest"`.
        statistic: leave out what calibration has not reached.
    """
    found = {}
    for name, module in unit.modules.items():
        spec, reason = weight_spec(module), why_no_rows(module)
        if not spec.is_int or spec.flat_groups:
            reason = f"not for {spec.dtype}"
        if not reason and statistic is not None and name not in unit.statistics.get(statistic, {}):
            reason = "calibration has not reached it"
        if reason:
            unit.note(name, f"{what}, {reason}")
        else:
            found[name] = module
    return found


def check_order(names: Sequence[str], table: dict[str, Algorithm]) -> None:
    """Refuse names, orders and combinations that cannot work."""
    for name in names:
        if name not in table:
            raise ValueError(f"unknown algorithm {name!r}; valid: {', '.join(table)}")
    order = ("transform", "rounder", "correction")
    kinds = [order.index(table[name].kind) for name in names]
    if kinds != sorted(kinds):
        told = ", ".join(f"{name} ({table[name].kind})" for name in names)
        raise ValueError(f"algorithms in this order cannot work: {told}. Transforms come first, then one rounder, then corrections")
    rounders = [name for name in names if table[name].kind == "rounder"]
    if len(rounders) > 1 or len(set(names)) < len(names):
        raise ValueError(
            f"algorithms {', '.join(names)}: each once, and one rounder at most; {' and '.join(rounders)} round weights"
        )


def check_options(recipe: Recipe, table: dict[str, Algorithm]) -> None:
    """Refuse options of algorithms that do not run, and names that they do not have."""
    for name, options in recipe.algorithm_options.items():
        if name not in recipe.algorithms:
            raise ValueError(
                f"algorithm_options for {name!r}, which is not among the algorithms: {', '.join(recipe.algorithms) or 'none'}"
            )
        valid = [key for key in inspect.signature(table[name].apply).parameters if key != "unit"]
        for option in options:
            if option not in valid:
                raise ValueError(f"algorithm {name!r} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
