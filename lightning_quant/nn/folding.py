"""Modules that a BatchNorm can be folded into (Jacob et al. 2018, arXiv:1712.05877, section 3.2).

The folded weight is `weight * s` with `s = gamma / sqrt(running_var + eps)`. Training leaves the BatchNorm in place to learn. Where
each scale belongs to one output channel, quantizing the weight and multiplying its scale by |s| in the end is the same as
quantizing the folded weight. Else training quantizes `weight * s` and divides the output by `s` again. In eval both equal the
folded module that `to_packed` builds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.functional import from_sources
from lightning_quant.nn.fake import FakeModule
from lightning_quant.nn.packed import PackedModule
from lightning_quant.numerics import MIN_SCALE
from lightning_quant.sharding import whole

# a scale below this counts as 0: its channel is constant
TINY_SCALE = 1e-8


def norm_scale(norm: _BatchNorm) -> Tensor:
    """`gamma / sqrt(running_var + eps)` of a BatchNorm, float32 `[channels]`, no gradient.

    Without gradient because scaling the weight and unscaling the output cancel, but for rounding noise.
    """
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.detach().float() + norm.eps)
    return scale if norm.weight is None else scale * whole(norm.weight).detach().float()


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

    @property
    def commutes(self) -> bool:
        """Whether every scale belongs to one output channel: then quantizing and folding may change places.

        With `s` in the scale instead of the weight, a learned or frozen scale stays right while the statistics move.
        """
        spec = self.scheme.weight
        assert spec is not None
        return spec.granularity in ("channel", "group") and not spec.flat_groups and self.channel_groups() == 1

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A weight times a factor `[out channels]`."""
        axis, blocks = self.weight_axes(self)["weight"], self.channel_groups()
        if blocks == 1:
            shape = [1] * weight.dim()
            shape[axis] = -1
            return weight * scale.to(weight.dtype).view(shape)
        # grouped transposed convolution: [in, out / groups, ...], output channels in blocks
        split = weight.unflatten(0, (blocks, -1))
        factor = scale.to(weight.dtype).view(blocks, 1, -1, *[1] * (weight.dim() - 2))
        return (split * factor).flatten(0, 1)

    def _sign(self) -> Tensor | None:
        """The sign of `s`, which is that of gamma, [out channels]; a negative one flips the weight, as scales are positive.

        None: nothing is flipped, as far as that can be told without waiting for a device.
        """
        assert self.norm is not None
        if self.norm.weight is None:
            return None
        negative = whole(self.norm.weight).detach() < 0
        if negative.device.type == "cpu" and not torch.compiler.is_compiling() and not negative.any():
            return None
        return torch.where(negative, -1.0, 1.0)

    def _flipped(self, weight: Tensor) -> Tensor:
        """The weight, with the channels whose `s` is negative flipped."""
        sign = self._sign()
        return weight if sign is None else self._scaled(weight, sign)

    def effective_weight(self, name: str, exact: bool = False) -> Tensor:
        weight = self.transformed_weight(name)
        if self.norm is None:
            return weight
        if self.commutes:
            return self._flipped(weight)
        return self._scaled(weight, norm_scale(self.norm) if exact else self._usable_scale())

    def latent_weight(self, name: str, effective: Tensor) -> Tensor:
        if self.norm is None:
            return effective
        return self._flipped(effective) if self.commutes else self._scaled(effective, 1.0 / self._usable_scale())

    def _usable_scale(self) -> Tensor:
        assert self.norm is not None
        scale = norm_scale(self.norm)
        return torch.where(scale.abs() < TINY_SCALE, 1.0, scale)

    def packed_scale(self, name: str, scale: Tensor) -> Tensor:
        if self.norm is None or not self.commutes:
            return scale
        return (scale * norm_scale(self.norm).abs()[:, None]).clamp(min=MIN_SCALE)

    def run(self, x: Tensor, compute: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The layer's output from `compute(weight, bias)`, in front of the BatchNorm if it has one.

        Args:
            x: the quantized input that `compute` takes, whose source is saved for the backward pass instead of it.
        """
        bias: Any = self.bias
        weight = self.fake_weight()
        if self.norm is None:
            return self.fake_output(from_sources(lambda: compute(weight, bias), x, weight))
        if self.commutes:
            weight = self._flipped(weight)
            return from_sources(lambda: compute(weight, bias), x, weight)
        return self._unscale(from_sources(lambda: compute(weight, None), x, weight), bias)

    def _unscale(self, out: Tensor, bias: Tensor | None) -> Tensor:
        """Undo the folded scale on the output and add the bias."""
        shape = [1] * out.dim()
        shape[self.output_axis] = -1
        out = out / self._usable_scale().to(out.dtype).view(shape)
        return out if bias is None else out + bias.to(out.dtype).view(shape)

    def _fill(self, packed: PackedModule) -> None:
        if self.norm is None:
            packed.copy_float(self)
            return
        own: Any = self.bias
        bias = fold_bias(self.norm, own).to(self.get_weight("weight").dtype)
        packed.register_parameter("bias", nn.Parameter(bias))

    def _restore(self, found: dict[str, Any]) -> None:
        mine = self.folded_name if self.folded_norm else None
        if found.get("folded") != mine:
            raise ValueError(
                f"{self.setup.name}: the checkpoint was made with the BatchNorm {found.get('folded')!r} folded into it, here it is "
                f"{mine!r}. Set example_input_array or Recipe(fold=[...]), so that the same pairs are found"
            )
        super()._restore(found)

    def _describe(self) -> dict[str, object]:
        return {**super()._describe(), "folded": self.folded_name if self.folded_norm else None}
