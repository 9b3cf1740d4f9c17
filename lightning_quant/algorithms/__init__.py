"""The table of PTQ algorithms, and what one looks like.

An algorithm is a function on a calibrated model: it edits float weights (a transform), their ranges, or puts them on the grid (a
rounder), and leaves the rest to `convert`, which rounds to nearest. Recipes name the ones to run, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from lightning_quant.algorithms.gptq import apply_gptq


class Algorithm(Protocol):
    """One PTQ algorithm.

    Args:
        model: prepared, its ranges calibrated; edited in place.
        run: passes the calibration data through the model; a batch ends where a hook raises `calibration.Enough`.
    """

    def __call__(self, model: nn.Module, run: Callable[[], None]) -> None: ...


ALGORITHMS: dict[str, Algorithm] = {"gptq": apply_gptq}


def get_algorithms(names: Sequence[str]) -> list[Algorithm]:
    """The algorithms of a recipe; a wrong name lists the valid ones."""
    for name in names:
        if name not in ALGORITHMS:
            valid = ", ".join(ALGORITHMS) or "none but round-to-nearest, which is what an empty list means"
            raise ValueError(f"unknown algorithm {name!r}; valid: {valid}")
    return [ALGORITHMS[name] for name in names]
