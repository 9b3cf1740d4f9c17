"""The operators `lightning_quant::linear`, `conv`, `embedding` and `dequantize`, and the table of backends behind them.

The operators are what torch.compile and torch.export trace. A backend is one entry of `KERNELS`; the first that supports a
call runs it. A module may name another one (its `backend`), and the environment variable `LQ_BACKEND` names one to use instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_quant.kernels import bitsandbytes, cpu, inductor, onednn, reference, triton
from lightning_quant.spec import QuantSpec


@dataclass(frozen=True)
class Kernel:
    """A backend: operator name -> function with the signature of `reference`, and what it can run.

    Args:
        ops: its functions by operator name.
        refuses: `(op, x, weight_spec, input_spec) -> why it does not run such a call`, in a few words; empty if it does. Of `x`
            only the device and the dtype count.
        describe: `(op, x, weight_spec, input_spec) -> (how it computes, a warning or "")`, for `explain`.
        bind: `(weight_spec, input_spec) -> linear without its specs`, where that saves work on every call.
    """

    ops: dict[str, Callable[..., Tensor]]
    refuses: Callable[[str, Tensor, QuantSpec, QuantSpec | None], str]
    describe: Callable[[str, Tensor, QuantSpec, QuantSpec | None], tuple[str, str]]
    bind: Callable[[QuantSpec, QuantSpec | None], Callable[..., Tensor]] | None = None


def _module(module: Any, *names: str) -> dict[str, Callable[..., Tensor]]:
    found = {name: getattr(module, "dequantize_weight" if name == "dequantize" else name) for name in names}
    return found


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(_module(cpu, "linear", "conv", "embedding", "dequantize"), cpu.refuses, cpu.describe, cpu.bind),
    "bitsandbytes": Kernel(_module(bitsandbytes, "linear", "dequantize"), bitsandbytes.refuses, bitsandbytes.describe),
    "triton": Kernel(_module(triton, "linear", "dequantize"), triton.refuses, triton.describe),
    "onednn": Kernel(_module(onednn, "linear", "conv"), onednn.refuses, onednn.describe),
    "reference": Kernel(_module(reference, "linear", "conv", "embedding", "dequantize"), lambda *call: "", reference.describe),
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
    return KERNELS[choose(op, x, weight_spec, input_spec, backend)[0]].ops[op]


def choose(
    op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None, backend: str = ""
) -> tuple[str, dict[str, str]]:
    """The backend that runs a call, and why those before it do not: its key in `KERNELS`, and theirs with their reasons."""

    def why_not(name: str) -> str:
        kernel = KERNELS[name]
        return kernel.refuses(op, x, weight_spec, input_spec) if op in kernel.ops else f"has no {op}"

    forced = os.environ.get("LQ_BACKEND")
    if forced:
        if forced not in KERNELS:
            raise ValueError(f"LQ_BACKEND={forced!r}: no such backend; valid: {', '.join(KERNELS)}")
        reason = why_not(forced)
        if reason:
            specs = f"weight {weight_spec.label}, input {input_spec.label if input_spec else 'float'}"
            raise ValueError(
                f"LQ_BACKEND={forced!r} cannot run {op} with {specs} on {x.device} ({reason}); unset it, or use 'reference'"
            )
        return forced, {}
    if backend in KERNELS and not why_not(backend):
        return backend, {}
    reasons: dict[str, str] = {}
    for name in KERNELS:
        reason = "another package's, and this module asks for native kernels" if backend == "native" and name in FOREIGN else ""
        reason = reason or why_not(name)
        if not reason:
            return name, reasons
        reasons[name] = reason
    raise AssertionError("the reference runs every call")


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
    inductor.register(torch.ops.lightning_quant.linear.default, run_linear)
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
    """The gradient by `x`, the weight's scale and `bias`, through the straight-through estimator: the reference kernel's."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if slot is None else slot[0] for slot in ctx.arguments]
        wanted = [index for index in (0, 2, 4) if ctx.needs_input_grad[index]]
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
    """A float input is not kept for its own gradient, which does not depend on where it is taken."""
    x, packed, scale, zero_point, bias, input_scale, input_zero_point, *rest = inputs
    ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype
    ctx.save_for_backward(x if rest[2] or scale.requires_grad else None, packed, scale, zero_point, input_scale, input_zero_point)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by `x`, through the straight-through estimator, the scale and `bias`; the weight is dequantized again."""
    x, packed, scale, zero_point, input_scale, input_zero_point = ctx.saved_tensors
    features, weight_spec, input_spec, backend = ctx.rest
    spec, by_input = _specs(weight_spec, input_spec)
    by_x = by_scale = by_bias = None
    if ctx.needs_input_grad[0]:
        shape = (packed.shape[0], features)
        function = select("dequantize", packed, spec, None, backend)
        if function is triton.dequantize_weight and grad.dtype in triton.DTYPES:
            by_x = triton.grad_input(grad, packed, scale, zero_point, features, spec)
        elif type(packed) in (Tensor, Parameter) and not torch.compiler.is_compiling():
            by_x = grad @ function(packed, scale, zero_point, shape, 0, spec, grad.dtype)
        else:  # while it is traced
            by_x = grad @ dequantize(packed, scale, zero_point, shape, 0, weight_spec, backend).to(grad.dtype)
        if by_input is not None:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                rounded = reference.quantize_input(leaf, input_scale, input_zero_point, by_input)
            (by_x,) = torch.autograd.grad(rounded, leaf, by_x)
    if ctx.needs_input_grad[4]:
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if ctx.needs_input_grad[2]:
        shape = (packed.shape[0], features)
        rounded = reference.quantize_input(x, input_scale, input_zero_point, by_input).reshape(-1, features)
        by_weight = (grad.reshape(-1, grad.shape[-1]).t() @ rounded.to(grad.dtype)).float()
        with torch.enable_grad():
            leaf = scale.detach().requires_grad_()
            weight = reference.dequantize_weight(packed, leaf, zero_point, shape, 0, spec)
        (by_scale,) = torch.autograd.grad(weight, leaf, by_weight)
    return by_x, None, by_scale, None, by_bias, *[None] * 6


linear.register_autograd(_linear_backward, setup_context=_linear_context)


@lru_cache(maxsize=4096)
def _bound(
    op: str, kind: str, dtype: torch.dtype, weight_spec: str, input_spec: str, backend: str, forced: str
) -> Callable[..., Tensor]:
    """What runs an operator for inputs of a kind of device, without its specs."""
    specs = _specs(weight_spec, input_spec)
    name, _ = choose(op, torch.empty(0, dtype=dtype, device=kind), *specs, backend)
    kernel = KERNELS[name]
    if op == "linear" and kernel.bind is not None:
        return kernel.bind(*specs)
    function = kernel.ops[op]
    return lambda *args: function(*args, *specs)


def _is_plain(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody traces, differentiates or wraps a call, so that it need not be an operator's."""
    if type(x) is not Tensor or type(weight) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def run_linear(
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
    """The operator `linear`; called past torch's dispatcher, which takes longer than a small product, where that is the same."""
    args = (x, weight_packed, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, in_features)
    if _is_plain(x, weight_packed, weight_scale, bias):
        forced = os.environ.get("LQ_BACKEND", "")
        return _bound("linear", x.device.type, x.dtype, weight_spec, input_spec, backend, forced)(*args)
    return linear(*args, weight_spec, input_spec, backend)


def run_conv(x: Tensor, weight_packed: Tensor, *args: Any) -> Tensor:
    """The operator `conv`, in the same way."""
    *given, weight_spec, input_spec, backend = args
    if _is_plain(x, weight_packed, given[0], given[2]):
        forced = os.environ.get("LQ_BACKEND", "")
        return _bound("conv", x.device.type, x.dtype, weight_spec, input_spec, backend, forced)(x, weight_packed, *given)
    return conv(x, weight_packed, *args)
