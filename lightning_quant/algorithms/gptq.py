"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): round column by column, and let the columns to come make up for each error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_quant.blocks import walk
from lightning_quant.calibration import evaluating
from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn import FakeModule
from lightning_quant.numerics import dequantize, from_groups, qrange, to_groups
from lightning_quant.numerics import quantize as quantize_codes
from lightning_quant.spec import QuantSpec
from lightning_quant.statistics import hessians, put_weight_matrix, weight_matrix, why_no_rows
from lightning_quant.surgery import get_info


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each output channel over the calibration data, `[channels]`: the diagonal of `D H D^T`.

    Args:
        weight, rounded: `[channels, columns]`.
        hessian: `[columns, columns]`, the sum of `x x^T`.
    """
    difference = weight - rounded
    return ((difference @ hessian) * difference).sum(dim=1)


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
    block_size: int = 128,
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
        >>> nearest = dequantize(quantize_codes(weight, *qparams, spec), *qparams, spec)
        >>> rounded = gptq(weight, x.T @ x, *qparams, spec)
        >>> bool((x @ (weight - rounded).T).norm() < (x @ (weight - nearest).T).norm())
        True
    """
    nearest = dequantize(quantize_codes(weight, scale, zero_point, spec), scale, zero_point, spec)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        return nearest
    order = torch.argsort(diagonal, descending=True)

    def spread(values: Tensor) -> Tensor:
        """One value a column, in the new order."""
        rows = to_groups(weight, spec)
        return from_groups(values.float().reshape(-1, 1).expand(rows.shape), weight.shape, spec)[:, order]

    scales, zeros = spread(scale), spread(zero_point)
    inverse_scales = 1.0 / scales
    qmin, qmax = qrange(spec)
    work = torch.where(dead, nearest, weight)[:, order]
    live = hessian.clone()
    live.diagonal()[dead] = diagonal[~dead].mean()
    upper = _inverse_factor(live[order][:, order], damp)
    out = torch.empty_like(work)
    columns = work.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = work[:, start:stop].clone(), torch.empty_like(work[:, start:stop])
        factor = upper[start:stop, start:stop]
        for index in range(stop - start):
            at, column = start + index, block[:, index]
            codes = (column * inverse_scales[:, at]).round_().add_(zeros[:, at]).clamp_(qmin, qmax)
            out[:, at] = codes.sub_(zeros[:, at]).mul_(scales[:, at])
            errors[:, index] = (column - out[:, at]) / factor[index, index]
            block[:, index + 1 :].addr_(errors[:, index], factor[index, index + 1 :], alpha=-1)
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    rounded = torch.empty_like(out)
    rounded[:, order] = out
    better = output_error(weight, rounded, hessian) < output_error(weight, nearest, hessian)
    return torch.where(better[:, None], rounded, nearest)


def apply_gptq(model: nn.Module, run: Callable[[], None]) -> None:
    """Round a prepared model's weights with GPTQ, block after block, each on the inputs that the rounded ones before it produce.

    Layers for which it cannot be done (other types, grouped convolutions, codes that are no integers, never reached by the
    calibration data) are rounded to nearest and noted in `lq.summary`.

    Args:
        model: prepared with `training=False`, ranges of static activations found; its weights are put on the grid in place.
        run: passes the calibration data through `model`.
    """
    info = get_info(model)

    def visit(modules: dict[str, FakeModule], replay: Callable[[], None]) -> None:
        with hessians(modules) as found:
            replay()
        for name, module in modules.items():
            spec, reason = module.scheme.weight, why_no_rows(module)
            assert spec is not None
            if not spec.is_int or spec.flat_groups:
                reason = f"not for {spec.dtype}"
            if not reason and name not in found:
                reason = "calibration has not reached it"
            if reason and info is not None:
                info.notes[name] = "; ".join(filter(None, (info.notes.get(name), f"gptq: rounded to nearest, {reason}")))
            if reason:
                continue
            quantizer = module.weight_fake_quant
            assert isinstance(quantizer, FakeQuantize)
            scale, zero_point = quantizer.qparams()
            put_weight_matrix(module, gptq(weight_matrix(module), found.pop(name), scale, zero_point, spec))

    with evaluating(model):
        walk(model, run, visit)
