"""Modules that a BatchNorm can be folded into (Jacob et al. 2018, arXiv:1712.05877, section 3.2).

Training quantizes `weight * s` with `s = gamma / sqrt(running_var + eps)`, divides the output by `s` again and leaves the
BatchNorm in place to learn; in eval the two cancel into the folded module that `to_packed` builds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.nn.base import FakeModule, PackedModule

# a scale below this counts as 0: its channel is constant
TINY_SCALE = 1e-8


def norm_scale(norm: _BatchNorm) -> Tensor:
    """`gamma / sqrt(running_var + eps)` of a BatchNorm, float32 `[channels]`, no gradient.

    Without gradient because scaling the weight and unscaling the output cancel, but for rounding noise.
    """
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.detach().float() + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.detach().float()


def fold_bias(norm: _BatchNorm, bias: Tensor | None) -> Tensor:
    """The bias of the folded module, float32 `[channels]`."""
    assert norm.running_mean is not None
    shift = (0.0 if bias is None else bias.detach().float()) - norm.running_mean.detach().float()
    shift = shift * norm_scale(norm)
    return shift if norm.bias is None else shift + norm.bias.detach().float()


class FoldableModule(FakeModule):
    """A fake module that may have a BatchNorm folded into its weight."""

    folded_name: str
    weight_fake_quant: FakeQuantize
    # the channel's dimension in the output: -1 for linear layers, -1 - dims for convolutions
    output_axis = -1

    def channel_groups(self) -> int:
        """Blocks that the output channels come in along the weight's channel axis."""
        return 1

    @property
    def norm(self) -> _BatchNorm | None:
        return self.folded_norm[0] if self.folded_norm else None  # type: ignore[return-value]

    def fold(self, norm: nn.Module, name: str) -> None:
        """Take `norm`, whose qualified name in the model is `name`, into the quantized weight."""
        self.folded_norm, self.folded_name = [norm], name

    def _scale_weight(self, scale: Tensor) -> Tensor:
        weight = self.get_weight("weight")
        axis, blocks = self.weight_axes(self)["weight"], self.channel_groups()
        if blocks == 1:
            shape = [1] * weight.dim()
            shape[axis] = -1
            return weight * scale.to(weight.dtype).view(shape)
        # grouped transposed convolution: [in, out / groups, ...], output channels in blocks
        split = weight.unflatten(0, (blocks, -1))
        factor = scale.to(weight.dtype).view(blocks, 1, -1, *[1] * (weight.dim() - 2))
        return (split * factor).flatten(0, 1)

    def effective_weight(self, name: str, exact: bool = False) -> Tensor:
        if self.norm is None:
            return self.get_weight(name)
        scale = norm_scale(self.norm)
        return self._scale_weight(scale if exact else torch.where(scale.abs() < TINY_SCALE, 1.0, scale))

    def unscale(self, out: Tensor) -> Tensor:
        """Undo the folded scale on the output and add the bias, in front of the BatchNorm."""
        assert self.norm is not None
        scale = norm_scale(self.norm)
        shape = [1] * out.dim()
        shape[self.output_axis] = -1
        out = out / torch.where(scale.abs() < TINY_SCALE, 1.0, scale).to(out.dtype).view(shape)
        bias: Any = self.bias
        return out if bias is None else out + bias.to(out.dtype).view(shape)

    def _fill(self, packed: PackedModule) -> None:
        if self.norm is None:
            packed.copy_float(self)
            return
        own: Any = self.bias
        bias = fold_bias(self.norm, own).to(self.get_weight("weight").dtype)
        packed.register_parameter("bias", nn.Parameter(bias))

    def _describe(self) -> dict[str, object]:
        return {**super()._describe(), "folded": self.folded_name if self.folded_norm else None}
