"""`nn.Linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.kernels import run_linear
from lightning_quant.nn.folding import FoldableModule
from lightning_quant.nn.packed import PackedModule


class PackedLinear(PackedModule, nn.Linear):
    """A linear layer with packed weights: `[..., in_features]` -> `[..., out_features]`."""

    def packed_shape(self, name: str) -> list[int]:
        return [self.out_features, self.in_features]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight in the module's float dtype, computed on every access."""
        return self.dequantized_weight().to(self._float_dtype)

    def forward(self, input: Tensor) -> Tensor:
        x = self.cast_input(input)
        bias = self._parameters["bias"]
        args = (*self.packed_weight(), bias, *self.input_args(), self.in_features, *self.spec_args)
        return self.quantize_output(run_linear(x, *args))


class FakeLinear(FoldableModule, nn.Linear):
    """`nn.Linear` with quantizers."""

    packed_type = PackedLinear

    def forward(self, input: Tensor) -> Tensor:
        if self.norm is not None and input.dim() != 2:
            # BatchNorm1d normalises dim 1, which are the features only of a 2-D input
            raise ValueError(
                f"{self.weight_fake_quant.name}: its BatchNorm was folded in, but the input has {input.dim()} dimensions, where "
                f"a BatchNorm normalises dimension 1 and not the features. Leave the pair out: Recipe(fold=[...]) without it"
            )
        x = self.fake_input(input)
        return self.run(x, lambda weight, bias: F.linear(x, weight, bias))
