"""Which grid a weight matrix is rounded to: ranges, and scales, with the least error in the layer's output.

`D` stands for the error of a weight matrix, `[channels, columns]`, and `H` for the sum of `x x^T` over the layer's inputs: the
squared error of each channel's output is the diagonal of `D H D^T`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.numerics import MIN_SCALE, calc_qparams, dequantize, qparams_shape, quantize, to_groups
from lightning_quant.spec import QuantSpec


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each output channel over the calibration data, `[channels]`: the diagonal of `D H D^T`.

    Args:
        weight, rounded: `[channels, columns]`.
        hessian: `[columns, columns]`, the sum of `x x^T`.
    """
    difference = weight - rounded
    return ((difference @ hessian) * difference).sum(dim=1)


def nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """A weight matrix rounded to the nearest values of its grid."""
    return dequantize(quantize(weight, scale, zero_point, spec), scale, zero_point, spec)


def minmax_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The qparams of the whole range of a weight matrix."""
    low, high = torch.aminmax(to_groups(weight, spec), dim=1)
    scale, zero_point = calc_qparams(low, high, spec)
    shape = qparams_shape(weight.shape, spec)
    return scale.reshape(shape), zero_point.reshape(shape)


def _blocks(hessian: Tensor, size: int) -> Tensor:
    """The diagonal blocks of `H`, `[groups, size, size]`; a ragged last one is filled up with 0."""
    columns = len(hessian)
    groups = -(-columns // size)
    if groups * size != columns:
        hessian = torch.nn.functional.pad(hessian, (0, groups * size - columns) * 2)
    return torch.stack([hessian[start : start + size, start : start + size] for start in range(0, groups * size, size)])


@torch.no_grad()
def search_qparams(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, *, steps: int = 20, smallest: float = 0.5, ends: bool = True
) -> tuple[Tensor, Tensor]:
    """Clip each group's range where that lessens the error of its part of the output, as AWQ's code does (arXiv:2306.00978).

    Args:
        weight: float32 `[channels, columns]`.
        hessian: float32 `[columns, columns]`, the sum of `x x^T` over the layer's inputs, times any factor.
        spec: integers, per channel or group.
        steps: how many ranges are tried, from the whole one to `smallest` times it.
        ends: try to clip either end of an asymmetric range alone, too.

    Returns:
        scale and zero point, in the shape of `qparams_shape(weight.shape, spec)`.
    """
    rows = to_groups(weight, spec)
    groups = rows.shape[0] // weight.shape[0]
    blocks = _blocks(hessian, rows.shape[1])
    columns_first = rows.view(-1, groups, rows.shape[1]).transpose(0, 1)
    low, high = (end.clamp(**bound) for end, bound in zip(torch.aminmax(rows, dim=1), ({"max": 0.0}, {"min": 0.0}), strict=True))

    def error(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = calc_qparams(low[:, None], high[:, None], spec)
        plain = QuantSpec(spec.bits, signed=spec.signed, symmetric=spec.symmetric)
        difference = nearest(rows, scale, zero_point, plain).view(-1, groups, rows.shape[1]).transpose(0, 1) - columns_first
        return ((difference @ blocks) * difference).sum(-1).transpose(0, 1).reshape(-1)

    best = error(low, high)
    best_low, best_high = low, high
    for low_moves, high_moves in ((True, True), (True, False), (False, True))[: 3 if ends and not spec.symmetric else 1]:
        full_low, full_high = best_low, best_high
        for step in range(1, steps + 1):
            shrink = 1 - (1 - smallest) * step / steps
            try_low = full_low * shrink if low_moves else full_low
            try_high = full_high * shrink if high_moves else full_high
            found = error(try_low, try_high)
            better = found < best
            best = torch.where(better, found, best)
            best_low, best_high = torch.where(better, try_low, best_low), torch.where(better, try_high, best_high)
    scale, zero_point = calc_qparams(best_low, best_high, spec)
    shape = qparams_shape(weight.shape, spec)
    return scale.reshape(shape), zero_point.reshape(shape)


@torch.no_grad()
def refine_scale(weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, rounded: Tensor, spec: QuantSpec) -> Tensor:
    """The scales that, with the codes as they are, give the least output error: least squares in all scales of a channel.

    Args:
        weight, rounded: float32 `[channels, columns]`, the float and the rounded one.
        hessian: float32 `[columns, columns]`.
        scale, zero_point: what `rounded` was made with, `[channels, groups]`.
        spec: integers, per channel or group.

    Returns:
        scales in the shape of `scale`. One that would not be positive stays.
    """
    groups = scale.shape[1]
    size = spec.group_size or weight.shape[1]
    columns = weight.shape[1]
    spread = scale.repeat_interleave(size, dim=1)[:, :columns]
    levels = (rounded / spread).round()  # code - zero point
    group = torch.arange(columns, device=weight.device) // size
    member = torch.nn.functional.one_hot(group, groups).to(weight.dtype)
    target = torch.einsum("cn,cn,ng->cg", weight @ hessian, levels, member)
    # normal matrix: for groups g and h the sum of levels in g times H times levels in h
    products = (
        torch.stack([levels[:, group == each] @ hessian[group == each] for each in range(groups)], dim=1) * levels[:, None, :]
    )
    normal = products @ member
    mean = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    normal = normal + torch.eye(groups, device=weight.device) * (1e-4 * mean)[:, None, None]
    target = target + 1e-4 * mean[:, None] * scale  # pulled towards what they are
    found = torch.linalg.solve(normal, target)
    usable = torch.isfinite(found) & (found > 0.5 * scale) & (found < 2.0 * scale)
    return torch.where(usable, found, scale).clamp(min=MIN_SCALE)
