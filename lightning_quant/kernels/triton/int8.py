"""Products of integers: int8 inputs times packed integer weights, summed in int32, scaled once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.triton.configs import pick
from lightning_quant.kernels.triton.device import group_index, load_codes, load_zero, narrow, reduce_splits
from lightning_quant.kernels.triton.fake_quant import ste_backward
from lightning_quant.kernels.triton.quantize import quantize_input
from lightning_quant.kernels.triton.support import group_count, on, tile_group, weight_meta
from lightning_quant.kernels.triton.weights import grad_input
from lightning_quant.packing import packed_words
from lightning_quant.spec import QuantSpec

# (255 * 128) * 2^16 is below 2^31
LONGEST = 1 << 16

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def int8_product(
    codes, words, zero, scale, x_scale, x_zero, bias, out, M, N, K, per_split, row_words, groups,
    BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, X_ZERO: tl.constexpr, PER_ROW: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`sum((code - x_zero) * (weight code - zero))` in int32, by groups in float32; or a part of it, `[splits, M, N]`."""
    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows_m < M, rows_n < N
    first = tl.program_id(2) * per_split
    # 8 bits with a zero point, or without a sign, need more than int8: codes less 128, and the rest afterwards
    WIDE: tl.constexpr = BITS == 8 and (ZERO != 0 or OFFSET == 0)
    offset_x = tl.zeros((BLOCK_M,), tl.int32)
    if X_ZERO:
        offset_x += tl.load(x_zero + rows_m, mask=in_m, other=0) if PER_ROW else tl.load(x_zero)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP > 0 else tl.int32)
    for start in range(first, tl.minimum(first + per_split, K), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (column < K)[:, None] & in_m[None, :]
        inputs = tl.load(codes + rows_m.to(tl.int64)[None, :] * K + column[:, None], mask=inside, other=0)
        raw = load_codes(words, rows_n, start, N, row_words, "int", BITS, BLOCK_N, BLOCK_K).to(tl.int32)
        row, group, index, valid = group_index(rows_n, start, N, K, groups, GROUP, False, BLOCK_K)
        if ZERO == 0:
            shift = tl.full((1, 1), OFFSET, tl.int32)
        else:
            shift = load_zero(zero, row, group, groups, valid, OFFSET, ZERO, BITS)
        weight = tl.where((column < K)[None, :], raw - (128 if WIDE else shift), 0).to(tl.int8)
        if GROUP > 0:
            part = tl.dot(weight, inputs, out_dtype=tl.int32)
        else:
            part = tl.dot(weight, inputs, acc, out_dtype=tl.int32)
        if X_ZERO:
            part -= tl.sum(weight.to(tl.int32), 1)[:, None] * offset_x[None, :]
        if WIDE:
            count = tl.minimum(K - start, BLOCK_K)
            part -= (shift - 128) * (tl.sum(inputs.to(tl.int32), 0) - offset_x * count)[None, :]
        if GROUP > 0:
            acc += part.to(tl.float32) * tl.load(scale + index, mask=valid, other=0.0)
        else:
            acc = part
    value = acc.to(tl.float32)
    inside = in_n[:, None] & in_m[None, :]
    if SPLIT:
        place = (tl.program_id(2) * M + rows_m).to(tl.int64)[None, :] * N + rows_n[:, None]
        tl.store(out + place, value, mask=inside)
    else:
        if GROUP == 0:
            value = value * tl.load(scale)
        if GROUP == -1:
            value = value * tl.load(scale + rows_n, mask=in_n, other=0.0)[:, None]
        value = value * (tl.load(x_scale + rows_m, mask=in_m, other=0.0)[None, :] if PER_ROW else tl.load(x_scale))
        if BIAS:
            value += tl.load(bias + rows_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        tl.store(out + rows_m.to(tl.int64)[None, :] * N + rows_n[:, None], narrow(value, out.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def supports_int8(weight_spec: QuantSpec, input_spec: QuantSpec | None, columns: int) -> bool:
    """Whether a product of integers is meant, in groups that tiles fit in, and short enough for int32.

    Example:
        >>> supports_int8(QuantSpec(4, granularity="group", group_size=64), QuantSpec(8, granularity="token", dynamic=True), 4096)
        True
    """
    ints = weight_spec.is_int and input_spec is not None and input_spec.is_int
    return ints and tile_group(weight_spec, columns) % 32 == 0 and columns <= LONGEST


def int8_forward(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> Tensor:
    """A product of codes: `[M, K]` -> `[M, N]`.

    Args:
        codes: int8 `[M, K]`, contiguous.
        x_scale, x_zero: float32 and int32, of one element or `[M]`; a zero point of None is 0.
        packed, scale, zero_point: int32 `[N, words]` and its qparams, as the operators take them.
        bias: `[N]` or None.
        spec: of the weight.
        dtype: of the output.
    """
    (count, columns), channels = codes.shape, packed.shape[0]
    out = torch.empty(count, channels, dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    config = pick("int8", count, columns, tile_group(spec, columns))
    per_split = triton.cdiv(triton.cdiv(columns, config.block_k), config.split_k) * config.block_k
    splits = triton.cdiv(columns, per_split)
    target = out if splits == 1 else torch.empty(splits, count, channels, dtype=torch.float32, device=codes.device)
    meta = weight_meta(spec, scale, zero_point, columns)
    grid = (triton.cdiv(count, config.block_m), triton.cdiv(channels, config.block_n), splits)
    packed, scale = packed.contiguous(), scale.contiguous()
    with on(codes):
        int8_product[grid](
            codes, packed, zero_point, scale, x_scale, x_zero, bias, target, count, channels, columns, per_split,
            packed_words(columns, spec.bits), group_count(spec, columns),
            BITS=spec.bits, OFFSET=meta["OFFSET"], ZERO=meta["ZERO"], GROUP=meta["GROUP"], X_ZERO=x_zero is not None,
            PER_ROW=x_scale.numel() > 1, SPLIT=splits > 1, BIAS=bias is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **config.options(),
        )  # fmt: skip
        if splits > 1:
            reduce_splits(target, x_scale, None if meta["GROUP"] > 0 else scale, bias, out)
    return out


# --- autograd ---------------------------------------------------------------------------------------------------------


class Int8Linear(torch.autograd.Function):
    """Quantize the input, multiply integers; the gradients by input (straight-through) and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        x_scale: Tensor | None,
        x_zero: Tensor | None,
        columns: int,
        weight_spec: QuantSpec,
        input_spec: QuantSpec,
    ) -> Tensor:
        # nothing lies outside a dynamic range
        ctx.save_for_backward(None if input_spec.dynamic else x, packed, scale, zero_point, x_scale, x_zero)
        ctx.columns, ctx.specs, ctx.bias_dtype = columns, (weight_spec, input_spec), None if bias is None else bias.dtype
        codes, step, offset = quantize_input(x.reshape(-1, columns), x_scale, x_zero, input_spec, shifted=True)
        plain = input_spec.symmetric and input_spec.signed
        out = int8_forward(codes, step, None if plain else offset, packed, scale, zero_point, bias, weight_spec, x.dtype)
        return out.reshape(*x.shape[:-1], packed.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, scale, zero_point, x_scale, x_zero = ctx.saved_tensors
        weight_spec, input_spec = ctx.specs
        grad, by_x, by_bias = grads[0], None, None
        if ctx.needs_input_grad[0]:
            by_x = grad_input(grad, packed, scale, zero_point, ctx.columns, weight_spec)
            if x is not None:
                by_x = ste_backward(by_x, x, x_scale, x_zero, input_spec)
        if ctx.needs_input_grad[4]:
            by_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return by_x, None, None, None, by_bias, *[None] * 5
