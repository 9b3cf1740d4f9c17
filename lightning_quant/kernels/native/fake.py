"""Calls of the C library's fake quantization: how tensors lie before it, and its arguments."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.kernels import native
from lightning_quant.kernels.kept import is_kept
from lightning_quant.kernels.native import buffers
from lightning_quant.numerics import max_value, qrange
from lightning_quant.spec import QuantSpec

DTYPES = (torch.float32, torch.bfloat16)
GIVEN, NOW, SEEN = 0, 1, 2
CLIPPED, NOT_FINITE, FAILED = 1, 2, 4
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# an observer's state, one smallest and one largest value, and its momentum; 0: all that was seen
Seen = tuple[Tensor, Tensor, float]


class FakeArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "grad")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "period")),
        *((name, ctypes.c_void_p) for name in ("scale", "zero")),
        *((name, ctypes.c_int32) for name in ("zero_is_float", "keep_nan", "dtype", "low", "high", "range", "symmetric")),
        ("bound", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("seen_low", "seen_high")),
        ("momentum", ctypes.c_float),
    ]


@cache
def _library() -> Any:
    found = native.library()
    if found is not None:
        pointer = ctypes.POINTER(FakeArgs)
        found.lq_fake_quantize.argtypes = found.lq_fake_mask.argtypes = [pointer]
        found.lq_fake_learn.argtypes = [pointer, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
        found.lq_fake_search.argtypes = [pointer, *[ctypes.c_void_p] * 2, ctypes.c_int32, *[ctypes.c_void_p] * 2]
        found.lq_fake_mask.restype = None
    return found


def takes(x: Tensor) -> bool:
    """Whether the kernels run a call: plain CPU tensors that nobody traces, batches or shards, unless `LQ_BACKEND` forbids."""
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    if os.environ.get("LQ_BACKEND", "cpu") != "cpu" or _library() is None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


# --- layout ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a dense tensor lies before the kernels: `rows` of `columns` in groups of `group`; scales repeat after `period` rows."""

    spec: QuantSpec
    axis: int
    rows: int
    columns: int
    group: int
    period: int

    @property
    def measurable(self) -> bool:
        """Whether the elements of a scale are neighbours, so that its range is found in one pass."""
        return self.rows == self.period

    @property
    def scales(self) -> int:
        return self.period * -(-self.columns // self.group)


def layout_of(x: Tensor, spec: QuantSpec, axis: int) -> Layout | None:
    """The layout of a tensor, or of the dense copy that it takes; None if neighbours in memory have scales of their own.

    Args:
        axis: as in `to_groups`.

    Example:
        >>> layout_of(torch.zeros(4, 100), QuantSpec(4, granularity="group", group_size=64), 0).scales
        8
    """
    if spec.granularity == "tensor":
        return Layout(spec, axis, 1, x.numel(), max(x.numel(), 1), 1)
    if x.dim() == 0 or spec.flat_groups:
        return None
    dim = axis % x.dim()
    if spec.granularity == "token":
        rows, columns = math.prod(x.shape[:dim]), math.prod(x.shape[dim:])
        return Layout(spec, axis, rows, columns, max(columns, 1), rows)
    columns = math.prod(x.shape[dim + 1 :])
    if dim and (spec.granularity == "group" or columns < 8):
        return None
    group = columns if spec.group_size is None else spec.group_size
    return Layout(spec, axis, math.prod(x.shape[: dim + 1]), columns, max(group, 1), x.shape[dim])


def dense(x: Tensor, layout: Layout) -> Tensor:
    """The tensor, or a copy, with its rows one after the other; one scale for a row asks for no order in it."""
    if x.is_contiguous():
        return x
    if layout.rows in (1, x.shape[0]) and layout.group >= layout.columns:
        last = _LAST.get(x.dim())
        if last is not None and x.is_contiguous(memory_format=last):
            return x
        if layout.rows == 1:
            like = torch.empty_like(x)  # of the same strides if there are no gaps
            return x if like.stride() == x.stride() else like.copy_(x)
    return x.contiguous()


# --- calls ----------------------------------------------------------------------------------------------------------


def _args(x: Tensor, y: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, **more: Any) -> FakeArgs:
    low, high = qrange(layout.spec)
    return FakeArgs(
        x=x.data_ptr(),
        y=y.data_ptr(),
        rows=layout.rows,
        columns=layout.columns,
        group=layout.group,
        period=layout.period,
        scale=scale.data_ptr(),
        zero=zero_point.data_ptr(),
        zero_is_float=zero_point.dtype == torch.float32,
        dtype=native.DTYPES[x.dtype],
        low=low,
        high=high,
        **more,
    )


def _made_of(rows: Tensor) -> Tensor:
    """Where the quantized tensor goes: it lives for one layer, unless it is kept."""
    return torch.empty_like(rows) if is_kept() else buffers.empty_like(rows)


def _check(found: int) -> int:
    if found & FAILED:
        raise MemoryError("fake quantization: no memory for partial results")
    return found


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, learned: bool = False) -> tuple[Tensor, bool]:
    """The quantized tensor, and whether any of `x` was outside of its range.

    Args:
        scale, zero_point: `[layout.scales]` elements, contiguous; float32, and int32 or float32, which is rounded.
        learned: nan stays nan; else it takes the lowest code.
    """
    rows = dense(x, layout)
    y = _made_of(rows)
    found = _library().lq_fake_quantize(_args(rows, y, scale, zero_point, layout, range=GIVEN, keep_nan=learned))
    return y, bool(_check(found) & CLIPPED)


