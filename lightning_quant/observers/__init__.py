"""Observers: from statistics of a tensor to its range.

Each has bounded state, `[groups]` or `[groups, bins]`, and says in `reductions` how ranks merge it. A weight is at hand as a
whole: `measure` gives its range without any state.
"""

from __future__ import annotations

import inspect
from typing import Any

from lightning_quant.observers.base import (
    OBSERVERS,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    plain_momentum,
    register_observer,
)
from lightning_quant.observers.histogram import (
    HistogramObserver,
    KLObserver,
    LSQObserver,
    MSEObserver,
    PercentileObserver,
    SigmaObserver,
)
from lightning_quant.spec import QuantSpec

__all__ = [
    "OBSERVERS",
    "HistogramObserver",
    "KLObserver",
    "LSQObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "SigmaObserver",
    "make_observer",
    "plain_momentum",
    "register_observer",
]


def make_observer(name: str, spec: QuantSpec, groups: int, options: dict[str, Any] | None = None) -> Observer:
    """The observer of that name; a wrong name or option lists the valid ones."""
    if name not in OBSERVERS:
        raise ValueError(f"unknown observer {name!r}; valid: {', '.join(OBSERVERS)}")
    valid = [option for option in inspect.signature(OBSERVERS[name]).parameters if option not in ("spec", "groups")]
    for option in options or {}:
        if option not in valid:
            raise ValueError(f"observer {name!r} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
    return OBSERVERS[name](spec, groups, **(options or {}))
