"""transformers' `Conv1D` (GPT-2): a linear layer whose weight is `[in_features, out_features]`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_quant.functional import from_sources
from lightning_quant.kernels import run_linear
from lightning_quant.nn.fake import FakeModule
from lightning_quant.nn.packed import PackedModule


class PackedConv1D(PackedModule, Conv1D):
    """`Conv1D` with packed weights, laid out by output channel like a linear layer's: `[..., nx]` -> `[..., nf]`."""

    nx: int
    nf: int
    bias: Tensor

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return {"weight": 1}

    def packed_shape(self, name: str) -> list[int]:
        return [self.nx, self.nf]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the module's float dtype, computed on every access."""
        return self.dequantized_weight().to(self._float_dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cast_input(x)
        return self.quantize_output(run_linear(x, *self.packed_weight(), self.bias, *self.input_args(), self.nx, *self.spec_args))


class FakeConv1D(FakeModule, Conv1D):
    """`Conv1D` with quantizers."""

    bias: Tensor
    packed_type = PackedConv1D
    weight_axes = PackedConv1D.weight_axes

    def forward(self, x: Tensor) -> Tensor:
        quantized, weight = self.fake_input(x), self.fake_weight()
        return self.fake_output(from_sources(lambda: F.linear(quantized, weight.t(), self.bias), quantized, weight))
