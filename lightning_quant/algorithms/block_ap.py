"""Block-AP (Chen et al. 2024, EfficientQAT, arXiv:2407.11062, section 3.2): a block's weights, scales and zero points, trained.

Each unit is trained until its output is close to what it was in float, as a short QAT of this one block: a step takes a batch of
calibration data, and nothing outside of the block has a gradient or optimizer state.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_quant.algorithms.base import Algorithm, Cost, weight_quantizer, weight_spec
from lightning_quant.algorithms.reconstruction import (
    learn,
    learning_passes,
    reached,
)
from lightning_quant.blocks import Unit
from lightning_quant.numerics import MIN_SCALE, from_groups, qrange, to_groups
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import weight_matrix


class TrainedGrid:
    """A weight matrix, its scales and zero points, trained by Adam through the straight-through estimator (equations 1 and 2).

    Weights are held in units of the scale they start with, and scales as factors of it: one rate then suits every layer.

    Args:
        weight: float32 `[channels, columns]`.
        scale, zero_point: of the grid to start from.
        spec: integers.
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> None:
        self.spec, self.shape = spec, weight.shape
        self.unit = scale.reshape(-1, 1).float().clamp(min=MIN_SCALE)
        self.codes = (to_groups(weight, spec) * (1.0 / self.unit)).contiguous()  # ties fall as they do in `quantize`
        self.factor = torch.ones_like(self.unit)
        self.zero = zero_point.reshape(-1, 1).float().clone()
        self.start = (self.codes.clone(), self.factor.clone(), self.zero.clone())
        self.kept = self.start
        self.moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self.start]
        self.steps = 0

    @property
    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.factor, self.zero

    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights in steps of the scale, the codes that they are rounded to, and the zero point."""
        ratio, zero = self.codes / self.factor, self.zero.round().clamp(*qrange(self.spec))
        return ratio, ratio.round().add_(zero), zero

    def __call__(self) -> Tensor:
        """The weight as it is rounded now, `[channels, columns]`."""
        _, level, zero = self._levels()
        level = level.clamp_(*qrange(self.spec)).sub_(zero)
        return from_groups(level.mul_(self.factor * self.unit), self.shape, self.spec)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By the weights, the scales' factors and the zero points, from the gradient by the rounded weight."""
        grad = to_groups(grad, self.spec) * self.unit
        ratio, level, zero = self._levels()
        clipped = level.clamp(*qrange(self.spec))
        inside = level == clipped
        slope = clipped.sub_(zero).sub_(ratio * inside)  # what is in range moves with the rounding error, what is not with its code
        by_factor = (grad * slope).sum(1, keepdim=True)
        by_zero = -(grad * ~inside).sum(1, keepdim=True) * self.factor
        return grad * inside, by_factor, torch.zeros_like(by_zero) if self.spec.symmetric else by_zero

    def step(self, grad: Tensor, rates: tuple[float, float, float]) -> None:
        """One step of Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1), with a rate each."""
        self.steps += 1
        found = self.gradients(grad)
        for value, slope, (first, second), rate in zip(self._state, found, self.moments, rates, strict=True):
            first.lerp_(slope, 0.1)
            second.lerp_(slope.square(), 0.001)
            size = (second / (1 - 0.999**self.steps)).sqrt_()
            value.sub_((first / (1 - 0.9**self.steps)).div_(size.clamp_(min=1e-30)).mul_(rate))
        self.factor.clamp_(min=0.01)

    def keep(self) -> None:
        """Remember what is learned so far."""
        self.kept = (self.codes.clone(), self.factor.clone(), self.zero.clone())

    def restore(self, state: int) -> None:
        """0: what was learned last, 1: what was kept, 2: where it began."""
        if not hasattr(self, "last"):
            self.last = self._state
        self.codes, self.factor, self.zero = (self.last, self.kept, self.start)[state]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded weight, its scale and zero point."""
        return self(), self.factor * self.unit, self._levels()[2]


def apply_block_ap(
    unit: Unit,
    *,
    iterations: int = 200,
    batches: int | None = None,
    rate: float | None = None,
    scale_rate: float | None = None,
    dtype: Literal["auto", "bfloat16", "float16"] | None = "auto",
) -> None:
    """Train a unit's weights and their scales. Layers for which it cannot be done are rounded to nearest, and noted.

    Args:
        iterations: steps of Adam.
        batches: calibration batches that each step sees; None: as few as hold 512 tokens, or other positions.
        rate: of the weights in the first step, in units of a code; it falls to 0 linearly. By default `0.4 / iterations`:
            one that is too large moves all weights at random, and the start is kept.
        scale_rate: of the scales, as a factor of themselves, and of the zero points, in codes. By default `1 / iterations`.
        dtype: autocast's, such as `"bfloat16"`, for a unit's forward and backward passes; None: no autocast; `"auto"`: bfloat16
            where the machine multiplies it natively.
    """
    modules = reached(unit, "block_ap: rounded to nearest")
    if not modules:
        return
    learned = {}
    for name, module in modules.items():
        learned[name] = TrainedGrid(weight_matrix(module), *weight_quantizer(module).qparams(), weight_spec(module))
    of_weights, of_scales = rate or 0.4 / iterations, scale_rate or 1.0 / iterations
    rates = (of_weights, of_scales, of_scales)

    def step(each: TrainedGrid, grad: Tensor, left: float) -> None:
        each.step(grad, (rates[0] * left, rates[1] * left, rates[2] * left))

    learn(unit, modules, learned, step, iterations, batches, dtype)


BLOCK_AP = Algorithm(
    apply_block_ap,
    "rounder",
    reconstructs=True,
    cost=Cost(
        passes=learning_passes,
        work=lambda rows, columns, options: 600.0 * rows * columns * options["iterations"],
        memory=lambda rows, columns: 44.0 * rows * columns,
        together=True,
    ),
    limits={"rate": (1e-6, 1), "scale_rate": (1e-7, 1)},
)
