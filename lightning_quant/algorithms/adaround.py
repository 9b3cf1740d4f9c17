"""AdaRound (Nagel et al. 2020, arXiv:2004.10568): learn whether each weight is rounded up or down.

Applied to the output of a whole block (BRECQ, Li et al. 2021, arXiv:2102.05426), or of a layer where it stands alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_quant.algorithms.base import Algorithm, Cost, weight_quantizer, weight_spec
from lightning_quant.algorithms.reconstruction import (
    as_matrix,
    choose_batches,
    enough_batches,
    finish,
    gradients,
    learning_passes,
    output_distance,
    reached,
    trainable,
)
from lightning_quant.blocks import Unit
from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.grids import nearest
from lightning_quant.nn import FakeModule
from lightning_quant.numerics import from_groups, qrange, to_groups
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import put_weight_matrix, weight_matrix

_EPS = 1e-30  # of Adam: gradients are small where weights are many


class SoftRounding:
    """A weight matrix for each element of which is learned whether it is rounded up or down (section 3.2, equations 16 to 24).

    Args:
        weight: float32 `[channels, columns]`.
        scale, zero_point: of its grid, which stays.
        spec: integers.
        rate: of Adam.
    """

    ZETA, GAMMA = 1.1, -0.1

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, rate: float) -> None:
        self.spec, self.shape = spec, weight.shape
        self.scale, self.zero_point = scale.reshape(-1, 1).float(), zero_point.reshape(-1, 1).float()
        ratio = to_groups(weight, spec) / self.scale
        self.floor = ratio.floor()
        # the soft weight starts as the float one
        start = -torch.log((self.ZETA - self.GAMMA) / (ratio - self.floor - self.GAMMA) - 1)
        self.soft = start.requires_grad_()
        self.optimizer = torch.optim.Adam([self.soft], lr=rate, eps=_EPS)

    def up(self) -> Tensor:
        """How far each element is rounded up, from 0 to 1 (equation 23)."""
        return (torch.sigmoid(self.soft) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    def _weight(self, up: Tensor) -> Tensor:
        level = (self.floor + up + self.zero_point).clamp(*qrange(self.spec)) - self.zero_point
        return from_groups(level * self.scale, self.shape, self.spec)

    def __call__(self) -> Tensor:
        return self._weight(self.up().detach())

    def step(self, grad: Tensor, beta: float | None, strength: float) -> None:
        """One step of Adam against a gradient by the rounded weight, and the pull towards 0 and 1 (equation 24).

        Args:
            beta: its exponent, from 20 down to 2; None: no pull yet.
        """
        with torch.enable_grad():
            up = self.up()
            loss = (self._weight(up) * grad).sum()
            if beta is not None:
                loss = loss + strength * (1 - (2 * up - 1).abs().pow(beta)).sum()
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight with every element rounded up or down for good, its scale and zero point."""
        return self._weight((self.up().detach() >= 0.5).float()), self.scale, self.zero_point


