"""What a program of convolutions computes: values, in the order in which they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# channels of a map come in 16, those of codes in 4
LANES, TAP = 16, 4
INFINITY = float("inf")
Shape = tuple[int, int, int]  # channels, height, width


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Grid:
    """Codes of 8 bits without a sign: `clamp(round(x / scale) + zero_point, low, high)`."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255


@dataclass(frozen=True, eq=False)
class ConvWeight:
    """A convolution's int8 codes `[out, in, h, w]`, float32 scales `[out]`, bias `[out]` or None, and the grid of its input.

    It may be part of several programs, which then share what `arranged` makes of it.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    grid: Grid
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @cached_property
    def arranged(self) -> dict[str, Tensor]:
        """Codes `[out / 16, taps, 16, 4]`, what sums start from, scales and bias, for a multiple of 16 channels."""
        out_c, in_c, kernel_h, kernel_w = self.codes.shape
        lanes = up(out_c, LANES)
        codes = torch.zeros(lanes, kernel_h, kernel_w, up(in_c, TAP), dtype=torch.int8)
        codes[:out_c, :, :, :in_c] = self.codes.permute(0, 2, 3, 1)
        start, scale, bias = (torch.zeros(lanes, dtype=dtype) for dtype in (torch.int32, torch.float32, torch.float32))
        start[:out_c] = -self.grid.zero_point * self.codes.sum((1, 2, 3), dtype=torch.int32)
        scale[:out_c] = self.scale.float() * self.grid.scale
        if self.bias is not None:
            bias[:out_c] = self.bias.float()
        codes = codes.view(lanes // LANES, LANES, -1, TAP).transpose(1, 2).contiguous()
        return {"weight": codes, "start": start, "scale": scale, "bias": bias}


@dataclass
class Value:
    """What an operation computes.

    Args:
        op: input, conv, add, clamp, slice, pad, max_pool or mean.
        inputs: indices of the values that it is of.
        channels_last: of an input: how it lies in memory.
    """

    op: str
    inputs: tuple[int, ...]
    shape: Shape
    conv: ConvWeight | None = None
    numbers: tuple[Any, ...] = ()
    channels_last: bool = False


@dataclass
class Graph:
    """Values in the order in which they are computed, and which of them are returned."""

    values: list[Value] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    # how each output lies in memory
    channels_last: list[bool] = field(default_factory=list)

    def add(self, op: str, inputs: Sequence[int], shape: Shape, **rest: Any) -> int:
        self.values.append(Value(op, tuple(inputs), shape, **rest))
        return len(self.values) - 1

    def conv(self, x: int, weight: ConvWeight) -> int:
        """Add a convolution; raises ValueError where its window is larger than the image."""
        _, *size = self.values[x].shape
        kernel = weight.codes.shape[2:]
        numbers = zip(size, kernel, weight.stride, weight.padding, weight.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in numbers)
        if min(height, width) < 1:
            raise ValueError(f"a window of {tuple(kernel)} does not fit into {tuple(size)}")
        return self.add("conv", (x,), (weight.codes.shape[0], height, width), conv=weight)
