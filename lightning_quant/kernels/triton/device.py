"""What the kernels share on the device: packed codes to numbers, rounding, and the sum of partial results."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels.triton.configs import pick
from lightning_quant.kernels.triton.support import on
from lightning_quant.packing import stored_values

# the interpreter multiplies bfloat16's bits as integers, and truncates where a device rounds
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NF4 = tl.constexpr(stored_values("nf4"))
FP4 = tl.constexpr(stored_values("fp4"))


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 to a dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def round_even(values):
    """To the nearest integer, ties to even; magnitudes end at 2^22, nan is some integer."""
    # 1.5 * 2^23: the spacing of float32 is 1 there
    return (tl.minimum(tl.maximum(values, -4194304.0), 4194304.0) + 12582912.0) - 12582912.0


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """A matrix product of floats, added to float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def look_up(codes, T: tl.constexpr):
    """The value of each 4-bit code: a tree of 15 selections, in registers."""
    bit = (codes & 1) != 0
    v0, v1 = tl.where(bit, T[1], T[0]), tl.where(bit, T[3], T[2])
    v2, v3 = tl.where(bit, T[5], T[4]), tl.where(bit, T[7], T[6])
    v4, v5 = tl.where(bit, T[9], T[8]), tl.where(bit, T[11], T[10])
    v6, v7 = tl.where(bit, T[13], T[12]), tl.where(bit, T[15], T[14])
    bit = (codes & 2) != 0
    v0, v1, v2, v3 = tl.where(bit, v1, v0), tl.where(bit, v3, v2), tl.where(bit, v5, v4), tl.where(bit, v7, v6)
    bit = (codes & 4) != 0
    v0, v1 = tl.where(bit, v1, v0), tl.where(bit, v3, v2)
    return tl.where((codes & 8) != 0, v1, v0)


