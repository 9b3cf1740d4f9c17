"""Fake quantization as functions: values on the grid, gradients as if they were not (STE), or with learned scales (LSQ)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_quant.double_quant import stored_scale
from lightning_quant.numerics import (
    dequantize_rows,
    dynamic_qparams,
    from_groups,
    lsq_gradients,
    max_value,
    qrange,
    quantize_rows,
    to_groups,
)
from lightning_quant.spec import QuantSpec

if TYPE_CHECKING:
    from lightning_quant.kernels.native.fake import Layout

T = TypeVar("T")


class _RoundTrip(torch.autograd.Function):
    """Quantize and dequantize rows; the gradient passes where |x| <= bound (bound None: everywhere)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, bound: Tensor | None) -> Tensor:
        ctx.mask = None if bound is None else rows.abs() <= bound
        return dequantize_rows(quantize_rows(rows, scale, zero_point, spec), stored_scale(scale, spec), zero_point, spec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return (grads[0] if ctx.mask is None else grads[0] * ctx.mask), None, None, None, None


class _LSQ(torch.autograd.Function):
    """LSQ (Esser et al. 2020, arXiv:1902.08153, section 2.1); its zero point is LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, grad_factor: float) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits, ctx.grad_factor = (qmin, qmax), grad_factor
        offset = zero_point.round().clamp(qmin, qmax)
        return ((x * (1.0 / scale)).round_().add_(offset).clamp_(qmin, qmax) - offset) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax = ctx.limits
        found = lsq_gradients(grads[0], x, scale, zero_point, qmin, qmax, ctx.grad_factor, ctx.needs_input_grad[:3])
        return *found, None, None, None


def _fused(*tensors: Tensor) -> bool:
    """Whether Triton's kernels take a call."""
    if not (tensors[0].is_cuda or os.environ.get("LQ_BACKEND") == "triton"):
        return False
    from lightning_quant.kernels.triton.support import fuses

    return fuses(*tensors)


def native_layout(x: Tensor, spec: QuantSpec, axis: int) -> Layout | None:
    """How `x` lies before the C library's kernels, if they take the call."""
    if not spec.is_int or x.device.type != "cpu":
        return None
    from lightning_quant.kernels.native.fake import layout_of, takes

    return layout_of(x, spec, axis) if takes(x) else None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0) -> Tensor:
    """Quantize and dequantize, with the straight-through estimator: the gradient is 1 inside the range and 0 outside.

    Integers have the values of `torch.fake_quantize_per_*_affine`, to the bit. Computed in float32, returned in `x`'s dtype.

    Args:
        x: float, any shape.
        scale, zero_point: float32 and int32 in the shape of `qparams_shape`.
        axis: as in `to_groups`.

    Example:
        >>> x = torch.tensor([0.4, 1.6, 100.0], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), QuantSpec(4, granularity="tensor"))
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 2.0, 7.0], [1.0, 1.0, 0.0])
    """
    if spec.is_int and _fused(x, scale, zero_point):
        from lightning_quant.kernels.triton.fake_quant import FusedFakeQuantize

        return FusedFakeQuantize.apply(x, scale.detach().float(), zero_point.detach(), spec, axis, 1.0)
    layout = native_layout(x, spec, axis)
    if layout is not None:
        from lightning_quant.kernels import cpu_fake_quant

        return cpu_fake_quant.fake_quantize(x, scale.float(), zero_point, layout)
    values = x.float()
    if not spec.is_int:
        rows = to_groups(values, spec, axis)
        out = _RoundTrip.apply(rows, scale, zero_point, spec, scale.reshape(-1, 1) * max_value(spec))
        return from_groups(out, x.shape, spec, axis).to(x.dtype)
    qmin, qmax = qrange(spec)
    if torch.compiler.is_compiling() or type(values) not in (Tensor, nn.Parameter):
        # torch's fused operators have no fake kernel for their backward; the same values and gradients in plain ones
        return lsq_fake_quantize(x, scale, zero_point, spec, axis)
    if spec.granularity == "tensor":
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, qmin, qmax).to(x.dtype)
    rows = to_groups(values, spec, axis)
    out = torch.fake_quantize_per_channel_affine(rows, scale.flatten(), zero_point.flatten(), 0, qmin, qmax)
    return from_groups(out, x.shape, spec, axis).to(x.dtype)


