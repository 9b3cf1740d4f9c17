"""Integer codes of activations: each token's range, scale, zero point and codes in one launch, or codes of a given grid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.triton.configs import pick
from lightning_quant.kernels.triton.device import narrow, round_even
from lightning_quant.kernels.triton.support import on
from lightning_quant.numerics import MIN_SCALE, code_dtype, dynamic_qparams, max_value, qrange
from lightning_quant.spec import QuantSpec

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def quantize_tokens(
    x, codes, scale, zero, K, stride_m, stride_k,
    DYNAMIC: tl.constexpr, SYMMETRIC: tl.constexpr, SIGNED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BOUND: tl.constexpr, LEAST: tl.constexpr, SHIFT: tl.constexpr, FAKE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; `numerics.dynamic_qparams` and `quantize_rows`, operation by operation. FAKE: values, not codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if DYNAMIC:
        smallest, largest, undefined = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            inside = start + column < K
            values = tl.load(x + row * stride_m + (start + column) * stride_k, mask=inside, other=0.0).to(tl.float32)
            smallest, largest = tl.minimum(smallest, values), tl.maximum(largest, values)
            undefined = undefined | (values != values).to(tl.int32)  # minimum and maximum pass over nan
        low, high = tl.min(smallest, 0), tl.max(largest, 0)
        if SYMMETRIC:
            step = tl.div_rn(tl.maximum(-low, high) if SIGNED else high, BOUND)
            offset = 0.0
        else:
            step = tl.div_rn(high, float(HIGH - LOW)) - tl.div_rn(low, float(HIGH - LOW))
            offset = LOW - round_even(tl.div_rn(low, tl.maximum(step, LEAST)))
            offset = tl.minimum(tl.maximum(offset, float(LOW)), float(HIGH))
            tl.store(zero + row, offset.to(tl.int32))
        step = tl.where((low == 0.0) & (high == 0.0), 1.0, tl.maximum(step, LEAST))
        step = tl.where(tl.max(undefined, 0) > 0, float("nan"), step)
        tl.store(scale + row, step)
    else:
        step, offset = tl.load(scale), tl.load(zero).to(tl.float32)
    inverse = tl.div_rn(1.0, step)
    for start in range(0, K, BLOCK):
        inside = start + column < K
        values = tl.load(x + row * stride_m + (start + column) * stride_k, mask=inside, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(round_even(values * inverse) + offset, float(LOW)), float(HIGH))
        if FAKE:
            result = narrow((code - offset) * step, codes.dtype.element_ty)
        else:
            result = (code.to(tl.int32) - SHIFT).to(codes.dtype.element_ty)
        tl.store(codes + row * K + start + column, result, mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def _launch(
    x: Tensor, out: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: QuantSpec, dynamic: bool, shift: int = 0
) -> None:
    config, (low, high) = pick("quantize"), qrange(spec)
    block = min(config.block_k, triton.next_power_of_2(x.shape[1]))
    with on(x):
        quantize_tokens[x.shape[0],](
            x, out, scale, zero_point, x.shape[1], *x.stride(), DYNAMIC=dynamic, SYMMETRIC=spec.symmetric, SIGNED=spec.signed,
            LOW=low, HIGH=high, BOUND=float(max_value(spec)), LEAST=MIN_SCALE, SHIFT=shift, FAKE=out.is_floating_point(),
            BLOCK=block, **config.options(),
        )  # fmt: skip


def quantize_input(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: QuantSpec, shifted: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of an input, and its scale and zero point: what `numerics.quantize` and `numerics.dynamic_qparams` give on a CPU.

    Scales are divided as IEEE has it; torch on CUDA multiplies by a reciprocal, and may be one unit in the last place off.

    Args:
        x: `[rows, columns]`, with any strides.
        scale, zero_point: of one element, for static specs.
        spec: integers; static or dynamic, per tensor or token.
        shifted: unsigned codes, and their zero points, are lowered by 128, so that int8 holds them.

    Returns:
        codes `[rows, columns]` of int8 or `code_dtype(spec)`; float32 scale and int32 zero point, one for all or `[rows]` each.
    """
    count, columns = x.shape
    per_token = spec.granularity == "token"
    if per_token:
        scale = torch.ones(count, dtype=torch.float32, device=x.device)
        zero_point = torch.zeros(count, dtype=torch.int32, device=x.device)
    elif spec.dynamic:
        scale, zero_point = dynamic_qparams(x, spec)
    if scale is None or zero_point is None:
        raise ValueError("a static input spec needs its scale and zero point")
    shift = 128 if shifted and not spec.signed else 0
    codes = torch.empty(count, columns, dtype=torch.int8 if shift else code_dtype(spec), device=x.device)
    if codes.numel():
        _launch(x, codes, scale, zero_point, spec, per_token, shift)
    return codes, scale, zero_point - shift if shift else zero_point


# --- autograd ---------------------------------------------------------------------------------------------------------


class TokenFakeQuantize(torch.autograd.Function):
    """Quantize and dequantize with each token's own range: `[tokens, features]`. The gradient is 1, as nothing lies outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: QuantSpec) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        ranges = x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.int32)
        if x.numel():
            _launch(x, out, *ranges, spec, dynamic=True)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
