"""Double quantization (Dettmers et al. 2023, arXiv:2305.14314, section 3): scales in 8 bits, as bitsandbytes stores them.

From the scales of blocks of weights their mean is taken; what is left is quantized in blocks of 256 to the dynamic 8-bit format of
Dettmers et al. 2022 (arXiv:2110.02861, section 1.3): a sign, an exponent in unary, a linear fraction.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_quant.spec import QuantSpec

BLOCK = 256


@lru_cache(maxsize=1)
def dynamic_values() -> tuple[float, ...]:
    """The 256 ascending values of the signed dynamic format: middles of 2^i equal parts of [0.1, 1], times 10^(i-6)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(values))


def _values(device: torch.device) -> Tensor:
    return torch.tensor(dynamic_values(), dtype=torch.float32, device=device)


def scale_shapes(count: int) -> tuple[tuple[int], tuple[int], tuple[int]]:
    """The shapes of what `quantize_scale` makes of so many scales."""
    return (count,), (math.ceil(count / BLOCK),), (1,)


def quantize_scale(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales in 8 bits.

    Args:
        scale: float32 `[blocks]`.

    Returns:
        codes, uint8 `[blocks]`; their scale, float32 `[ceil(blocks / 256)]`; the mean that was taken off, float32 `[1]`.

    Example:
        >>> scale = torch.rand(1000) + 1
        >>> codes, absmax, offset = quantize_scale(scale)
        >>> codes.dtype, absmax.shape, bool((dequantize_scale(codes, absmax, offset) - scale).abs().max() < 0.02)
        (torch.uint8, torch.Size([4]), True)
    """
    scale = scale.float()
    offset = scale.mean()
    rest = F.pad(scale - offset, (0, -len(scale) % BLOCK)).reshape(-1, BLOCK)
    absmax = rest.abs().amax(1, keepdim=True)
    values = _values(scale.device)
    rows = rest * torch.where(absmax > 0, 1.0 / absmax, 0.0)
    codes = torch.bucketize(rows, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes.flatten()[: len(scale)], absmax.flatten(), offset.reshape(1)


def dequantize_scale(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """Undo `quantize_scale`: float32 `[blocks]`."""
    rows = F.pad(_values(codes.device)[codes.long()], (0, -len(codes) % BLOCK)).reshape(-1, BLOCK)
    return (rows * absmax[:, None]).flatten()[: len(codes)] + offset


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that a weight is dequantized with, given the one that it was quantized with."""
    return dequantize_scale(*quantize_scale(scale)) if spec.double_quant else scale
