"""Weight-only products: float inputs, packed weights that are decoded in registers. Nothing is repacked or kept twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.triton.configs import FUSED_ROWS, Config, pick
from lightning_quant.kernels.triton.device import dot, load_weight, narrow, reduce_splits
from lightning_quant.kernels.triton.support import group_count, on, tile_group, weight_meta
from lightning_quant.packing import packed_words
from lightning_quant.spec import QuantSpec

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _product(
    x, words, scale, zero, rows_m, rows_n, first, last, M, N, K, stride_m, stride_k, row_words, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`weight @ x^T` over the features [first, last): float32 `[BLOCK_N, BLOCK_M]`. The weight is the operand in registers."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(first, last, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (column < K)[:, None] & (rows_m < M)[None, :]
        inputs = tl.load(x + rows_m.to(tl.int64)[None, :] * stride_m + column[:, None] * stride_k, mask=inside, other=0.0)
        weight = load_weight(
            words, scale, zero, rows_n, start, N, K, row_words, groups,
            KIND, BITS, OFFSET, ZERO, GROUP, FLAT, GROUP > 0, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = dot(narrow(weight, inputs.dtype), inputs, acc, PRECISION)
    return acc


@triton.jit
def tiled(
    x, words, scale, zero, bias, out, M, N, K, stride_m, stride_k, row_words, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out[M, N] = x[M, K] @ weight[N, K]^T + bias`: one tile of the output a program."""
    # neighbours in the order of programs share a tile of the weight, which stays in the cache
    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _product(
        x, words, scale, zero, rows_m, rows_n, 0, K, M, N, K, stride_m, stride_k, row_words, groups,
        KIND, BITS, OFFSET, ZERO, GROUP, FLAT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if GROUP == 0:
        acc = acc * tl.load(scale)
    if GROUP == -1:
        acc = acc * tl.load(scale + rows_n, mask=rows_n < N, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    inside = (rows_n < N)[:, None] & (rows_m < M)[None, :]
    tl.store(out + rows_m.to(tl.int64)[None, :] * N + rows_n[:, None], narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def split(
    x, words, scale, zero, partial, M, N, K, per_split, stride_m, stride_k, row_words, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of the features of up to BLOCK_M rows: partial sums `[splits, M, N]`, added by `reduce_splits`."""
    rows_m = tl.arange(0, BLOCK_M)
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, K)
    acc = _product(
        x, words, scale, zero, rows_m, rows_n, first, last, M, N, K, stride_m, stride_k, row_words, groups,
        KIND, BITS, OFFSET, ZERO, GROUP, FLAT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (rows_n < N)[:, None] & (rows_m < M)[None, :]
    row = (tl.program_id(1) * M + rows_m).to(tl.int64)
    tl.store(partial + row[None, :] * N + rows_n[:, None], acc, mask=inside)


@triton.jit
def by_input(
    grad, words, scale, zero, out, M, N, K, stride_m, stride_n, row_words, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out[M, K] = grad[M, N] @ weight[N, K]`: scales vary along the sum, so they are in the weight's values."""
    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_K
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for channel in range(0, N, BLOCK_N):
        rows_n = channel + tl.arange(0, BLOCK_N)
        inside = (rows_n < N)[:, None] & (rows_m < M)[None, :]
        part = tl.load(grad + rows_m.to(tl.int64)[None, :] * stride_m + rows_n[:, None] * stride_n, mask=inside, other=0.0)
        weight = load_weight(
            words, scale, zero, rows_n, start, N, K, row_words, groups,
            KIND, BITS, OFFSET, ZERO, GROUP, FLAT, True, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = dot(tl.trans(narrow(weight, part.dtype)), part, acc, PRECISION)
    column = start + tl.arange(0, BLOCK_K)
    inside = (column < K)[:, None] & (rows_m < M)[None, :]
    tl.store(out + rows_m.to(tl.int64)[None, :] * K + column[:, None], narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def decode(
    words, scale, zero, out, N, K, row_words, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weight itself: `[N, K]`."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    values = load_weight(
        words, scale, zero, rows, start, N, K, row_words, groups,
        KIND, BITS, OFFSET, ZERO, GROUP, FLAT, True, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    column = start + tl.arange(0, BLOCK_K)
    inside = (rows < N)[:, None] & (column < K)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * K + column[None, :], narrow(values, out.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as `torch.set_float32_matmul_precision` says; other dtypes have one way."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def _pick(kernel: str, dtype: torch.dtype, rows: int, columns: int, spec: QuantSpec) -> Config:
    return pick(f"{kernel}-fp32" if dtype == torch.float32 else kernel, rows, columns, tile_group(spec, columns))


def linear_forward(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, columns: int, spec: QuantSpec
) -> Tensor:
    """`x @ weight^T + bias`, in `x`'s dtype and summed in float32.

    Args:
        x: `[..., columns]` of float32, bfloat16 or float16, with any strides.
        packed, scale, zero_point: int32 `[N, words]` and its qparams, as the operators take them.
        bias: `[N]` or None.
        columns: input features.
        spec: of the weight.
    """
    rows, channels = x.reshape(-1, columns), packed.shape[0]
    count = rows.shape[0]
    if count > FUSED_ROWS:
        weight = dequantize_weight(packed, scale, zero_point, (channels, columns), 0, spec, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    out = x.new_empty(count, channels)
    if not out.numel():
        return out.reshape(*x.shape[:-1], channels)
    config = _pick("weights", x.dtype, count, columns, spec)
    meta = {**weight_meta(spec, scale, zero_point, columns), "PRECISION": precision(x.dtype)}
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, **config.options()}
    sizes = (count, channels, columns)
    strides = (*rows.stride(), packed_words(columns, spec.bits), group_count(spec, columns))
    cells = triton.cdiv(channels, config.block_n)
    packed, scale = packed.contiguous(), scale.contiguous()
    with on(x):
        if config.split_k == 1:
            grid = (triton.cdiv(count, config.block_m), cells)
            tiled[grid](rows, packed, scale, zero_point, bias, out, *sizes, *strides, BIAS=bias is not None, **meta, **blocks)
        else:
            per_split = triton.cdiv(triton.cdiv(columns, config.block_k), config.split_k) * config.block_k
            splits = triton.cdiv(columns, per_split)
            partial = x.new_empty(splits, count, channels, dtype=torch.float32)
            split[cells, splits](rows, packed, scale, zero_point, partial, *sizes, per_split, *strides, **meta, **blocks)
            reduce_splits(partial, None, None if meta["GROUP"] > 0 else scale, bias, out)
    return out.reshape(*x.shape[:-1], channels)


def grad_input(grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, spec: QuantSpec) -> Tensor:
    """`grad @ weight`: `[..., N]` -> `[..., columns]`, the gradient of `linear_forward` by its input."""
    channels = packed.shape[0]
    rows = grad.reshape(-1, channels)
    if rows.shape[0] > FUSED_ROWS:
        return grad @ dequantize_weight(packed, scale, zero_point, (channels, columns), 0, spec, grad.dtype)
    out = grad.new_empty(rows.shape[0], columns)
    if out.numel():
        config = _pick("grad", grad.dtype, rows.shape[0], columns, spec)
        grid = (triton.cdiv(rows.shape[0], config.block_m), triton.cdiv(columns, config.block_k))
        strides = (*rows.stride(), packed_words(columns, spec.bits), group_count(spec, columns))
        with on(grad):
            by_input[grid](
                rows, packed.contiguous(), scale.contiguous(), zero_point, out, rows.shape[0], channels, columns, *strides,
                **weight_meta(spec, scale, zero_point, columns), PRECISION=precision(grad.dtype),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **config.options(),
            )  # fmt: skip
    return out.reshape(*grad.shape[:-1], columns)


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
    moved = [shape[axis], *(size for dim, size in enumerate(shape) if dim != axis)]
    columns = math.prod(moved[1:])
    out = torch.empty(moved[0], columns, dtype=dtype, device=packed.device)
    if out.numel():
        config = pick("dequantize", group=tile_group(spec, columns))
        grid = (triton.cdiv(moved[0], config.block_m), triton.cdiv(columns, config.block_k))
        strides = (packed_words(columns, spec.bits), group_count(spec, columns))
        with on(packed):
            decode[grid](
                packed.contiguous(), scale.contiguous(), zero_point, out, moved[0], columns, *strides,
                **weight_meta(spec, scale, zero_point, columns), BLOCK_N=config.block_m, BLOCK_K=config.block_k, **config.options(),
            )  # fmt: skip
    return out.reshape(moved).movedim(0, axis)


# --- autograd ---------------------------------------------------------------------------------------------------------


class WeightOnlyLinear(torch.autograd.Function):
    """`linear_forward`, differentiable by the input and the bias; the input itself is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        columns: int,
        spec: QuantSpec,
    ) -> Tensor:
        ctx.save_for_backward(packed, scale, zero_point)
        ctx.columns, ctx.spec, ctx.bias_dtype = columns, spec, None if bias is None else bias.dtype
        return linear_forward(x, packed, scale, zero_point, bias, columns, spec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, by_x, by_bias = grads[0], None, None
        if ctx.needs_input_grad[0]:
            packed, scale, zero_point = ctx.saved_tensors
            by_x = grad_input(grad, packed, scale, zero_point, ctx.columns, ctx.spec)
        if ctx.needs_input_grad[4]:
            by_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return by_x, None, None, None, by_bias, None, None
