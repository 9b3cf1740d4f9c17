"""Packed weights for the tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.grids import minmax_qparams
from lightning_quant.numerics import FLOAT8, quantize
from lightning_quant.packing import pack, pack_zero_point
from lightning_quant.spec import QuantSpec

SIZES = (("tensor", None), ("channel", None), ("group", 32), ("group", 48), ("group", 128))
# every width the package has a preset for with every granularity, and one of each other kind
SPECS = [
    *(
        QuantSpec(bits, symmetric=even, granularity=kind, group_size=size)
        for bits in (2, 3, 4, 8) for even in (True, False) for kind, size in SIZES
    ),
    *(QuantSpec(bits, symmetric=False) for bits in (5, 6, 7)),
    QuantSpec(4, signed=False, symmetric=False, granularity="group", group_size=64),
    *(QuantSpec(4, kind, granularity="group", group_size=64) for kind in ("nf4", "fp4")),
    QuantSpec(4, "nf4"),
    *(QuantSpec(8, kind, granularity=grain) for kind in FLOAT8 for grain in ("tensor", "channel")),
]  # fmt: skip
FEW = [SPECS[index] for index in (0, 13, 22, 36, 43, 45)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.012, torch.float16: 0.002}


def packed_weight(spec: QuantSpec, channels: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scale and zero point of a random weight."""
    weight = torch.randn(channels, columns)
    scale, zero_point = minmax_qparams(weight, spec)
    words = pack(quantize(weight, scale, zero_point, spec), spec)
    if spec.symmetric:
        return words, scale, None
    return words, scale, pack_zero_point(zero_point, spec) if zero_point.dim() == 2 else zero_point
