"""How quantized tensors learn beyond STE and LSQ: small functions on tensors, each with its paper's section."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.numerics import MIN_SCALE, from_groups, qrange, to_groups
from lightning_quant.spec import QuantSpec

# (x, scale, zero point, spec, axis, elements) -> x on its grid, differentiable by x, scale and zero point
Fake = Callable[..., Tensor]


def all_levels(spec: QuantSpec) -> tuple[int, ...] | None:
    """None: every code of the grid."""
    return None


@dataclass(frozen=True)
class Rule:
    """What a method does to one kind of tensor, weights or activations.

    Args:
        fake: fake quantization whose scale is a parameter, called with `(x, scale, zero_point, spec, axis, elements)`; None:
            ranges are observed, with the straight-through estimator.
        learns_zero_point: whether the zero point of an asymmetric grid is a parameter, too.
        transform: of the float weight, before it is quantized; what it gives is also what is packed.
        levels: the codes in use, where it is not every one.
        regularization: lambda of an L2 term on the largest magnitude of the range, `lambda * alpha ** 2`.
        observer: where learned scales below 8 bits start from, unless the recipe says.
    """

    fake: Fake | None = None
    learns_zero_point: bool = True
    transform: Callable[[Tensor], Tensor] | None = None
    levels: Callable[[QuantSpec], tuple[int, ...] | None] = all_levels
    regularization: float = 0.0
    observer: str = "mse"


# observed ranges, and the straight-through estimator
PLAIN = Rule()


def _to_rows(x: Tensor, spec: QuantSpec, axis: int, *qparams: Tensor) -> tuple[Tensor, ...]:
    """Float32 values beside scales (and zero points) that broadcast to them; per tensor nothing is reshaped."""
    whole = spec.granularity == "tensor"
    rows = x.float() if whole else to_groups(x.float(), spec, axis)
    return rows, *(value.float().reshape((1,) if whole else (-1, 1)) for value in qparams)


def _from_rows(rows: Tensor, x: Tensor, spec: QuantSpec, axis: int) -> Tensor:
    return (rows if spec.granularity == "tensor" else from_groups(rows, x.shape, spec, axis)).to(x.dtype)


def gradient_factor(x: Tensor, spec: QuantSpec, axis: int, elements: int | None, qmax: int) -> float:
    """`1 / sqrt(n * q_max)` (LSQ, section 2.2), with n the elements that share a scale."""
    n = elements or (x.numel() if spec.granularity == "tensor" else spec.group_size or x.numel() // max(x.shape[axis], 1))
    return 1.0 / math.sqrt(max(n * qmax, 1))


# --- EWGS -------------------------------------------------------------------------------------------------------------


class _Elementwise(torch.autograd.Function):
    """The identity in front of a quantizer; its backward turns the quantizer's straight-through gradient into EWGS's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, delta: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.delta = delta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        ratio = x * (1.0 / scale)
        # the quantizer has set the gradient to 0 outside the range
        return (ratio - ratio.round()).mul_(grads[0].abs()).mul_(ctx.delta).add_(grads[0]), None, None


def scale_elementwise(x: Tensor, scale: Tensor, spec: QuantSpec, axis: int = 0, *, delta: float) -> Tensor:
    """Element-wise gradient scaling (Lee et al. 2021, arXiv:2104.00903, equation 4): the identity, in front of a quantizer.

    The gradient g of the rounded value becomes `g * (1 + delta * sign(g) * e)` at the value before rounding, with e its rounding
    error in codes: an element is pushed harder where the step that g asks for crosses to another code sooner. The scale's own
    gradient is left alone: `delta * |g| * e` has no sign of its own, and over a whole tensor it would outweigh what the loss says.

    Args:
        x: float, any shape.
        scale: float32 in the shape of `qparams_shape`.
        axis: as in `to_groups`.
        delta: fixed; in units of codes.

    Returns:
        `x`.

    Example:
        >>> x = torch.tensor([0.4, 0.4], requires_grad=True)
        >>> y = scale_elementwise(x, torch.ones(1), QuantSpec(4, granularity="tensor"), delta=0.5)
        >>> (y * torch.tensor([1.0, -1.0])).sum().backward()
        >>> x.grad
        tensor([ 1.2000, -0.8000])
    """
    rows, step = _to_rows(x, spec, axis, scale)
    return _from_rows(_Elementwise.apply(rows, step.detach(), delta), x, spec, axis)