class LearnedScales:
    """The scales of static inputs, learned together with the rounding of weights (BRECQ, section 3.3; LSQ's gradient).

    Args:
        quantizers: each gets a scale that takes gradients, until `close`.
        rate: of Adam, as a part of each scale; it falls to 0 linearly.
    """

    def __init__(self, quantizers: list[FakeQuantize], rate: float) -> None:
        self.quantizers, self.rate = quantizers, rate
        for part in quantizers:
            part.qparams()  # brings the range up to date
            part.learned = True
            part.scale.requires_grad_(True)
        self.before = [part.scale.detach().clone() for part in quantizers]
        groups = [{"params": [part.scale], "lr": rate} for part in quantizers]
        self.optimizer = torch.optim.Adam(groups, eps=_EPS) if groups else None

    def step(self, factor: float, left: float) -> None:
        """Against the gradients that the scales have.

        Args:
            factor: what gradients are multiplied by.
            left: the share of steps still to come.
        """
        if self.optimizer is None:
            return
        for group, part in zip(self.optimizer.param_groups, self.quantizers, strict=True):
            grad = torch.zeros_like(part.scale) if part.scale.grad is None else part.scale.grad
            if has_ranks():
                all_reduce(grad, "sum")
            part.scale.grad = grad * factor
            group["lr"] = self.rate * left * float(part.scale.detach().abs().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def close(self) -> None:
        for part in self.quantizers:
            part.scale.requires_grad_(False).grad = None
            part.scale.copy_(part.safe_scale())
            part.learned = False

    @torch.no_grad()
    def restore(self) -> None:
        """The scales as they were before."""
        for part, scale in zip(self.quantizers, self.before, strict=True):
            part.scale.copy_(scale)


def _static_inputs(modules: dict[str, FakeModule]) -> list[FakeQuantize]:
    parts = [getattr(module, "input_fake_quant", None) for module in modules.values()]
    return [
        part
        for part in parts
        if isinstance(part, FakeQuantize) and part.spec.is_int and not part.spec.dynamic and (part.has_range or part._stale)
    ]


@contextlib.contextmanager
def _scales(quantizers: list[FakeQuantize], rate: float) -> Iterator[LearnedScales]:
    scales = LearnedScales(quantizers, rate)
    try:
        yield scales
    finally:
        scales.close()


def _enough(unit: Unit) -> int:
    """How many batches a step sees by default: as few as hold 32 images, or else 512 tokens."""
    assert unit.calls is not None
    hidden = unit.calls.hidden[0]
    return -(-32 // max(len(hidden), 1)) if hidden.dim() > 3 else enough_batches(unit)


def _error(unit: Unit, weights: dict[str, Tensor]) -> float:
    """The error of the unit's output over all batches, with weights given as matrices."""
    assert unit.calls is not None
    for name, weight in weights.items():
        put_weight_matrix(unit.modules[name], weight)
    return output_distance(unit, list(range(len(unit.calls))), None)


def apply_adaround(
    unit: Unit,
    *,
    iterations: int = 300,
    batches: int | None = None,
    rate: float = 0.03,
    strength: float = 300.0,
    warmup: float = 0.2,
    learn_inputs: bool = True,
    input_rate: float = 0.001,
) -> None:
    """Learn whether to round each of a unit's weights up or down, with AdaRound. Others are rounded to nearest, and noted.

    A unit whose output comes out farther from the float one than with weights rounded to nearest is rounded to nearest, and noted.

    Args:
        iterations: steps of Adam. The paper takes 10,000 and more, at a rate of 0.001.
        batches: calibration batches that each step sees; None: as few as hold 32 images, or 512 tokens.
        rate: of Adam.
        strength: of the pull towards up or down of each weight, relative to its share of the error of rounding to nearest. Where it
            is too small, weights are left between up and down, and rounding them in the end undoes what was learned.
        warmup: the share of iterations before that pull starts.
        learn_inputs: learn the scales of static inputs, too.
        input_rate: of Adam for these, as a part of a scale; it falls to 0 linearly.
    """
    modules = reached(unit, "adaround: rounded to nearest")
    if not modules:
        return
    learned: dict[str, SoftRounding] = {}
    plain: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, module in modules.items():
        weight, (scale, zero_point), spec = weight_matrix(module), weight_quantizer(module).qparams(), weight_spec(module)
        learned[name] = SoftRounding(weight, scale, zero_point, spec, rate)
        plain[name] = (nearest(weight, scale, zero_point, spec), scale, zero_point)
    with trainable(unit, modules) as weights, _scales(_static_inputs(modules) if learn_inputs else [], input_rate) as scales:
        error = _error(unit, {name: rounded for name, (rounded, _, _) in plain.items()})
        share = sum(weight.numel() for weight in weights.values()) / (error or 1.0)
        for step, chosen in enumerate(choose_batches(unit, batches or _enough(unit), iterations)):
            for name, module in modules.items():
                put_weight_matrix(module, learned[name]())
            gradients(unit, weights, chosen, None)
            done = (step / iterations - warmup) / (1 - warmup)
            for name, module in modules.items():
                grad = weights[name].grad
                if grad is not None:
                    learned[name].step(as_matrix(module, grad) * share, None if done < 0 else 20 - 18 * done, strength)
            scales.step(share, 1 - step / iterations)
        results = {name: each.result() for name, each in learned.items()}
        worse = _error(unit, {name: rounded for name, (rounded, _, _) in results.items()}) > error
    if worse:
        results = plain
        scales.restore()
        for name in modules:
            unit.note(name, "adaround: rounded to nearest, which comes closer to the float output")
    finish(modules, results)


ADAROUND = Algorithm(
    apply_adaround,
    "rounder",
    reconstructs=True,
    cost=Cost(
        passes=lambda *args: learning_passes(*args) + 3,
        work=lambda rows, columns, options: 1500.0 * rows * columns * options["iterations"],
        memory=lambda rows, columns: 36.0 * rows * columns,
        together=True,
    ),
    limits={"warmup": (0, 0.99)},
)
