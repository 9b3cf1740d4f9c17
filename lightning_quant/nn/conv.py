"""Convolutions and transposed convolutions, 1- to 3-D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_quant.kernels import run_conv
from lightning_quant.kernels.onednn import is_channels_last
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.nn.packed import PackedModule
from lightning_quant.spec import QuantScheme


class PackedConv(PackedModule, _ConvNd):
    """A convolution with packed weights.

    `model.to(memory_format=torch.channels_last)`, before or after packing, means what it means in float: the output is in that
    format, whichever the input is in. Integer kernels compute in it.
    """

    _channels_last = False

    operator = "conv"

    @classmethod
    def empty(cls, module: nn.Module, scheme: QuantScheme, device: torch.device | str | None = None) -> PackedConv:
        packed = super().empty(module, scheme, device)
        weight = module._parameters.get("weight")
        packed._channels_last = weight is not None and weight.dim() > 3 and is_channels_last(weight)
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        # packed words have two dimensions, which no memory format concerns: a probe tells whether one was asked for
        if len(self.kernel_size) > 1:
            last = torch.channels_last if len(self.kernel_size) == 2 else torch.channels_last_3d
            words: Any = self.weight_packed
            probe = torch.empty([2] * (len(self.kernel_size) + 2), device=words.device)
            self._channels_last = is_channels_last(fn(probe.to(memory_format=last) if self._channels_last else probe))
        return super()._apply(fn, recurse)

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return {"weight": int(module.transposed)}  # type: ignore[arg-type]

    @property
    def input_axis(self) -> int:  # type: ignore[override]
        return -1 - len(self.kernel_size)

    def packed_shape(self, name: str) -> list[int]:
        first, second = self.out_channels, self.in_channels // self.groups
        if self.transposed:
            first, second = self.in_channels, self.out_channels // self.groups
        return [first, second, *self.kernel_size]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight in the module's float dtype, computed on every access."""
        return self.dequantized_weight().to(self._float_dtype)

    def _run(self, x: Tensor, padding: Sequence[int], output_padding: Sequence[int]) -> Tensor:
        if self._channels_last and x.dim() == len(self.kernel_size) + 2:
            x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        geometry = (self.stride, padding, self.dilation, self.groups, self.transposed, output_padding)
        args = (
            *self.packed_weight(),
            self.bias,
            *self.input_args(),
            self.packed_shape("weight"),
            *geometry,
            *self.spec_args,
        )
        return self.quantize_output(run_conv(x, *args))

    def forward(self, input: Tensor) -> Tensor:
        x = self.cast_input(input)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # 0 is on every grid and other modes only repeat values, so padding and quantizing commute
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.kernel_size)
        return self._run(x, padding, self.output_padding)


class PackedConvTranspose(PackedConv, _ConvTransposeNd):
    """A transposed convolution with packed weights."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.cast_input(input)
        return self._run(x, self.padding, output_padding(self, x, output_size))  # type: ignore[arg-type]


def output_padding(module: _ConvTransposeNd, x: Tensor, output_size: list[int] | None) -> list[int]:
    """The padding that gives `output_size`, as `nn.ConvTranspose2d.forward` finds it."""
    dims = len(module.kernel_size)
    geometry: Any = (module.stride, module.padding, module.kernel_size, dims, module.dilation)
    return module._output_padding(x, output_size, *geometry)


class FakeConv(FoldableModule, _ConvNd):
    """A convolution with quantizers; a dynamic input has one range a sample."""

    weight_axes = PackedConv.weight_axes
    input_axis = PackedConv.input_axis

    @property
    def output_axis(self) -> int:  # type: ignore[override]
        return -1 - len(self.kernel_size)

    def channel_groups(self) -> int:
        return self.groups if self.transposed else 1

    def forward(self, input: Tensor) -> Tensor:
        x = self.fake_input(input)
        return self.run(x, lambda weight, bias: self._conv_forward(x, weight, bias))


_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class FakeConvTranspose(FakeConv, _ConvTransposeNd):
    """A transposed convolution with quantizers."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.fake_input(input)
        transposed = _TRANSPOSED[len(self.kernel_size)]
        extra: Any = (self.stride, self.padding, output_padding(self, x, output_size), self.groups, self.dilation)
        return self.run(x, lambda weight, bias: transposed(x, weight, bias, *extra))


class PackedConv1d(PackedConv, nn.Conv1d): ...


class PackedConv2d(PackedConv, nn.Conv2d): ...


class PackedConv3d(PackedConv, nn.Conv3d): ...


class PackedConvTranspose1d(PackedConvTranspose, nn.ConvTranspose1d): ...


class PackedConvTranspose2d(PackedConvTranspose, nn.ConvTranspose2d): ...


class PackedConvTranspose3d(PackedConvTranspose, nn.ConvTranspose3d): ...


class FakeConv1d(FakeConv, nn.Conv1d):
    packed_type = PackedConv1d


class FakeConv2d(FakeConv, nn.Conv2d):
    packed_type = PackedConv2d


class FakeConv3d(FakeConv, nn.Conv3d):
    packed_type = PackedConv3d


class FakeConvTranspose1d(FakeConvTranspose, nn.ConvTranspose1d):
    packed_type = PackedConvTranspose1d


class FakeConvTranspose2d(FakeConvTranspose, nn.ConvTranspose2d):
    packed_type = PackedConvTranspose2d


class FakeConvTranspose3d(FakeConvTranspose, nn.ConvTranspose3d):
    packed_type = PackedConvTranspose3d
