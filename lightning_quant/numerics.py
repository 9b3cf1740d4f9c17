"""The numbers: groups, ranges, scales and zero points, codes and back. Plain functions on tensors, all in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.spec import QuantSpec

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}

# ascending values in [-1, 1]; NF4: QLoRA, arXiv:2305.14314, appendix E; fp4: a sign and 3 bits of e2m1 over 12, as bitsandbytes
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(value / 12 for value in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12)),
}

# the smallest scale: its reciprocal is still finite in float32
MIN_SCALE = torch.finfo(torch.float32).tiny


def qrange(spec: QuantSpec) -> tuple[int, int]:
    """The smallest and the largest code of an integer spec, or of a codebook's index.

    Example:
        >>> qrange(QuantSpec(4)), qrange(QuantSpec(4, signed=False))
        ((-8, 7), (0, 15))
    """
    if spec.dtype in CODEBOOKS:
        return 0, len(CODEBOOKS[spec.dtype]) - 1
    if spec.is_int and spec.signed:
        return -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    return 0, 2**spec.bits - 1


def max_value(spec: QuantSpec) -> float:
    """The magnitude that a scale of 1 maps an absolute maximum to: half the code range (the largest code if
    dynamic), the float8 maximum, or 1.
    """
    if spec.dtype in FLOAT8:
        return torch.finfo(FLOAT8[spec.dtype]).max
    if spec.dtype in CODEBOOKS:
        return 1.0
    low, high = qrange(spec)
    # half the range puts the largest value on a tie (127.5); measured anew on every call, rounding noise would decide it
    return (high - low) / 2 if spec.signed and not spec.dynamic else float(high)


def codebook(dtype: str, device: torch.device) -> Tensor:
    """The ascending values of a codebook dtype, float32. Not cached: under tracing or inference mode it is no ordinary tensor."""
    return torch.tensor(CODEBOOKS[dtype], dtype=torch.float32, device=device)


# --- groups ---------------------------------------------------------------------------------------------------------


def to_groups(x: Tensor, spec: QuantSpec, axis: int = 0, pad: float = 0.0) -> Tensor:
    """Lay a tensor out as one row for each scale. The only place that knows what a granularity is.

    Args:
        x: any shape.
        axis: the channel's dimension for `channel` and `group`; for `token` the first dimension of a token's own features
            (negative: -1 for linear layers, -3 for a 2-D convolution's samples).
        pad: what fills up a ragged last group; 0 is on every grid and inside every range.

    Returns:
        `[n_scales, elements]`.
    """
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    if spec.granularity == "token":
        return x.reshape(-1, math.prod(x.shape[axis:]))
    if spec.flat_groups:
        rows = x.movedim(axis, 0).reshape(1, -1)
    else:
        rows = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.movedim(axis, 0)[:, None]
    if spec.granularity == "channel":
        return rows
    size = spec.group_size or 1
    if rows.shape[1] % size:
        rows = F.pad(rows, (0, -rows.shape[1] % size), value=pad)
    return rows.reshape(-1, size)


def from_groups(groups: Tensor, shape: torch.Size | tuple[int, ...], spec: QuantSpec, axis: int = 0) -> Tensor:
    """Undo `to_groups`: back to `shape`, padding dropped."""
    if spec.granularity in ("tensor", "token"):
        return groups.reshape(shape)
    moved = torch.Size([shape[axis], *(size for dim, size in enumerate(shape) if dim != axis % len(shape))])
    if spec.granularity == "group":
        rows = 1 if spec.flat_groups else moved[0]
        groups = groups.reshape(rows, -1)[:, : math.prod(moved) // rows]
    return groups.reshape(moved).movedim(0, axis)


def qparams_shape(shape: torch.Size | tuple[int, ...], spec: QuantSpec, axis: int = 0) -> tuple[int, ...]:
    """The shape in which a static scale is kept, as compressed-tensors has it.

    Returns:
        `(1,)` per tensor, `(channels, 1)` per channel, `(channels, groups)` per group, `(blocks,)` for nf4 and fp4.

    Example:
        >>> qparams_shape((576, 1000), QuantSpec(4, granularity="group", group_size=128))
        (576, 8)
    """
    if spec.granularity == "token":
        raise ValueError("per-token scales are computed on every call and have no static shape")
    if spec.granularity == "tensor":
        return (1,)
    if spec.flat_groups:
        return (math.ceil(math.prod(shape) / (spec.group_size or 1)),)
    if spec.granularity == "channel":
        return (shape[axis], 1)
    return (shape[axis], math.ceil(math.prod(shape) / shape[axis] / (spec.group_size or 1)))


# --- ranges and scales ----------------------------------------------------------------------------------------------


def _qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    qmin, qmax = qrange(spec)
    if spec.symmetric:
        scale = (high if spec.is_int and not spec.signed else torch.maximum(-low, high)) / max_value(spec)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        scale = high / (qmax - qmin) - low / (qmax - qmin)  # the difference itself may overflow
        zero_point = (qmin - torch.round(low / scale.clamp(min=MIN_SCALE))).clamp(qmin, qmax).to(torch.int32)
    return torch.where((low == 0) & (high == 0), 1.0, scale.clamp(min=MIN_SCALE)), zero_point


def holds(condition: Tensor, otherwise: str) -> bool:
    """Whether a condition, a bool tensor of one element, is true; while it is traced it counts as true and is checked when run."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, otherwise)
        return True
    return bool(condition)


def calc_qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range (Jacob et al. 2018, arXiv:1712.05877, section 2.1).

    The range is widened to contain 0, so that 0 is on the grid exactly; a range of only 0 gives scale 1.

    Args:
        min_val, max_val: any equal shape, finite.

    Returns:
        `scale`: float32, positive and finite; `zero_point`: int32, 0 if symmetric; both in the shape given.

    Raises:
        ValueError: a range that is not finite, or is empty.

    Example:
        >>> calc_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), QuantSpec(4, symmetric=False))
        (tensor([0.2667]), tensor([-4], dtype=torch.int32))
    """
    low, high = min_val.float(), max_val.float()
    # comparisons with nan are false, so this also catches nan
    if not holds(((low <= high) & (low > -torch.inf) & (high < torch.inf)).all(), "not a finite range"):
        raise ValueError(f"not a finite range: min {low.min().item()}, max {high.max().item()}")
    return _qparams(low, high, spec)


def dynamic_qparams(x: Tensor, spec: QuantSpec, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a tensor as it is now, one for each row of `to_groups(x, spec, axis)`.

    Not checked for nan and inf, which would synchronise a GPU on every call: as in float arithmetic they make their own
    row nan and no other.
    """
    rows = to_groups(x.detach().float(), spec, axis)
    if rows.numel() == 0:
        return rows.new_ones(rows.shape[0]), rows.new_zeros(rows.shape[0], dtype=torch.int32)
    return _qparams(*torch.aminmax(rows, dim=1), spec)


