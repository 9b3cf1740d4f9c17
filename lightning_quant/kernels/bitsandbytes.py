"""bitsandbytes' kernels for nf4 and fp4 weights. Packed words have its layout, so nothing is copied or kept twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels import reference
from lightning_quant.spec import QuantSpec

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _installed() -> bool:
    return find_spec("bitsandbytes") is not None


@cache
def _load() -> None:
    """Import bitsandbytes, which registers its operators; what it has to say of kernels on a hub is not for our users."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.disabled = before


def refuses(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> str:
    """Why it does not run a call: it has blocks of nf4 or fp4 in some sizes, on some devices."""
    if weight_spec.dtype not in ("nf4", "fp4") or not weight_spec.flat_groups or input_spec is not None:
        return "runs nf4 and fp4 in blocks, with float inputs"
    if weight_spec.group_size not in BLOCKS:
        return f"has blocks of {', '.join(map(str, BLOCKS))}, not of {weight_spec.group_size}"
    if x.device.type not in ("cpu", "cuda", "xpu"):
        return f"does not run on {x.device.type}"
    return "" if _installed() else "bitsandbytes is not installed"


def describe(op: str, x: Tensor, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> tuple[str, str]:
    """How this backend computes, and where it is slow."""
    slow = "" if x.device.type == "cuda" else "dequantized at every call: slower than float for few rows"
    return "bitsandbytes dequantizes, then torch's float operator", slow


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    axis: int,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.dequantize_weight`, by `bitsandbytes::dequantize_4bit`."""
    columns = math.prod(shape) // shape[axis]
    if columns % 2 or dtype not in _DTYPES:  # its rows are whole bytes
        return reference.dequantize_weight(packed, scale, zero_point, shape, axis, spec, dtype)
    _load()
    codes = packed.view(torch.uint8)[:, : columns // 2].contiguous()
    # 0.50 reads wrong scales on CPUs where a row is no whole number of blocks
    size = (shape[axis], columns) if columns % (spec.group_size or 1) == 0 else (1, shape[axis] * columns)
    rows = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, spec.group_size, spec.dtype, size, dtype)
    return rows.reshape([shape[axis], *(length for dim, length in enumerate(shape) if dim != axis)]).movedim(0, axis)


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
    """`F.linear` with a weight dequantized to the input's dtype: `[..., in_features]` -> `[..., out_features]`."""
    shape = (weight_packed.shape[0], in_features)
    weight = dequantize_weight(weight_packed, weight_scale, weight_zero_point, shape, 0, weight_spec, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
