"""The operators `lightning_quant::linear`, `conv`, `embedding` and `dequantize`, and the table of backends behind them.

The operators are what torch.compile and torch.export trace. A backend is one entry of `KERNELS`; the first that supports a
call runs it. A module may name another one (its `backend`), and the environment variable `LQ_BACKEND` names one to use instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quant.kernels import bitsandbytes, reference, triton
from lightning_quant.spec import QuantSpec


@dataclass(frozen=True)
class Kernel:
    """A backend: operator name -> function with the signature of `reference`, and what it can run.

    Args:
        ops: its functions by operator name.
        supports: `(op, x, weight_spec, input_spec) -> bool`.
    """

    ops: dict[str, Callable[..., Tensor]]
    supports: Callable[[str, Tensor, QuantSpec, QuantSpec | None], bool]


KERNELS: dict[str, Kernel] = {
    "bitsandbytes": Kernel(
        {"linear": bitsandbytes.linear, "dequantize": bitsandbytes.dequantize_weight},
        bitsandbytes.supports,
    ),
    "triton": Kernel({"linear": triton.linear, "dequantize": triton.dequantize_weight}, triton.supports),
    "reference": Kernel(
        {
            "linear": reference.linear,
            "conv": reference.conv,
            "embedding": reference.embedding,
            "dequantize": reference.dequantize_weight,
        },
        lambda op, x, weight_spec, input_spec: True,
    ),
}


# backends that are another package's
FOREIGN = ("bitsandbytes",)


def select(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None, backend: str = "") -> Callable[..., Tensor]:
    """The function that runs a call.

    Args:
        backend: the one to use where it can run the call; `"native"` is the package's own, whichever it is.

    Raises:
        ValueError: `LQ_BACKEND` names no backend, or one that cannot run this call.
    """
    forced = os.environ.get("LQ_BACKEND")
    if forced:
        if forced not in KERNELS:
            raise ValueError(f"LQ_BACKEND={forced!r}: no such backend; valid: {', '.join(KERNELS)}")
        kernel = KERNELS[forced]
        if op not in kernel.ops or not kernel.supports(op, x, weight_spec, input_spec):
            specs = f"weight {weight_spec.label}, input {input_spec.label if input_spec else 'float'}"
            raise ValueError(f"LQ_BACKEND={forced!r} cannot run {op} with {specs} on {x.device}; unset it, or use 'reference'")
        return kernel.ops[op]
    able = {name: k.ops[op] for name, k in KERNELS.items() if op in k.ops and k.supports(op, x, weight_spec, input_spec)}
    if backend in able:
        return able[backend]
    return next(function for name, function in able.items() if backend != "native" or name not in FOREIGN)


def _specs(weight_spec: str, input_spec: str) -> tuple[QuantSpec, QuantSpec | None]:
    return QuantSpec.decode(weight_spec), QuantSpec.decode(input_spec) if input_spec else None


@torch.library.custom_op("lightning_quant::linear", mutates_args=())
def linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    in_features: int,
    weight_spec: str,
    input_spec: str,
    backend: str = "",
) -> Tensor:
    """`F.linear` with a packed weight; specs are `QuantSpec.encode()` strings, an empty input spec is a float input."""
    specs = _specs(weight_spec, input_spec)
    args = (weight_packed, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, in_features)
    return select("linear", x, *specs, backend)(x, *args, *specs)


@linear.register_fake
def _linear_fake(x: Tensor, weight_packed: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


@torch.library.custom_op("lightning_quant::conv", mutates_args=())
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
    weight_spec: str,
    input_spec: str,
    backend: str = "",
) -> Tensor:
    """A convolution with a packed weight of `weight_shape`, 1- to 3-D, transposed or not."""
    specs = _specs(weight_spec, input_spec)
    weight = (weight_packed, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, weight_shape)
    geometry = (stride, padding, dilation, groups, transposed, output_padding)
    return select("conv", x, *specs, backend)(x, *weight, *geometry, *specs)


@conv.register_fake
def _conv_fake(
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
    weight_spec: str,
    input_spec: str,
    backend: str = "",
) -> Tensor:
    batched = x if x.dim() == len(weight_shape) else x[None]
    weight = x.new_empty(weight_shape)
    out = torch.convolution(batched, weight, None, stride, padding, dilation, transposed, output_padding, groups)
    return out if x.dim() == len(weight_shape) else out[0]


@torch.library.custom_op("lightning_quant::embedding", mutates_args=())
def embedding(
    indices: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    embedding_dim: int,
    weight_spec: str,
) -> Tensor:
    """Rows of a packed table, in float32."""
    spec = QuantSpec.decode(weight_spec)
    args = (weight_packed, weight_scale, weight_zero_point, embedding_dim, spec)
    return select("embedding", indices, spec, None)(indices, *args)


@embedding.register_fake
def _embedding_fake(indices: Tensor, weight_packed: Tensor, weight_scale: Tensor, zero_point: Any, dim: int, spec: str) -> Tensor:
    return indices.new_empty(*indices.shape, dim, dtype=torch.float32)


@torch.library.custom_op("lightning_quant::dequantize", mutates_args=())
def dequantize(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_shape: Sequence[int],
    axis: int,
    weight_spec: str,
    backend: str = "",
) -> Tensor:
    """A packed weight in float32, for modules that hand a whole weight to another operator (LSTM, GRU)."""
    spec = QuantSpec.decode(weight_spec)
    args = (weight_scale, weight_zero_point, weight_shape, axis, spec)
    return select("dequantize", weight_packed, spec, None, backend)(weight_packed, *args).contiguous()


@dequantize.register_fake
def _dequantize_fake(
    weight_packed: Tensor, scale: Tensor, zero_point: Any, weight_shape: Sequence[int], axis: int, spec: str, backend: str = ""
) -> Tensor:
    return scale.new_empty(weight_shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.arguments = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _differentiable(op: Any, kernel: Callable[..., Tensor]) -> None:
    """The gradient by `x` and `bias`, through the straight-through estimator: the reference kernel, differentiated by autograd."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if slot is None else slot[0] for slot in ctx.arguments]
        wanted = [index for index in (0, 4) if ctx.needs_input_grad[index]]
        with torch.enable_grad():
            for index in wanted:
                inputs[index] = inputs[index].detach().requires_grad_()
            *inputs, weight_spec, input_spec, _ = inputs
            out = kernel(*inputs, *_specs(weight_spec, input_spec))
            found = torch.autograd.grad(out, [inputs[index] for index in wanted], grad)
        grads: list[Tensor | None] = [None] * len(ctx.arguments)
        for index, value in zip(wanted, found, strict=True):
            grads[index] = value
        return tuple(grads)

    op.register_autograd(backward, setup_context=_setup_context)