def quantize_measured(x: Tensor, layout: Layout, seen: Seen | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Quantize with the range that each scale's values have now, or with that of a tensor as an observer has seen it.

    Args:
        x: not empty.
        layout: a `measurable` one.
        seen: the observer's, changed in place unless `x` holds nan or inf.

    Returns:
        the quantized tensor, its scale and zero point, flat, and bits: CLIPPED, NOT_FINITE.
    """
    rows, spec = dense(x, layout), layout.spec
    y = _made_of(rows)
    scale = torch.empty(layout.scales, dtype=torch.float32)
    zero_point = torch.empty(layout.scales, dtype=torch.int32)
    more: dict[str, Any] = {"range": NOW, "symmetric": spec.symmetric, "bound": max_value(spec)}
    if seen is not None:
        low, high, momentum = seen
        more |= {"range": SEEN, "seen_low": low.data_ptr(), "seen_high": high.data_ptr(), "momentum": momentum}
    found = _check(_library().lq_fake_quantize(_args(rows, y, scale, zero_point, layout, **more)))
    if seen is not None:
        torch.autograd.graph.increment_version(seen[:2])
    return y, scale, zero_point, found


def search(
    x: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, shrinks: list[float]
) -> tuple[Tensor, Tensor] | None:
    """Ranges with the least squared error, as `MSEObserver` finds them; None if the kernels do not take the call.

    Args:
        x, counts: float32 `[groups, n]`, finite: values, and how often each occurs.
        low, high: float32 `[groups]`: where to start; they contain 0.
        spec: integers.
        shrinks: what the ends are multiplied by.
    """
    if not (spec.is_int and all(takes(value) and value.dtype == torch.float32 for value in (x, counts, low, high))):
        return None
    x, counts, low, high = x.contiguous(), counts.contiguous(), low.clone(), high.clone()
    factors = torch.tensor(shrinks, dtype=torch.float32)
    rows, columns = x.shape
    layout = Layout(spec, 0, rows, columns, max(columns, 1), max(rows, 1))
    args = _args(x, x, low, low, layout, symmetric=spec.symmetric, bound=max_value(spec))
    ends = low.data_ptr(), high.data_ptr()
    _check(_library().lq_fake_search(args, counts.data_ptr(), factors.data_ptr(), len(shrinks), *ends))
    return low, high


def _like(grad: Tensor, rows: Tensor) -> Tensor:
    same = grad.dtype == rows.dtype and grad.stride() == rows.stride()
    return grad if same else torch.empty_like(rows).copy_(grad)


def mask(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout) -> Tensor:
    """The gradient by `x`: that of the quantized tensor where `x` is inside of the range, else 0."""
    rows = dense(x, layout)
    slope, by_x = _like(grad, rows), torch.empty_like(rows)
    _library().lq_fake_mask(_args(rows, by_x, scale, zero_point, layout, grad=slope.data_ptr()))
    return by_x


def learn(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, layout: Layout, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by `x`, scale and zero point of `numerics.lsq_gradients`; sums are made in one order, whatever the threads."""
    rows = dense(x, layout)
    slope, by_x = _like(grad, rows), torch.empty_like(rows)
    by_scale, by_zero = torch.empty_like(scale), torch.empty_like(zero_point)
    args = _args(rows, by_x, scale, zero_point, layout, grad=slope.data_ptr())
    _check(_library().lq_fake_learn(args, by_scale.data_ptr(), by_zero.data_ptr(), factor))
    return by_x, by_scale, by_zero
