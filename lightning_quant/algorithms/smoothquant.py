"""SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): move the outliers of activations into the weights, which take them better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_quant.algorithms.base import Algorithm, Cost, suited, weight_quantizer, weight_spec
from lightning_quant.blocks import Unit
from lightning_quant.calibration import all_reduce, has_ranks
from lightning_quant.functional import dynamic_fake_quantize, fake_quantize
from lightning_quant.grids import minmax_qparams, nearest
from lightning_quant.nn import FakeModule
from lightning_quant.numerics import calc_qparams
from lightning_quant.scaling import Group, find_groups, rescale
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import SAMPLES, weight_matrix

# a layer's weight matrix, sample inputs, float outputs for these, ends of each column's inputs, specs of weight and input
Sample = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, QuantSpec, QuantSpec | None]


def smooth_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The factor of each input channel: `max|x|^alpha / max|w|^(1 - alpha)` (equation 4); columns times it, inputs divided by it.

    Args:
        inputs, weights: the largest magnitude of each channel's inputs, and weights, `[channels]`.
        alpha: how much of the difficulty moves from activations to weights, in [0, 1].

    Example:
        >>> smooth_scale(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([4., 1.])
    """
    scale = inputs.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(inputs > 0, scale, 1.0)  # a channel that is always 0 has no difficulty to move


def search_alpha(error: Callable[[Tensor], Tensor], scale: Callable[[float], Tensor], steps: int) -> Tensor:
    """The factor of the alpha that leads to the least error, of `steps` from 0 to 1; all 1 where none is better than that."""
    ones = torch.ones_like(scale(0.5))
    best, least = ones, error(ones)
    for step in range(steps + 1):
        tried = scale(step / steps)
        found = error(tried)
        if found < least:
            best, least = tried, found
    return best


def _quantized_input(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec | None) -> Tensor:
    if spec is None:
        return rows
    if spec.dynamic:
        return dynamic_fake_quantize(rows, spec)
    return fake_quantize(rows, *calc_qparams(low.min().view(1), high.max().view(1), spec), spec)


@torch.no_grad()
def output_distance(scale: Tensor, layers: Sequence[Sample]) -> Tensor:
    """The squared error of quantized layers' outputs on sample inputs, with their input columns rescaled.

    Args:
        scale: `[columns]`.
        layers: those that share the factor.
    """
    total = torch.zeros((), device=scale.device)
    for weight, rows, outputs, low, high, spec, input_spec in layers:
        scaled = weight * scale
        rounded = nearest(scaled, *minmax_qparams(scaled, spec), spec)
        x = _quantized_input(rows / scale, low / scale, high / scale, input_spec)
        total += (x @ rounded.T - outputs).square().sum()
    return total


def apply_smoothquant(unit: Unit, *, alpha: float | None = None, steps: int = 10, explicit: bool = True) -> None:
    """Rescale a unit's input channels. Layers for which it cannot be done are noted.

    Args:
        alpha: how much of the difficulty moves from activations to weights, in [0, 1]; None: searched for each group of layers that
            share a factor, by the error of their outputs on sample inputs.
        steps: of the search.
        explicit: where no preceding layer can take the inverse scale, multiply the input by it in every forward pass; else such a
            layer is not rescaled.
    """
    modules = suited(unit, "smoothquant: not rescaled", "low")
    for group in find_groups(unit, modules, explicit):
        rescale(unit, group, _group_scale(unit, group, {name: modules[name] for name in group.consumers}, alpha, steps))
    for module in modules.values():
        weight_quantizer(module).observing = False
        module.observe_weights()


def _group_scale(unit: Unit, group: Group, members: dict[str, FakeModule], alpha: float | None, steps: int) -> Tensor:
    found = unit.statistics
    first = next(iter(members.values()))
    channel, columns = group.channel, group.columns(first)
    factors = int(channel.max()) + 1

    def largest(values: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(factors, device=values.device).scatter_reduce_(0, index, values, "amax")

    inputs = torch.stack([largest(torch.maximum(-found["low"][name], found["high"][name]), channel) for name in members]).amax(0)
    weights = torch.stack([largest(weight_matrix(module).abs().amax(0), columns) for module in members.values()]).amax(0)
    if alpha is not None:
        return smooth_scale(inputs, weights, alpha)
    layers = []
    for name, module in members.items():
        weight, ends = weight_matrix(module), [found[end][name] for end in ("low", "high")]
        low, high = (end.repeat_interleave(weight.shape[1] // len(end)) for end in ends)  # of a convolution, one a channel
        rows = found["rows"][name]
        layers.append((weight, rows, rows @ weight.T, low, high, weight_spec(module), module.scheme.input))

    def error(scale: Tensor) -> Tensor:
        total = output_distance(scale[columns], layers)
        if has_ranks():
            all_reduce(total, "sum")
        return total

    return search_alpha(error, lambda value: smooth_scale(inputs, weights, value), steps)


SMOOTHQUANT = Algorithm(
    apply_smoothquant,
    "transform",
    ("low", "high", "rows"),
    cost=Cost(
        passes=lambda *_: 0.6,
        work=lambda rows, columns, options: (options["steps"] + 2) * rows * columns * (2.0 * SAMPLES + 500),
        memory=lambda rows, columns: 16.0 * rows * columns,
    ),
    limits={"alpha": (0, 1)},
)
