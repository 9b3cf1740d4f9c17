"""Integer convolutions and linear layers on oneDNN, through the operators that torch has for its own int8 models (CPU).

Weights are prepacked once (`prepack`), the input is quantized in one pass, products are summed exactly in 32 bits, and scales and
bias are applied in float32. oneDNN takes unsigned input codes: signed ones are shifted by 128, and so is their zero point.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_quant.kernels import native, reference
from lightning_quant.kernels.prepack import prepacked
from lightning_quant.numerics import dynamic_qparams, qrange
from lightning_quant.packing import unpack
from lightning_quant.spec import QuantSpec

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# the longest sum of products of codes (255 * 128) that fits 32 bits
_LONGEST = (2**31 - 1) // (255 * 128)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight as oneDNN wants it: opaque codes, a scale and a zero point (0) for each output channel."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


@cache
def is_exact() -> bool:
    """Whether torch has the operators and the CPU sums without saturating: before VNNI, pairs of products are cut to 16 bits."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    try:
        weight, x = torch.full((16, 64), 127, dtype=torch.int8), torch.full((4, 64), 255, dtype=torch.uint8)
        scale, zero_point = torch.ones(16), torch.zeros(16, dtype=torch.int64)
        out = _qlinear(x, 1.0, 0, _Weight(torch.ops.onednn.qlinear_prepack(weight, None), scale, zero_point), None, torch.float32)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool((out == 64 * 127 * 255).all())


def refuses(
    op: str,
    x: Tensor,
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
    weight_shape: Sequence[int] | None = None,
    transposed: bool = False,
) -> str:
    """Why this backend does not run a call, in a few words; empty if it does. Depends on nothing that changes between batches.

    Args:
        weight_shape, transposed: the geometry, where it is known.

    Example:
        >>> refuses("linear", torch.ones(2, 4), QuantSpec(8), None)
        'float inputs'
    """
    if op not in ("conv", "linear"):
        return f"no {op}"
    if input_spec is None:
        return "float inputs"
    if not (weight_spec.is_int and input_spec.is_int):
        return "not integers"
    if weight_spec.granularity not in ("tensor", "channel"):
        return "weights in groups"
    if not (weight_spec.symmetric and weight_spec.signed):
        return "weights with a zero point"
    if input_spec.granularity == "token" and not (input_spec.symmetric and input_spec.signed):
        return "a zero point for each token"
    if x.device.type != "cpu":
        return f"runs on cpu, not {x.device.type}"
    if x.dtype not in _FLOATS:
        return f"input in {x.dtype}"
    if transposed:
        return "transposed convolutions"
    if weight_shape is not None and too_long(weight_shape):
        return too_long(weight_shape)
    return "" if is_exact() else "no exact int8 arithmetic on this CPU"


def too_long(weight_shape: Sequence[int]) -> str:
    """Why sums of so many products are refused: they may not fit into 32 bits."""
    return f"sums of more than {_LONGEST} products" if math.prod(weight_shape[1:]) > _LONGEST else ""


