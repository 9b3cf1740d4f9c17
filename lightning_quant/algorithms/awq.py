"""AWQ (Lin et al. 2024, arXiv:2306.00978): scale up the input channels that matter, so that rounding hurts them less."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.algorithms.base import Algorithm, Cost, suited, weight_quantizer, weight_spec
from lightning_quant.blocks import Unit
from lightning_quant.grids import minmax_qparams, nearest, output_error, search_qparams
from lightning_quant.scaling import find_groups, rescale
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import weight_matrix


@torch.no_grad()
def awq_scale(
    weights: Sequence[Tensor], hessians: Sequence[Tensor], specs: Sequence[QuantSpec], channel: Tensor, *, steps: int = 20
) -> Tensor:
    """The factor of each input channel that leads to the least output error after rounding to nearest (equations 4 and 5).

    The search space is `s = x^a` and `s = x^a / w^(1-a)`, with x the root mean square of a channel's inputs and w the mean
    magnitude of its weights, each relative to its group's largest.

    Args:
        weights: of the layers that share the factor, float32 `[channels, columns]` each.
        hessians: of their inputs, float32 `[columns, columns]`, the sum of `x x^T`.
        specs: of their weights.
        channel: int64 `[columns]`, which factor each column takes.
        steps: how many exponents a in [0, 1] are tried.

    Returns:
        float32 `[factors]`, positive; all 1 where nothing is better.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> weight, x = torch.randn(8, 16), torch.randn(64, 16)
        >>> x[:, 3] *= 50
        >>> scale = awq_scale([weight], [x.T @ x], [QuantSpec(3)], torch.arange(16))
        >>> bool(scale[3] == scale.max())
        True
    """
    factors = int(channel.max()) + 1

    def per_factor(values: Tensor) -> Tensor:
        sums = torch.zeros(factors, device=values.device).index_add_(0, channel, values)
        return sums / torch.bincount(channel, minlength=factors).clamp(min=1)

    squares = torch.stack([hessian.diagonal() / hessian.diagonal().mean().clamp(min=1e-30) for hessian in hessians]).sum(0)
    inputs = per_factor(squares).sqrt()
    sizes = torch.cat([_relative_magnitude(weight, spec) for weight, spec in zip(weights, specs, strict=True)]).mean(0)
    sizes = per_factor(sizes)
    inputs, sizes = inputs.clamp(min=1e-4), sizes.clamp(min=1e-4)

    def error(scale: Tensor) -> Tensor:
        columns = scale[channel]
        total = torch.zeros((), device=scale.device)
        for weight, hessian, spec in zip(weights, hessians, specs, strict=True):
            scaled = weight * columns
            rounded = nearest(scaled, *minmax_qparams(scaled, spec), spec) / columns
            total += output_error(weight, rounded, hessian).sum()
        return total

    best = torch.ones(factors, device=channel.device)
    least = error(best)
    for step in range(1, steps + 1):
        exponent = step / steps
        for scale in (inputs**exponent, inputs**exponent / sizes ** (1 - exponent)):
            scale = scale / (scale.max() * scale.min()).sqrt()
            found = error(scale)
            if found < least:
                least, best = found, scale
    return best


def _relative_magnitude(weight: Tensor, spec: QuantSpec) -> Tensor:
    """|w| relative to the largest of its group, `[channels, columns]`."""
    size = spec.group_size or weight.shape[1]
    padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    return (padded / padded.amax(-1, keepdim=True).clamp(min=1e-30)).flatten(1)[:, : weight.shape[1]]


def apply_awq(unit: Unit, *, steps: int = 20, clip: bool | None = None, explicit: bool = True) -> None:
    """Rescale a unit's input channels, then clip its weights' ranges. Layers for which it cannot be done are noted.

    Args:
        steps: of the search for scales.
        clip: search each group's range, too; without it ranges are those that the recipe's observer finds. None: only if no
            rounder follows, which sees to its ranges itself.
        explicit: where no preceding layer can take the inverse scale, multiply the input by it in every forward pass; else such a
            layer is not rescaled.
    """
    modules = suited(unit, "awq: not rescaled", "hessian")
    hessians = unit.statistics.get("hessian", {})
    for group in find_groups(unit, modules, explicit):
        members = [modules[name] for name in group.consumers]
        weights, specs = [weight_matrix(module) for module in members], [weight_spec(module) for module in members]
        scale = awq_scale(weights, [hessians[name] for name in group.consumers], specs, group.columns(members[0]), steps=steps)
        rescale(unit, group, scale)
    wanted = not unit.rounds if clip is None else clip
    for name, module in modules.items():
        quantizer = weight_quantizer(module)
        if wanted and weight_spec(module).granularity != "tensor":
            quantizer.set_qparams(*search_qparams(weight_matrix(module), hessians[name], weight_spec(module)))
        else:
            module.observe_weights()


AWQ = Algorithm(
    apply_awq,
    "transform",
    ("hessian",),
    cost=Cost(
        passes=lambda *_: 1.0,
        work=lambda rows, columns, options: rows * columns * (2 * options["steps"] * (2.0 * columns + 100) + 20_000),
        memory=lambda rows, columns: 16.0 * rows * columns + 4.0 * columns**2,
    ),
)
