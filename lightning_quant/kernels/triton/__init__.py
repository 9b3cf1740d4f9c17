"""Triton's backend: packed weights decoded within the product, products of int8, fused quantization. Imported only when used.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.kernels import reference
from lightning_quant.kernels.triton.support import DTYPES, refuses_device
from lightning_quant.spec import QuantSpec

OPS = ("linear", "dequantize")


def refuses(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> str:
    """Why this backend cannot run a call, in a few words; empty if it can.

    Example:
        >>> refuses("conv", torch.zeros(1), QuantSpec(8), None)
        'has no conv'
    """
    if op not in OPS:
        return f"has no {op}"
    if op == "linear" and x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    return refuses_device(x)


def describe(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> tuple[str, str]:
    """How this backend computes, and where it is slow."""
    if x.device.type != "cuda":
        return "Triton's interpreter", "for tests only"
    if op == "dequantize":
        return "Triton decodes in one pass", ""
    if input_spec is not None and input_spec.is_int and weight_spec.is_int:
        return "Triton: int8 tensor cores", ""
    slow = "decoding bounds it: memory is saved, not time" if weight_spec.bits == 3 or not weight_spec.is_int else ""
    return "Triton: decoded within the product", slow


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    axis: int,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.dequantize_weight` in one pass: the same bits."""
    from lightning_quant.kernels.triton import weights

    return weights.dequantize_weight(packed, scale, zero_point, shape, axis, spec, dtype)


@torch.library.custom_op("lightning_quant::triton_grad_input", mutates_args=())
def _grad_input(
    grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, weight_spec: str
) -> Tensor:
    from lightning_quant.kernels.triton import weights

    return weights.grad_input(grad, packed, scale, zero_point, in_features, QuantSpec.decode(weight_spec))


@_grad_input.register_fake
def _grad_input_fake(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, spec: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def grad_input(
    grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, weight_spec: QuantSpec
) -> Tensor:
    """`grad @ weight`, the weight decoded within the product: `[..., out_features]` -> `[..., in_features]`.

    An operator, as torch.compile traces the backward pass that calls it.
    """
    return _grad_input(grad, packed, scale, zero_point, in_features, weight_spec.encode())


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
    """`F.linear` with a packed weight, differentiable by `x` and `bias`: `[..., in_features]` -> `[..., out_features]`.

    Integer inputs times integer weights are multiplied as int8 if tiles fit in the weight's groups; any other input is put on its
    grid and multiplied as a float.
    """
    weight = (weight_packed, weight_scale, weight_zero_point)
    if input_spec is not None:
        from lightning_quant.kernels.triton import int8

        if int8.supports_int8(weight_spec, input_spec, in_features):
            given = (input_scale, input_zero_point, in_features, weight_spec, input_spec)
            return int8.Int8Linear.apply(x, *weight, bias, *given)
    from lightning_quant.kernels.triton import weights

    x = reference.quantize_input(x, input_scale, input_zero_point, input_spec)
    return weights.WeightOnlyLinear.apply(x, *weight, bias, in_features, weight_spec)