# --- PACT -------------------------------------------------------------------------------------------------------------


class _Pact(torch.autograd.Function):
    """Clip to a learned level, then round with the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = qmin, qmax
        return ((x * (1.0 / scale)).round_().add_(zero_point).clamp_(qmin, qmax) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        low, high = (limit - zero_point for limit in ctx.limits)
        ratio, grad = x * (1.0 / scale), grads[0]
        below, above = ratio < low, ratio > high
        by_scale = None
        if ctx.needs_input_grad[1]:
            largest = torch.maximum(high, -low)  # alpha = largest * scale; a step of SGD moves alpha by the rate times its gradient
            slope = torch.where(above, high, 0.0) + torch.where(below, low, 0.0)
            by_scale = (grad * slope).sum_to_size(scale.shape) / largest.square()
        return grad * ~(below | above), by_scale, None, None, None


def pact_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0, elements: int | None = None
) -> Tensor:
    """A learned clipping level alpha (Choi et al. 2018, arXiv:1805.06085, section 3): its gradient is 1 where x is clipped, else 0.

    The range stays what the observer found in shape: [0, alpha] behind a ReLU, as in the paper; with a zero point inside, both ends
    are clipped, in proportion. alpha is the end farther from 0: codes times `scale`, which is the parameter; its gradient is such
    that under SGD alpha moves as if it were.

    Args:
        x: float, any shape.
        scale, zero_point: in the shape of `qparams_shape`; the zero point is fixed.

    Example:
        >>> scale = torch.tensor([0.2], requires_grad=True)
        >>> spec = QuantSpec(4, signed=False, symmetric=False, granularity="tensor")
        >>> y = pact_fake_quantize(torch.tensor([-1.0, 1.0, 5.0]), scale, torch.tensor([0]), spec)
        >>> y.sum().backward()
        >>> y.tolist(), round(scale.grad.item() * 15, 4)  # alpha is 15 * 0.2
        ([0.0, 1.0, 3.0], 1.0)
    """
    rows, step, offset = _to_rows(x, spec, axis, scale, zero_point)
    return _from_rows(_Pact.apply(rows, step, offset, *qrange(spec)), x, spec, axis)


# --- DoReFa -----------------------------------------------------------------------------------------------------------


def tanh_weight(weight: Tensor) -> Tensor:
    """DoReFa's weight (Zhou et al. 2016, arXiv:1606.06160, section 2.3): `tanh(w) / max|tanh(w)|`, times `max|w|`.

    The factor keeps a trained model's weights in their range; it and the maximum take no gradient.

    Example:
        >>> tanh_weight(torch.tensor([-2.0, 0.5, 1.0]))
        tensor([-2.0000,  0.9587,  1.5800])
    """
    if weight.numel() == 0:
        return weight
    bent = weight.float().tanh()
    with torch.no_grad():
        factor = weight.abs().amax().float() / bent.abs().amax().clamp(min=MIN_SCALE)
    return (bent * factor).to(weight.dtype)


# --- few levels -------------------------------------------------------------------------------------------------------


def ternary_levels(spec: QuantSpec) -> tuple[int, ...] | None:
    """-1, 0 and 1 of 2 bits; of wider grids every code.

    Example:
        >>> ternary_levels(QuantSpec(2)), ternary_levels(QuantSpec(8))
        ((-1, 0, 1), None)
    """
    return (-1, 0, 1) if spec.is_int and spec.bits == 2 else None


def binary_levels(spec: QuantSpec) -> tuple[int, ...] | None:
    """-1 and 1 of 2 bits; of wider grids every code.

    Example:
        >>> binary_levels(QuantSpec(2)), binary_levels(QuantSpec(8))
        ((-1, 1), None)
    """
    return (-1, 1) if spec.is_int and spec.bits == 2 else None


def nearest_level(ratio: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The nearest of -1, 0, 1, or of -1, 1, for values in codes.

    Example:
        >>> x = torch.tensor([-3.0, 0.2, 0.7])
        >>> nearest_level(x, (-1, 0, 1)).tolist(), nearest_level(x, (-1, 1)).tolist()
        ([-1.0, 0.0, 1.0], [-1.0, 1.0, 1.0])
    """
    if 0 in levels:
        return ratio.round().clamp_(levels[0], levels[-1])
    return torch.where(ratio.isnan(), ratio, torch.where(ratio < 0, -1.0, 1.0))