_differentiable(conv, reference.conv)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """A float input is not kept: the gradient of a linear function does not depend on where it is taken."""
    x, packed, scale, zero_point, bias, input_scale, input_zero_point, *rest = inputs
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype
    ctx.save_for_backward(x if rest[2] else None, packed, scale, zero_point, input_scale, input_zero_point)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by `x`, through the straight-through estimator, and `bias`; the weight is dequantized again."""
    x, packed, scale, zero_point, input_scale, input_zero_point = ctx.saved_tensors
    features, weight_spec, input_spec, backend = ctx.rest
    spec, by_input = _specs(weight_spec, input_spec)
    by_x = by_bias = None
    if ctx.needs_input_grad[0]:
        shape = (packed.shape[0], features)
        function = select("dequantize", packed, spec, None, backend)
        if function is triton.dequantize_weight and grad.dtype in triton.DTYPES:
            by_x = triton.grad_input(grad, packed, scale, zero_point, features, spec)
        else:
            by_x = grad @ function(packed, scale, zero_point, shape, 0, spec, grad.dtype)
        if by_input is not None:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                rounded = reference.quantize_input(leaf, input_scale, input_zero_point, by_input)
            (by_x,) = torch.autograd.grad(rounded, leaf, by_x)
    if ctx.needs_input_grad[4]:
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return by_x, None, None, None, by_bias, *[None] * 6


linear.register_autograd(_linear_backward, setup_context=_linear_context)
