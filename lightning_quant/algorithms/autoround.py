"""AutoRound (Cheng et al. 2024, arXiv:2309.05516): rounding offsets and clipping, learned by signed gradient descent.

A unit is tuned until its output is close to what it was in float: a whole block, or a layer where it stands alone.
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
from lightning_quant.numerics import MIN_SCALE, from_groups, max_value, qrange, to_groups
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import weight_matrix


class SignedRounding:
    """A weight matrix whose rounding offsets and clipping are learned by signed gradient descent (equations 2 to 5).

    Args:
        weight: float32 `[channels, columns]`.
        scale, zero_point: of the grid to start from.
        spec: integers.
        learn_range: learn `alpha` and `beta`, which multiply the ends of each range.
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, learn_range: bool = True) -> None:
        self.spec, self.shape = spec, weight.shape
        self.rows = to_groups(weight, spec).contiguous()
        scale, zero_point, (qmin, qmax) = scale.reshape(-1, 1).float(), zero_point.reshape(-1, 1), qrange(spec)
        if spec.symmetric:
            self.low, self.high = torch.zeros_like(scale), scale * max_value(spec)
        else:
            self.low, self.high = (qmin - zero_point) * scale, (qmax - zero_point) * scale
        self.offset = torch.zeros_like(self.rows)
        self.ends = torch.ones(2, len(self.rows), 1, device=weight.device)  # beta of the lower, alpha of the upper end
        self.learn_range = learn_range

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, `[groups, 1]` each."""
        qmin, qmax = qrange(self.spec)
        low, high = self.low * self.ends[0], self.high * self.ends[1]
        if self.spec.symmetric:
            scale = high / max_value(self.spec)
            zero_point = torch.zeros_like(scale)
        else:
            scale = (high - low) / (qmax - qmin)
            zero_point = (qmin - torch.round(low / scale.clamp(min=MIN_SCALE))).clamp(qmin, qmax)
        return torch.where(scale > 0, scale, 1.0).clamp(min=MIN_SCALE), zero_point

    def __call__(self) -> Tensor:
        """The weight as it is rounded now, `[channels, columns]`."""
        scale, zero_point = self.qparams()
        level = (self.rows * (1.0 / scale)).add_(self.offset).round_().add_(zero_point).clamp_(*qrange(self.spec)).sub_(zero_point)
        return from_groups(level.mul_(scale), self.shape, self.spec)

    def step(self, grad: Tensor, rate: float) -> None:
        """One step against the sign of the gradient, of the loss by the rounded weight."""
        grad, (qmin, qmax) = to_groups(grad, self.spec), qrange(self.spec)
        scale, zero_point = self.qparams()
        ratio = self.rows * (1.0 / scale)
        level = (ratio + self.offset).round_().add_(zero_point)
        below, above = level < qmin, level > qmax
        inside = ~(below | above)
        if self.learn_range:
            residual = level.sub_(zero_point).sub_(ratio).mul_(inside)  # what a step of the scale changes in the rounded weight
            if self.spec.symmetric:
                clipped = above * float(qmax) + below * float(qmin)
                slope = (grad * (residual + clipped)).sum(1, keepdim=True)
                self.ends.sub_(rate * slope.sign()[None])
            else:
                spread = (grad * residual).sum(1, keepdim=True) / (qmax - qmin)
                upper = (grad * above).sum(1, keepdim=True) + spread
                lower = (grad * below).sum(1, keepdim=True) - spread
                self.ends[1].sub_(rate * (upper.sign() * self.high.sign()))
                self.ends[0].sub_(rate * (lower.sign() * self.low.sign()))
            self.ends.clamp_(0.0, 1.0)
        self.offset.sub_(rate * grad.sign() * inside).clamp_(-0.5, 0.5)

    def keep(self) -> None:
        """Remember what is learned so far."""
        self.kept = (self.offset.clone(), self.ends.clone())

    def restore(self, state: int) -> None:
        """0: what was learned last, 1: what was kept, 2: where it began."""
        if not hasattr(self, "last"):
            self.last = (self.offset, self.ends)
        start = torch.zeros_like(self.offset), torch.ones_like(self.ends)
        self.offset, self.ends = (self.last, self.kept, start)[state]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded weight, its scale and zero point."""
        return (self(), *self.qparams())


def apply_autoround(
    unit: Unit,
    *,
    iterations: int = 200,
    batches: int | None = None,
    rate: float | None = None,
    learn_range: bool = True,
    dtype: Literal["auto", "bfloat16", "float16"] | None = "auto",
) -> None:
    """Learn how to round a unit's weights, with AutoRound. Layers for which it cannot be done are rounded to nearest, and noted.

    Args:
        iterations: steps of signed gradient descent.
        batches: calibration batches that each step sees; None: as few as hold 512 tokens, or other positions. Of equal work, many
            steps on little data do better than few on much.
        rate: of the first step, in units of a code; it falls to 0 linearly. By default `1 / iterations`.
        learn_range: learn to clip each group's range, too.
        dtype: autocast's, such as `"bfloat16"`, for a unit's forward and backward passes; None: no autocast; `"auto"`: bfloat16
            where the machine multiplies it natively.
    """
    modules = reached(unit, "autoround: rounded to nearest")
    if not modules:
        return
    learned = {}
    for name, module in modules.items():
        qparams = weight_quantizer(module).qparams()
        learned[name] = SignedRounding(weight_matrix(module), *qparams, weight_spec(module), learn_range)
    first = rate or 1.0 / iterations
    learn(unit, modules, learned, lambda each, grad, left: each.step(grad, first * left), iterations, batches, dtype)


AUTOROUND = Algorithm(
    apply_autoround,
    "rounder",
    reconstructs=True,
    cost=Cost(
        passes=learning_passes,
        work=lambda rows, columns, options: 300.0 * rows * columns * options["iterations"],
        memory=lambda rows, columns: 28.0 * rows * columns,
        together=True,
    ),
    limits={"rate": (1e-6, 1)},
)