# --- codes ----------------------------------------------------------------------------------------------------------


def code_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of one code before packing: int8, uint8 (unsigned and codebook indices) or a float8."""
    if spec.dtype in FLOAT8:
        return FLOAT8[spec.dtype]
    return torch.int8 if spec.is_int and spec.signed else torch.uint8


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1)


def quantize_rows(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`quantize` on what `to_groups` returns: `[n_scales, elements]`, one scale a row."""
    rows = rows.float() * (1.0 / _column(scale.float()))
    if spec.dtype in FLOAT8:
        bound = max_value(spec)
        return rows.clamp(-bound, bound).to(FLOAT8[spec.dtype])
    if spec.dtype in CODEBOOKS:
        values = codebook(spec.dtype, rows.device)
        return torch.bucketize(rows, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    qmin, qmax = qrange(spec)
    return (rows.round() + _column(zero_point)).clamp(qmin, qmax).to(code_dtype(spec))


def dequantize_rows(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """`dequantize` on codes in the layout of `to_groups`."""
    if spec.dtype in CODEBOOKS:
        return codebook(spec.dtype, codes.device)[codes.long()] * _column(scale.float())
    values = codes.float()
    if zero_point is not None and spec.is_int:
        values = values - _column(zero_point)
    return values * _column(scale.float())


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0) -> Tensor:
    """Codes of a tensor: `clamp(round(x * (1 / scale)) + zero_point, qmin, qmax)`, ties to even, as torch's fake quantization.

    Args:
        x: float, any shape.
        scale, zero_point: as many elements as `to_groups` has rows, in that order.

    Returns:
        codes in `x`'s shape, of `code_dtype(spec)`.

    Example:
        >>> quantize(torch.tensor([0.5, 1.5, 9.0]), torch.tensor([1.0]), torch.tensor([0]), QuantSpec(4, granularity="tensor"))
        tensor([0, 2, 7], dtype=torch.int8)
    """
    return from_groups(quantize_rows(to_groups(x, spec, axis), scale, zero_point, spec), x.shape, spec, axis)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, axis: int = 0) -> Tensor:
    """The float32 values of codes: `(code - zero_point) * scale`, or the code's own value times scale.

    Args:
        codes: as `quantize` returns them.
        zero_point: None stands for 0.
    """
    if spec.dtype in FLOAT8:  # padding and moving axes are not implemented for float8
        codes = codes.float()
    return from_groups(dequantize_rows(to_groups(codes, spec, axis), scale, zero_point, spec), codes.shape, spec, axis)


# --- learned scales -------------------------------------------------------------------------------------------------


def lsq_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    factor: float,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of fake quantization by `x`, scale and zero point.

    LSQ (Esser et al. 2020, arXiv:1902.08153, section 2.1); the zero point's is LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576).

    Args:
        grad: of what was fake-quantized, in the shape of `x`.
        scale, zero_point: float32, broadcast over `x`; a zero point is rounded and clamped to the codes.
        factor: of the gradients by scale and zero point.
        wanted: which to compute; the others are None.
    """
    offset = zero_point.round().clamp(qmin, qmax)
    ratio = x * (1.0 / scale)
    level = ratio.round() + offset
    inside = (level >= qmin) & (level <= qmax)
    by_scale = by_zero = None
    if wanted[1]:
        slope = level.clamp(qmin, qmax) - offset - ratio * inside
        by_scale = (grad * slope).sum_to_size(scale.shape) * factor
    if wanted[2]:
        by_zero = (grad * ~inside * -scale).sum_to_size(zero_point.shape) * factor
    return grad * inside if wanted[0] else None, by_scale, by_zero
