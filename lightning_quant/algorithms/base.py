"""What a PTQ algorithm looks like.

Each is maths on tensors in plain functions, and a few lines that apply them to a `Unit`: a transform edits float weights and leaves
the float function the same, a rounder puts weights on their grids, a correction repairs what rounding did.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_quant.blocks import Unit
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import FakeModule
from lightning_quant.recipe import Recipe
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import why_no_rows

# an algorithm's options, defaults among them
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """What one algorithm takes beside the passes that hand activations on, for estimates before it runs.

    Fitted to runs on a CPU: float32 Llamas of 0.1 to 15 million parameters, 2,000 to 24,000 tokens. The defaults take nothing.

    Args:
        passes: of the blocks over the calibration data; from its options, the number of batches, the positions (tokens, pixels) of
            one, and the layers of a unit.
        work: floating-point operations for a weight matrix of so many rows and columns, at the rate of the model's own.
        memory: bytes that it holds for such a matrix while it works.
        together: whether it holds them for all layers of a unit at once.
    """

    passes: Callable[[Settings, int, int, float], float] = lambda *_: 0.0
    work: Callable[[int, int, Settings], float] = lambda *_: 0.0
    memory: Callable[[int, int], float] = lambda *_: 0.0
    together: bool = False


@dataclass(frozen=True)
class Algorithm:
    """An entry of `ALGORITHMS`.

    Args:
        apply: `apply(unit, **options)`; edits the unit's modules in place.
        kind: transforms come first in a recipe, then at most one rounder, then corrections.
        statistics: what it reads of `unit.statistics`, keys of `statistics.KINDS`.
        reconstructs: whether it compares a unit's outputs with float ones.
        whole: whether it takes the whole model at once, before anything else is done.
        cost: for the estimate that `dry_run` gives.
        limits: option -> the smallest and the largest value it may have, where that is not: integers from 1, other numbers from 0.
    """

    apply: Callable[..., None]
    kind: Literal["transform", "rounder", "correction"]
    statistics: tuple[str, ...] = ()
    reconstructs: bool = False
    whole: bool = False
    cost: Cost = Cost()
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


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
    """Refuse options of algorithms that do not run, that they do not have, or with values that cannot be."""
    for name, options in recipe.algorithm_options.items():
        if name not in recipe.algorithms:
            raise ValueError(
                f"algorithm_options for {name!r}, which is not among the algorithms: {', '.join(recipe.algorithms) or 'none'}"
            )
        valid = [key for key in inspect.signature(table[name].apply).parameters if key != "unit"]
        for option in options:
            if option not in valid:
                raise ValueError(f"algorithm {name!r} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
            _check_value(name, option, options[option], table[name])


def _check_value(name: str, option: str, value: Any, algorithm: Algorithm) -> None:
    """Compare a value with the option's annotation and limits."""
    kinds = _kinds(get_type_hints(algorithm.apply)[option])
    choices = [choice for kind in kinds for choice in get_args(kind)]  # of Literals
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    told = " or ".join([*map(repr, choices), *("None" if kind is type(None) else kind.__name__ for kind in classes)])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    known = isinstance(value, classes) and (bool in classes or not isinstance(value, bool))
    if not (known or (number and float in classes) or (isinstance(value, str) and value in choices)):
        raise ValueError(f"algorithm {name!r}: {option}={value!r} must be {told}")
    if number:
        low, high = algorithm.limits.get(option, (1 if float not in classes else 0, math.inf))
        if not low <= value <= high or not math.isfinite(value):
            allowed = f"from {low} to {high}" if high < math.inf else f"at least {low}, and finite"
            raise ValueError(f"algorithm {name!r}: {option}={value!r} must be {allowed}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
