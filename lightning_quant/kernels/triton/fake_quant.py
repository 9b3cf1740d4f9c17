"""Fused fake quantization of integer grids: one pass forward, one backward, for STE and LSQ, at any granularity."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.kernels import kept
from lightning_quant.kernels.triton.configs import pick
from lightning_quant.kernels.triton.device import narrow, round_even
from lightning_quant.kernels.triton.support import on
from lightning_quant.numerics import qrange
from lightning_quant.spec import QuantSpec

# A tensor is `rows` of `columns`; each row is cut into `groups` of `size` elements, the last one may be shorter, and each group has
# a scale. A program takes a chunk of BLOCK_E elements of BLOCK_S groups.

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(scales, columns, groups, size, chunks, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """The groups of a program, which exist, places and existence of their elements `[BLOCK_S, BLOCK_E]`, places of partial sums."""
    # one dimension of programs: the others end at 65535
    chunk = tl.program_id(0) % chunks
    index = tl.program_id(0) // chunks * BLOCK_S + tl.arange(0, BLOCK_S)
    group = index % groups
    element = chunk.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    start = (group * size).to(tl.int64)
    place = ((index // groups).to(tl.int64) * columns + start)[:, None] + element[None, :]
    left = tl.minimum(columns - start, size)
    inside = (index < scales)[:, None] & (element[None, :] < left[:, None])
    return index, index < scales, place, inside, index * chunks + chunk


@triton.jit
def fake_quantize_forward(
    x, scale, zero, out, scales, columns, groups, size, chunks,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`(clamp(round(x / scale) + zero) - zero) * scale`."""
    index, exists, place, inside, _ = _place(scales, columns, groups, size, chunks, BLOCK_S, BLOCK_E)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(scale + index, mask=exists, other=1.0)[:, None]
    offset = tl.load(zero + index, mask=exists, other=0).to(tl.float32)[:, None]
    offset = tl.minimum(tl.maximum(round_even(offset), float(LOW)), float(HIGH))
    code = tl.minimum(tl.maximum(round_even(values * tl.div_rn(1.0, step)) + offset, float(LOW)), float(HIGH))
    result = tl.where(values == values, (code - offset) * step, values)
    tl.store(out + place, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_backward(
    grad, x, scale, zero, by_x, by_scale, by_zero, scales, columns, groups, size, chunks, factor,
    LOW: tl.constexpr, HIGH: tl.constexpr, BY_X: tl.constexpr, BY_SCALE: tl.constexpr, BY_ZERO: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient by `x` (1 inside the range), and each chunk's part of those by scale and zero point, `[scales, chunks]`."""
    index, exists, place, inside, partial = _place(scales, columns, groups, size, chunks, BLOCK_S, BLOCK_E)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(scale + index, mask=exists, other=1.0)[:, None]
    offset = tl.load(zero + index, mask=exists, other=0).to(tl.float32)[:, None]
    offset = tl.minimum(tl.maximum(round_even(offset), float(LOW)), float(HIGH))
    ratio = values * tl.div_rn(1.0, step)
    level = round_even(ratio) + offset
    within = (level >= LOW) & (level <= HIGH)
    if BY_X:
        tl.store(by_x + place, narrow(tl.where(within, slope, 0.0), by_x.dtype.element_ty), mask=inside)
    if BY_SCALE:
        code = tl.minimum(tl.maximum(level, float(LOW)), float(HIGH)) - offset
        rise = tl.where(within | (values != values), code - ratio, code)
        tl.store(by_scale + partial, tl.sum(tl.where(inside, slope * rise, 0.0), 1) * factor, mask=exists)
    if BY_ZERO:
        tl.store(by_zero + partial, tl.sum(tl.where(inside & ~within, -slope * step, 0.0), 1) * factor, mask=exists)


# --- launchers --------------------------------------------------------------------------------------------------------


class _Layout:
    """How a tensor lies before the kernels: rows of columns, in `groups` of `size`, and the tiles that programs take."""

    def __init__(self, x: Tensor, spec: QuantSpec, axis: int) -> None:
        self.shape, self.axis = x.shape, axis
        self.whole = spec.granularity == "tensor"
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
        # one scale for all does not care for the order of elements
        self.format = last if self.whole and x.is_contiguous(memory_format=last) else torch.contiguous_format
        rows = 1 if self.whole else x.shape[axis]
        self.columns = x.numel() // max(rows, 1)
        self.size = min(spec.group_size or self.columns, self.columns)
        self.groups = max(-(-self.columns // max(self.size, 1)), 1)
        self.scales = rows * self.groups
        config = pick("fake-quant")
        self.options = config.options()
        self.block_e = min(config.block_k, triton.next_power_of_2(max(self.size, 1)))
        self.block_s = max(config.block_k // self.block_e, 1)
        self.chunks = -(-self.size // self.block_e)
        self.grid = (-(-self.scales // self.block_s) * self.chunks,)

    def arguments(self) -> tuple[int, int, int, int, int]:
        return self.scales, self.columns, self.groups, self.size, self.chunks

    def rows(self, x: Tensor) -> Tensor:
        """The values in the order of the scales, contiguous."""
        return x.contiguous(memory_format=self.format) if self.whole else x.movedim(self.axis, 0).contiguous()

    def back(self, rows: Tensor) -> Tensor:
        return rows if self.whole else rows.movedim(0, self.axis)


def _meta(layout: _Layout, spec: QuantSpec) -> dict[str, Any]:
    low, high = qrange(spec)
    return {"LOW": low, "HIGH": high, "BLOCK_S": layout.block_s, "BLOCK_E": layout.block_e, **layout.options}


def forward(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0) -> Tensor:
    """Quantize and dequantize.

    Args:
        x: float32, bfloat16 or float16, any shape and strides; so is what returns.
        scale, zero_point: as `qparams_shape`; float32 and any dtype. A zero point is rounded, and clamped to the codes.
        spec: integers, per tensor, channel or group.
        axis: the channel's dimension.
    """
    layout = _Layout(x, spec, axis)
    rows = layout.rows(x)
    out = torch.empty_like(rows)
    if x.numel():
        with on(x):
            fake_quantize_forward[layout.grid](
                rows, scale.contiguous(), zero_point.contiguous(), out, *layout.arguments(), **_meta(layout, spec)
            )
    return layout.back(out)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    axis: int = 0,
    factor: float = 1.0,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by `x`, scale and zero point (LSQ, LSQ+); sums are made in a fixed order, so they repeat to the bit.

    Args:
        grad: of what `forward` gave.
        factor: of the gradients by scale and zero point.
        wanted: which of them to compute; the others are None.
    """
    layout = _Layout(x, spec, axis)
    rows, slope = layout.rows(x), layout.rows(grad)
    by_x = torch.empty_like(rows) if wanted[0] else None
    parts = [x.new_zeros(layout.scales, layout.chunks, dtype=torch.float32) if want else None for want in wanted[1:]]
    if x.numel():
        with on(x):
            fake_quantize_backward[layout.grid](
                slope, rows, scale.contiguous(), zero_point.contiguous(), by_x, *parts, *layout.arguments(), factor,
                BY_X=wanted[0], BY_SCALE=wanted[1], BY_ZERO=wanted[2], **_meta(layout, spec),
            )  # fmt: skip
    by_scale, by_zero = (None if part is None else part.sum(1).reshape(scale.shape) for part in parts)
    return None if by_x is None else layout.back(by_x), by_scale, by_zero


def ste_backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0) -> Tensor:
    """The gradient where `x` is inside the range, 0 outside."""
    by_x = backward(grad, x, scale, zero_point, spec, axis, wanted=(True, False, False))[0]
    assert by_x is not None
    return by_x


# --- autograd ---------------------------------------------------------------------------------------------------------


class FusedFakeQuantize(torch.autograd.Function):
    """Fake quantization with gradients by `x`, and, as far as they are asked for, by scale and zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int, factor: float) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.axis, ctx.factor = spec, axis, factor
        return kept.once(lambda: (forward(x, scale, zero_point, spec, axis),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        x, scale, zero_point = ctx.saved_tensors
        by_x, by_scale, by_zero = backward(grads[0], x, scale, zero_point, ctx.spec, ctx.axis, ctx.factor, wanted)
        return by_x, by_scale, by_zero, None, None, None