def describe(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> tuple[str, str]:
    """How this backend computes, and where it is slow."""
    slow = op == "conv" and input_spec is not None and input_spec.dynamic
    return (
        "int8 dot products, prepacked by oneDNN",
        "each sample's range is searched at every call: static inputs are faster" if slow else "",
    )


# --- the input ------------------------------------------------------------------------------------------------------


@cache
def _fused() -> bool:
    """Whether torch still has its quantized dtypes, whose operators quantize in one pass; that they are deprecated is not told."""
    if not hasattr(torch, "quantize_per_tensor") or not hasattr(torch, "quint8"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _raw(torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.quint8))
    return True


def _raw(quantized: Tensor) -> Tensor:
    """The codes of a `torch.quint8` or `torch.qint8` tensor as uint8, not copied."""
    codes = torch.empty(0, dtype=torch.uint8)
    return codes.set_(quantized.untyped_storage(), 0, quantized.size(), quantized.stride())


def quantize_codes(x: Tensor, scale: float | Tensor, zero_point: int, limits: tuple[int, int]) -> Tensor:
    """`clamp(round(x * (1 / scale)) + zero_point, *limits)` as uint8, in `x`'s layout.

    One pass by the C library, or where the zero point is 0 (after a ReLU) or 128 (symmetric ranges), else five.

    Args:
        x: float, dense; two-dimensional if there are several scales.
        scale: one, or float32 `[rows]`, then with a zero point of 128.
        zero_point: 0 to 255.
        limits: the smallest and the largest code, 0 to 255.
    """
    x = x.detach()
    if isinstance(scale, float) and native.library() is not None and x.dtype in native.DTYPES:
        return native.quantize(x, scale, zero_point, limits)
    values = x.float()
    # torch's operators add the zero point before they round, which moves codes near a tie: only 0 is safe
    if zero_point not in (0, 128) or not _fused():
        inverse = 1.0 / (scale[:, None] if isinstance(scale, Tensor) else torch.tensor(scale))
        return (values * inverse).round_().add_(zero_point).clamp_(*limits).to(torch.uint8)
    dtype = torch.quint8 if zero_point == 0 else torch.qint8
    if isinstance(scale, Tensor):
        zeros = torch.zeros(scale.shape, dtype=torch.int32)
        codes = _raw(torch.quantize_per_channel(values, scale, zeros, 0, dtype))
    else:
        codes = _raw(torch.quantize_per_tensor(values, scale, 0, dtype))
    codes = codes.add_(zero_point) if zero_point else codes  # bytes wrap around: -128 is 128, and 0 with 128 added
    return codes if limits == (0, 255) else codes.clamp_(*limits)


def _codes(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: QuantSpec) -> tuple[Tensor, float, int, Tensor | None]:
    """Quantize a tensor, or `[tokens, elements]`: codes, one scale and zero point, and the scales `[tokens]` if each has one."""
    offset = 128 if spec.signed else 0
    limits = (qrange(spec)[0] + offset, qrange(spec)[1] + offset)
    if spec.dynamic:
        scale, zero_point = dynamic_qparams(x, spec)
    if scale is None or zero_point is None:
        raise ValueError("a static input spec needs its scale and zero point")
    if scale.numel() > 1:
        return quantize_codes(x, scale, offset, limits), 1.0, offset, scale
    step, zero = scale.item(), int(zero_point.item()) + offset
    return quantize_codes(x, step, zero, limits), step, zero, None


# --- the operators --------------------------------------------------------------------------------------------------


def unpacked(packed: Tensor, scale: Tensor, shape: Sequence[int], spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's codes, int8 in its own shape, scales, float32 `[channels]`, and zero points (0)."""
    codes = unpack(packed.detach(), spec, math.prod(shape[1:])).reshape(tuple(shape))
    # a copy: what is kept must not be a view of a parameter that FSDP frees
    return codes, scale.detach().flatten().float().expand(shape[0]).clone(), torch.zeros(shape[0], dtype=torch.int64)


def _qlinear(x: Tensor, scale: float, zero_point: int, weight: _Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    of_weight = (weight.codes, weight.scale, weight.zero_point, bias)
    return torch.ops.onednn.qlinear_pointwise(x, scale, zero_point, *of_weight, 1.0, 0, dtype, "none", [], "")


def _output_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


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
    """`reference.linear` in integers: `[..., in_features]` -> `[..., out_features]`."""
    shape = (weight_packed.shape[0], in_features)
    if input_spec is None or x.numel() == 0 or refuses("linear", x, weight_spec, input_spec, shape):
        rest = (bias, input_scale, input_zero_point, in_features, weight_spec, input_spec)
        return reference.linear(x, weight_packed, weight_scale, weight_zero_point, *rest)

    def build() -> _Weight:
        codes, scale, zero_point = unpacked(weight_packed, weight_scale, shape, weight_spec)
        return _Weight(torch.ops.onednn.qlinear_prepack(codes, None), scale, zero_point)

    weight = prepacked(build, ("onednn", "linear", shape, weight_spec), weight_packed, weight_scale)
    rows, bias = x.detach().reshape(-1, in_features).contiguous(), _bias(bias)
    codes, scale, zero_point, scales = _codes(rows, input_scale, input_zero_point, input_spec)
    if scales is None:
        out = _qlinear(codes, scale, zero_point, weight, bias, _output_dtype(x))
    else:
        out = _qlinear(codes, scale, zero_point, weight, None, torch.float32)
        out = out.mul_(scales[:, None]) if bias is None else torch.addcmul(bias, out, scales[:, None])
    return out.to(x.dtype).reshape(*x.shape[:-1], shape[0])


def is_channels_last(x: Tensor) -> bool:
    """Whether a batch of images `[N, C, H, W]` or volumes is in torch's channels_last layout, and not in the usual one as well."""
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=last) and not x.is_contiguous()


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
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
) -> Tensor:
    """`reference.conv` in integers. The output has the layout of `x`, as that of torch's own convolutions has."""
    if input_spec is None or x.numel() == 0 or refuses("conv", x, weight_spec, input_spec, weight_shape, transposed):
        of_weight: Any = (weight_packed, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, weight_shape)
        rest: Any = (stride, padding, dilation, groups, transposed, output_padding, weight_spec, input_spec)
        return reference.conv(*(x, *of_weight, *rest))
    numbers = tuple(tuple(values) for values in (stride, padding, dilation))
    batch = x if x.dim() == len(weight_shape) else x[None]
    weight = _conv_weight(weight_packed, weight_scale, tuple(weight_shape), numbers, groups, weight_spec)
    if len(weight_shape) == 3:  # as an image of height 1: channels_last is defined for images
        numbers = tuple((neutral, *values) for neutral, values in zip((1, 0, 1), numbers, strict=True))
        batch = batch[:, :, None]
    out = _conv(batch, weight, _bias(bias), input_scale, input_zero_point, numbers, groups, input_spec)
    out = out.squeeze(2) if len(weight_shape) == 3 else out
    return out if x.dim() == len(weight_shape) else out[0]


def _conv_weight(
    packed: Tensor, scale: Tensor, shape: tuple[int, ...], numbers: tuple[tuple[int, ...], ...], groups: int, spec: QuantSpec
) -> _Weight:
    def build() -> _Weight:
        codes, scales, zero_points = unpacked(packed, scale, shape, spec)
        flat = [(neutral, *values) for neutral, values in zip((1, 0, 1), numbers, strict=True)] if len(shape) == 3 else numbers
        codes = codes[:, :, None] if len(shape) == 3 else codes
        # the input's scale and zero point tell only whether to prepare for them: those of a call count
        return _Weight(torch.ops.onednn.qconv_prepack(codes, scales, 1.0, 128, *flat, groups, None), scales, zero_points)

    return prepacked(build, ("onednn", "conv", shape, numbers, groups, spec), packed, scale)


def _conv(
    x: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    numbers: tuple[tuple[int, ...], ...],
    groups: int,
    spec: QuantSpec,
) -> Tensor:
    """A batch of images or volumes: computed in channels_last, returned in the layout of `x`."""
    if spec.granularity == "token":  # a sample a row, channels last
        rows = x.detach().movedim(1, -1).reshape(x.shape[0], -1)
        codes, scale, zero_point, scales = _codes(rows, None, None, spec)
        codes = codes.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    else:  # quantized where it lies: bytes are moved faster than floats
        codes, scale, zero_point, scales = _codes(x.detach(), input_scale, input_zero_point, spec)
        codes = codes.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    dtype = torch.float32 if scales is not None else _output_dtype(x)
    of_weight = (weight.codes, weight.scale, weight.zero_point, None if scales is not None else bias)
    out = torch.ops.onednn.qconv_pointwise(codes, scale, zero_point, *of_weight, *numbers, groups, 1.0, 0, dtype, "none", [], "")
    if scales is not None:
        ones = [1] * (x.dim() - 2)
        scales = scales.view(-1, 1, *ones)
        out = out.mul_(scales) if bias is None else torch.addcmul(bias.view(-1, *ones), out, scales)
    return out.to(x.dtype) if is_channels_last(x) else out.to(x.dtype).contiguous()