class _FewLevels(torch.autograd.Function):
    """Fewer levels than the bits allow, times a learned scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: tuple[int, ...], factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.levels, ctx.factor = levels, factor
        return nearest_level(x * (1.0 / scale), levels) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        ratio, grad = x * (1.0 / scale), grads[0]
        slope = nearest_level(ratio, ctx.levels)
        if 0 in ctx.levels:
            inside = ratio.round().abs() <= 1  # up to the middle between codes
            slope = slope - ratio * inside
        else:
            inside = ratio.abs() <= 1
        return grad * inside, (grad * slope).sum_to_size(scale.shape) * ctx.factor, None, None


def _few_levels(
    x: Tensor, scale: Tensor, spec: QuantSpec, axis: int, elements: int | None, levels: tuple[int, ...] | None
) -> Tensor:
    if levels is None:
        raise ValueError(f"{spec.label} has more than 2 bits, so all its codes are in use: lsq_fake_quantize is for it")
    rows, step = _to_rows(x, spec, axis, scale)
    factor = gradient_factor(x, spec, axis, elements, qmax=1)
    return _from_rows(_FewLevels.apply(rows, step, levels, factor), x, spec, axis)


def ternary_fake_quantize(x: Tensor, scale: Tensor, spec: QuantSpec, axis: int = 0, elements: int | None = None) -> Tensor:
    """Levels -1, 0, 1 times a learned scale (ParetoQ, Liu et al. 2025, arXiv:2502.02631, section 3.2).

    The gradient by x passes within +-1.5 scales (its stretched range, of three thirds for three levels), the scale's is LSQ's.

    Args:
        x: float, any shape.
        scale: float32 in the shape of `qparams_shape`; its gradient is multiplied as LSQ's.
        spec: 2 bits, symmetric.

    Raises:
        ValueError: more bits.

    Example:
        >>> ternary_fake_quantize(torch.tensor([-3.0, 0.2, 0.6]), torch.ones(1), QuantSpec(2, granularity="tensor"))
        tensor([-1., 0., 1.])
    """
    return _few_levels(x, scale, spec, axis, elements, ternary_levels(spec))


def binary_fake_quantize(x: Tensor, scale: Tensor, spec: QuantSpec, axis: int = 0, elements: int | None = None) -> Tensor:
    """The sign times a learned scale, for 1 bit of information in 2 (elastic binarization, Liu et al. 2022, arXiv:2205.13016,
    section 2.1, as ParetoQ has it for weights, arXiv:2502.02631, section 3.2).

    The gradient by x passes within +-1 scale, and the scale's is that of `sign(x) * scale`, which is exact.

    Args:
        x: float, any shape.
        scale: float32 in the shape of `qparams_shape`; its gradient is multiplied as LSQ's.
        spec: 2 bits, symmetric.

    Raises:
        ValueError: more bits.

    Example:
        >>> binary_fake_quantize(torch.tensor([-3.0, 0.2, 0.6]), torch.ones(1), QuantSpec(2, granularity="tensor"))
        tensor([-1.,  1.,  1.])
    """
    return _few_levels(x, scale, spec, axis, elements, binary_levels(spec))


def refit_scale(rows: Tensor, scale: Tensor, levels: tuple[int, ...], steps: int = 20, counts: Tensor | float = 1.0) -> Tensor:
    """Scales with a smaller squared error, for codes that are levels: codes and scale are made best for each other by turns.

    Args:
        rows: `[n_scales, elements]`.
        scale: `[n_scales]`, where to start.
        levels: as in `nearest_level`. Where 0 is none of them, only a tiny scale does for what is all 0.
        counts: how often each element occurs: 0 for what only fills a group up.

    Example:
        >>> refit_scale(torch.tensor([[-1.0, -0.9, 0.1, 1.1]]), torch.tensor([0.7]), (-1, 0, 1))
        tensor([1.])
    """
    values = rows.float()
    for _ in range(steps):
        codes = nearest_level(values / scale[:, None], levels)
        found = (values * codes * counts).sum(1) / (codes.square() * counts).sum(1).clamp(min=1)
        scale = torch.where(found > 0, found, scale if 0 in levels else MIN_SCALE)
    return scale
