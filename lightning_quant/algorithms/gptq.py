"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): round column by column, and let the columns to come make up for each error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_quant.algorithms.base import Algorithm, Cost, suited, weight_quantizer, weight_spec
from lightning_quant.blocks import Unit
from lightning_quant.grids import nearest, output_error, refine_scale, search_qparams
from lightning_quant.numerics import from_groups, qrange, to_groups
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import put_weight_matrix, weight_matrix


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian (section 3.3, step 3); damped more until it exists."""
    mean = hessian.diagonal().mean()
    for attempt in range(8):
        damped = hessian.clone()
        damped.diagonal().add_(mean * damp * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError(f"a Hessian of {len(hessian)} inputs has no inverse, however much it is damped: are activations nan or inf?")


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    *,
    damp: float = 0.01,
    block_size: int = 64,
) -> Tensor:
    """Put a weight matrix on the grid of given qparams with little error in the layer's output.

    Columns are taken in the order of falling activation (section 3.2 of the authors' code, "act-order"); as scales belong to
    groups of the original order, the result needs no index. A channel for which rounding to nearest does better is rounded to
    nearest, so no channel's output error is ever larger than that.

    Args:
        weight: float32 `[channels, columns]`.
        hessian: float32 `[columns, columns]`, the sum of `x x^T` over the layer's inputs, times any factor. A column whose
            input was always 0 is rounded to nearest.
        scale, zero_point: in the shape of `qparams_shape(weight.shape, spec)`, found before: they stay.
        spec: integers, per tensor, channel or group.
        damp: added to the diagonal, as a part of its mean; more where the matrix is singular.
        block_size: columns whose updates are applied to the rest together.

    Returns:
        float32 `[channels, columns]`, every value on the grid.

    Raises:
        ValueError: the Hessian has nan or inf.

    Example:
        >>> from lightning_quant.numerics import calc_qparams
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> weight, x, spec = torch.randn(4, 16), torch.randn(64, 16) @ torch.randn(16, 16), QuantSpec(3)
        >>> qparams = calc_qparams(weight.amin(1, True), weight.amax(1, True), spec)
        >>> rounded = gptq(weight, x.T @ x, *qparams, spec)
        >>> bool((x @ (weight - rounded).T).norm() < (x @ (weight - nearest(weight, *qparams, spec)).T).norm())
        True
    """
    plain = nearest(weight, scale, zero_point, spec)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        return plain
    order = torch.argsort(diagonal, descending=True)

    def spread(values: Tensor) -> Tensor:
        """One value a column, `[columns, channels]` in the new order."""
        rows = to_groups(weight, spec)
        return from_groups(values.float().reshape(-1, 1).expand(rows.shape), weight.shape, spec).T[order].contiguous()

    live = hessian.clone()
    live.diagonal()[dead] = diagonal[~dead].mean()
    upper = _inverse_factor(live[order][:, order], damp)
    work = torch.where(dead, plain, weight).T[order].contiguous()  # a column of the weight is a row here: contiguous
    out = _round_columns(work, upper, spread(scale), spread(zero_point), qrange(spec), block_size)
    rounded = torch.empty_like(out)
    rounded[order] = out
    rounded = rounded.T.contiguous()
    better = output_error(weight, rounded, hessian) < output_error(weight, plain, hessian)
    return torch.where(better[:, None], rounded, plain)


def _round_columns(work: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, limits: tuple[int, int], block_size: int) -> Tensor:
    """The loop of section 3.3: `work` `[columns, channels]`, of which each column takes over the errors of those before it."""
    inverse_scales, out = 1.0 / scales, torch.empty_like(work)
    for start in range(0, len(work), block_size):
        stop = min(start + block_size, len(work))
        errors, factor = torch.empty_like(work[start:stop]), upper[start:stop, start:stop].contiguous()
        reciprocals = (1.0 / factor.diagonal()).tolist()
        for index in range(stop - start):
            at = start + index
            column, value = work[at], out[at]
            torch.mul(column, inverse_scales[at], out=value)
            value.round_().add_(zeros[at]).clamp_(*limits).sub_(zeros[at]).mul_(scales[at])
            torch.sub(column, value, out=errors[index]).mul_(reciprocals[index])
            work[at + 1 : stop].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return out


@torch.no_grad()
def gptq_with_ranges(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    *,
    search: bool,
    refine: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ that may clip ranges before, and fit scales to the codes after; a channel for which it is no gain keeps what was given.

    Args:
        weight, hessian, scale, zero_point, spec: as in `gptq`.
        search: see `search_qparams`.
        refine: see `refine_scale`.
        options: of `gptq`.

    Returns:
        the rounded weight, and the scale and zero point whose grid it is on. No channel's output error is larger than that of
        rounding to nearest with the scale and zero point given.
    """
    plain = nearest(weight, scale, zero_point, spec)
    own = spec.granularity in ("channel", "group")
    found = search_qparams(weight, hessian, spec, ends=False) if search and own else (scale, zero_point)
    rounded = gptq(weight, hessian, *found, spec, **options)
    if refine and own:
        scales = refine_scale(weight, hessian, *found, rounded, spec)
        rounded = _with_scale(rounded, found[0], scales, spec)
        found = (scales, found[1])
    if not own:
        return rounded, scale, zero_point
    better = output_error(weight, rounded, hessian) < output_error(weight, plain, hessian)
    rounded = torch.where(better[:, None], rounded, plain)
    return rounded, torch.where(better[:, None], found[0], scale), torch.where(better[:, None], found[1], zero_point)


def _with_scale(rounded: Tensor, before: Tensor, after: Tensor, spec: QuantSpec) -> Tensor:
    """The same codes times other scales, `[channels, groups]`."""
    size = spec.group_size or rounded.shape[1]
    one, two = (scale.repeat_interleave(size, dim=1)[:, : rounded.shape[1]] for scale in (before, after))
    return (rounded / one).round_().mul_(two)


def apply_gptq(
    unit: Unit, *, damp: float = 0.01, block_size: int = 64, search: bool | None = None, refine: bool | None = None
) -> None:
    """Round a unit's weights with GPTQ. Layers for which it cannot be done are rounded to nearest, and noted in `lq.summary`.

    Args:
        damp: added to the diagonal of a layer's Hessian, as a part of its mean.
        block_size: columns whose updates are applied to the rest together.
        search: clip each group's range beforehand, where that lessens the output error; None: below 4 bits, where it pays.
        refine: fit the scales to the codes afterwards, by least squares; None: below 4 bits.
    """
    for name, module in suited(unit, "gptq: rounded to nearest", "hessian").items():
        quantizer, spec, hessian = weight_quantizer(module), weight_spec(module), unit.statistics["hessian"].pop(name)
        few = spec.bits < 4
        qparams = quantizer.qparams()
        weight = weight_matrix(module)
        rounded, scale, zero_point = gptq_with_ranges(
            weight,
            hessian,
            *qparams,
            spec,
            search=few if search is None else search,
            refine=few if refine is None else refine,
            damp=damp,
            block_size=block_size,
        )
        quantizer.set_qparams(scale, zero_point)
        put_weight_matrix(module, rounded)


GPTQ = Algorithm(
    apply_gptq,
    "rounder",
    ("hessian",),
    cost=Cost(
        passes=lambda *_: 0.8,
        work=lambda rows, columns, options: 12.0 * columns**3 + 4.0 * rows * columns**2 + 2500.0 * rows * columns,
        memory=lambda rows, columns: 20.0 * columns**2 + 20.0 * rows * columns,
    ),
    limits={"damp": (1e-6, 1)},
)