def dynamic_fake_quantize(x: Tensor, spec: QuantSpec, axis: int = -1) -> Tensor:
    """Quantize and dequantize with the range that `x` has now; the gradient is 1 everywhere, as nothing lies outside.

    Args:
        x: float, any shape.
        axis: for tokens, the first dimension of a token's own features.
    """
    if x.numel() == 0:
        return x
    if spec.is_int and spec.granularity == "token" and _fused(x):
        from lightning_quant.kernels.triton.quantize import TokenFakeQuantize

        return from_groups(TokenFakeQuantize.apply(to_groups(x, spec, axis), spec), x.shape, spec, axis)
    layout = native_layout(x, spec, axis)
    if layout is not None:
        from lightning_quant.kernels import cpu_fake_quant

        return cpu_fake_quant.dynamic_fake_quantize(x, layout)
    scale, zero_point = dynamic_qparams(x, spec, axis)
    rows = to_groups(x.float(), spec, axis)
    return from_groups(_RoundTrip.apply(rows, scale, zero_point, spec, None), x.shape, spec, axis).to(x.dtype)


def lsq_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0, elements: int | None = None
) -> Tensor:
    """Fake quantization whose scale, and zero point if it requires a gradient, learn (LSQ, LSQ+).

    Their gradients are multiplied by `1 / sqrt(n * q_max)` (LSQ, section 2.2).

    Args:
        x: float, any shape.
        scale, zero_point: float32 in the shape of `qparams_shape`; a zero point is rounded before use.
        elements: n, how many elements share a scale; by default counted in `x`.
    """
    if not spec.is_int:
        raise ValueError(f"LSQ learns the scale of an integer grid, not of {spec.dtype}; use method='ste'")
    qmin, qmax = qrange(spec)
    per_tensor = spec.granularity == "tensor"  # no reshape: the scale broadcasts, and channels_last stays
    n = elements or (x.numel() if per_tensor else spec.group_size or x.numel() // max(x.shape[axis], 1))
    factor = 1.0 / math.sqrt(max(n * qmax, 1))
    if _fused(x, scale, zero_point):
        from lightning_quant.kernels.triton.fake_quant import FusedFakeQuantize

        return FusedFakeQuantize.apply(x, scale.float(), zero_point.float(), spec, axis, factor)
    layout = native_layout(x, spec, axis)
    if layout is not None and type(scale) in (Tensor, nn.Parameter) and type(zero_point) in (Tensor, nn.Parameter):
        from lightning_quant.kernels import cpu_fake_quant

        return cpu_fake_quant.lsq_fake_quantize(x, scale.float(), zero_point.float(), layout, factor)
    values = x.float()
    rows = values if per_tensor else to_groups(values, spec, axis)
    shape = (1,) if per_tensor else (-1, 1)
    out = _LSQ.apply(rows, scale.reshape(shape), zero_point.float().reshape(shape), qmin, qmax, factor)
    return (out if per_tensor else from_groups(out, x.shape, spec, axis)).to(x.dtype)


def from_sources(compute: Callable[[], T], *quantized: Tensor) -> T:
    """`compute()`, for whose backward pass is saved what these tensors were fake-quantized from, where that is known, not they."""
    if torch.compiler.is_compiling() or quantized[0].device.type != "cpu":
        return compute()
    from lightning_quant.kernels.cpu_fake_quant import saving_sources

    with saving_sources(*quantized):
        return compute()
