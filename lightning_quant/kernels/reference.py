"""The reference kernels: dequantize, then compute in float. The oracle of every other backend, and the fallback."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.functional import dynamic_fake_quantize, fake_quantize
from lightning_quant.numerics import dequantize
from lightning_quant.packing import unpack, unpack_zero_point
from lightning_quant.spec import QuantSpec

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    axis: int,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A packed weight in float32, or rounded to another dtype.

    Args:
        packed: int32 `[channels, words]`.
        scale: as `qparams_shape(shape, spec, axis)`.
        zero_point: packed along the channels, or as it is per tensor; None for symmetric specs.
        shape: of the weight.
        axis: the channel's dimension in `shape`.
    """
    moved = [shape[axis], *(size for dim, size in enumerate(shape) if dim != axis)]
    columns = 1
    for size in moved[1:]:
        columns *= size
    if zero_point is not None and spec.granularity != "tensor":
        zero_point = unpack_zero_point(zero_point, spec, moved[0])
    rows = dequantize(unpack(packed, spec, columns), scale, zero_point, spec)
    return rows.reshape(moved).movedim(0, axis).to(dtype)


def quantize_input(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: QuantSpec | None, axis: int = -1) -> Tensor:
    """The input on its grid: static with `scale` and `zero_point`, or dynamic; None leaves it as it is."""
    if spec is None:
        return x
    if spec.dynamic:
        return dynamic_fake_quantize(x, spec, axis)
    if scale is None or zero_point is None:
        raise ValueError("a static input spec needs its scale and zero point")
    return fake_quantize(x, scale, zero_point, spec, axis)


def describe(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> tuple[str, str]:
    """How this backend computes, and that it is slow."""
    return "dequantized at every call, then torch's float operator", f"no fast kernel for {weight_spec.label}: slower than float"


def linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    in_features: int,
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
) -> Tensor:
    """`F.linear` of the quantized input and the packed weight: `[..., in_features]` -> `[..., out_features]`."""
    x = quantize_input(x, input_scale, input_zero_point, input_spec)
    shape = (weight_packed.shape[0], in_features)
    weight = dequantize_weight(weight_packed, weight_scale, weight_zero_point, shape, 0, weight_spec)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
    dequantize: Callable[..., Tensor] = dequantize_weight,
) -> Tensor:
    """A 1-, 2- or 3-D convolution, or transposed convolution, by the rank of `weight_shape`; a token is a sample."""
    dims = len(weight_shape) - 2
    x = quantize_input(x, input_scale, input_zero_point, input_spec, -dims - 1)
    axis = 1 if transposed else 0
    weight = dequantize(weight_packed, weight_scale, weight_zero_point, weight_shape, axis, weight_spec).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if transposed:
        return _TRANSPOSED[dims](x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _CONVS[dims](x, weight, bias, stride, padding, dilation, groups)


def embedding(
    indices: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    embedding_dim: int,
    weight_spec: QuantSpec,
) -> Tensor:
    """The float32 rows of a packed table: `[...]` -> `[..., embedding_dim]`; only the rows asked for are dequantized."""
    flat = indices.reshape(-1)
    if weight_spec.granularity not in ("channel", "group") or weight_spec.flat_groups:
        shape = (weight_packed.shape[0], embedding_dim)
        table = dequantize_weight(weight_packed, weight_scale, weight_zero_point, shape, 0, weight_spec)
        return F.embedding(indices, table)
    zero_point = None
    if weight_zero_point is not None:
        zero_point = unpack_zero_point(weight_zero_point, weight_spec, weight_packed.shape[0])[flat]
    codes = unpack(weight_packed[flat], weight_spec, embedding_dim)
    return dequantize(codes, weight_scale[flat], zero_point, weight_spec).reshape(*indices.shape, embedding_dim).contiguous()