@triton.jit
def read_float8(codes, KIND: tl.constexpr):
    """float8 bytes to float32 by way of float16's bits, which needs no instruction that only newer devices have."""
    if KIND == "float8_e5m2":
        values = (codes << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # the exponent's bias is 7, not 15: 2^8 between them
        half = (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        values = tl.where((codes & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return values


@triton.jit
def load_codes(
    words, rows, start, n_rows, row_words,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Unsigned codes `[BLOCK_N, BLOCK_K]` of some rows from column `start` on; 0 beyond the ends."""
    base = words + rows.to(tl.int64)[:, None] * row_words
    inside = (rows < n_rows)[:, None]
    if 32 % BITS == 0:
        PER: tl.constexpr = 32 // BITS
        word = (start // PER + tl.arange(0, BLOCK_K // PER))[None, :]
        packed = tl.load(base + word, mask=inside & (word < row_words), other=0).to(tl.uint32, bitcast=True)
        position = tl.arange(0, PER)
        if KIND == "nf4" or KIND == "fp4":  # the first of two is in a byte's high half
            position = position ^ 1
        codes = packed[:, :, None] >> (position * BITS).to(tl.uint32)[None, None, :]
    else:
        # 32 codes fill exactly BITS words
        runs = start // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
        position = (tl.arange(0, 32) * BITS)[None, None, :]
        low = tl.zeros((BLOCK_N, BLOCK_K // 32, 32), tl.uint32)
        high = low
        for index in tl.static_range(BITS):
            word = runs * BITS + index
            packed = tl.load(base + word, mask=inside & (word < row_words), other=0).to(tl.uint32, bitcast=True)[:, :, None]
            low = tl.where(position // 32 == index, packed, low)
            high = tl.where(position // 32 == index - 1, packed, high)
        shift = (position % 32).to(tl.uint32)
        codes = low >> shift
        codes = tl.where(position % 32 + BITS > 32, codes | (high << ((32 - shift) & 31)), codes)
    return tl.reshape(codes & ((1 << BITS) - 1), (BLOCK_N, BLOCK_K))


@triton.jit
def load_zero(zero, rows, group, groups, mask, OFFSET: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr):
    """What to subtract from unsigned codes: zero points are packed along the channels, with the codes' own offset."""
    if ZERO == 2:
        value = tl.load(zero) + OFFSET
    else:
        position = rows * BITS
        index = (position // 32).to(tl.int64) * groups + group
        shift = (position % 32).to(tl.uint32)
        bits = tl.load(zero + index, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
        if 32 % BITS != 0:
            high = tl.load(zero + index + groups, mask=mask & (position % 32 + BITS > 32), other=0).to(tl.uint32, bitcast=True)
            bits = bits | (high << ((32 - shift) & 31))
        value = (bits & ((1 << BITS) - 1)).to(tl.int32)
    return value


@triton.jit
def group_index(rows, start, n_rows, columns, groups, GROUP: tl.constexpr, FLAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows, group, index of the scale, and what is inside: `[BLOCK_N, BLOCK_K]`, or `[BLOCK_N, 1]` if a tile has one group."""
    rows = rows[:, None]
    if GROUP <= 0 or (GROUP % BLOCK_K == 0 and not FLAT):
        group = (start // GROUP if GROUP > 0 else 0) + tl.zeros((1, 1), tl.int32)
        inside = rows < n_rows
    else:
        column = (start + tl.arange(0, BLOCK_K))[None, :]
        group = column // GROUP
        inside = (rows < n_rows) & (column < columns)
    if FLAT:
        index = (rows.to(tl.int64) * columns + (start + tl.arange(0, BLOCK_K))[None, :]) // GROUP
    else:
        index = rows.to(tl.int64) * groups + group
    return rows, group, index, inside


@triton.jit
def load_weight(
    words, scale, zero, rows, start, n_rows, columns, row_words, groups,
    KIND: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 values `[BLOCK_N, BLOCK_K]` of packed rows; times their scales if SCALED, else as the scale finds them."""
    codes = load_codes(words, rows, start, n_rows, row_words, KIND, BITS, BLOCK_N, BLOCK_K)
    row, group, index, inside = group_index(rows, start, n_rows, columns, groups, GROUP, FLAT, BLOCK_K)
    if KIND == "nf4":
        values = look_up(codes, NF4)
    elif KIND == "fp4":
        values = look_up(codes, FP4)
    elif KIND != "int":
        values = read_float8(codes, KIND)
    else:
        # 2^23 and a code in its low bits are a float32: a conversion takes four times as long on an A100
        shifted = (codes | 0x4B000000).to(tl.float32, bitcast=True)
        if ZERO == 0:
            values = shifted - (8388608.0 + OFFSET)
        else:
            values = shifted - (load_zero(zero, row, group, groups, inside, OFFSET, ZERO, BITS) + 8388608).to(tl.float32)
    if SCALED:
        if GROUP == 0:
            values = values * tl.load(scale)
        else:
            values = values * tl.load(scale + index, mask=inside, other=0.0)
    return values


@triton.jit
def reduce_partial(
    partial, row_scale, column_scale, bias, out, M, N, SPLIT,
    COLUMN: tl.constexpr, ROW: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum over splits `* row_scale[m] * column_scale[n] + bias[n]`; COLUMN, ROW: 0 none, 1 one for all, 2 one each."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    total = tl.zeros((BLOCK,), tl.float32)
    offset = m.to(tl.int64) * N + n
    source = partial + offset
    for _ in range(SPLIT):
        total += tl.load(source, mask=inside, other=0.0)
        source += M * N
    if COLUMN == 1:
        total = total * tl.load(column_scale)
    if COLUMN == 2:
        total = total * tl.load(column_scale + n, mask=inside, other=0.0)
    if ROW == 1:
        total = total * tl.load(row_scale)
    if ROW == 2:
        total = total * tl.load(row_scale + m)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, narrow(total, out.dtype.element_ty), mask=inside)


def reduce_splits(
    partial: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Add partial results in the order of the splits, so that a call gives the same bits every time.

    Args:
        partial: float32 `[splits, M, N]`.
        row_scale, column_scale: float32, of one element or `M`, `N`; None: 1.
        bias: `[N]` or None.
        out: `[M, N]`, contiguous; filled and returned.
    """
    splits, rows, columns = partial.shape
    config = pick("reduce")
    kinds = [0 if value is None else 1 if value.numel() == 1 else 2 for value in (column_scale, row_scale)]
    grid = (rows, triton.cdiv(columns, config.block_k))
    with on(out):
        reduce_partial[grid](
            partial, row_scale, column_scale, bias, out, rows, columns, splits, *kinds, bias is not None, config.block_k,
            **config.options(),
        )  # fmt: skip
    return out
