"""`nn.MultiheadAttention`, and what keeps `nn.TransformerEncoderLayer` from bypassing quantized children."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.functional import from_sources
from lightning_quant.nn.base import QuantizedModule
from lightning_quant.nn.fake import FakeModule
from lightning_quant.nn.linear import PackedLinear
from lightning_quant.nn.packed import PackedModule
from lightning_quant.spec import QuantScheme

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def disable_fast_path(model: nn.Module) -> None:
    """Keep encoder layers that hold quantized modules off torch's fused inference path.

    In eval without gradients that path reads `linear1.weight` and calls no child: a QAT model would silently run in float.
    """
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            if not any(isinstance(child, QuantizedModule) for child in module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # only the fast path reads it: 0 is neither


def _float_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


class _Attention(nn.MultiheadAttention):
    """The forward pass, written over `project`: scaled dot-product attention as `F.multi_head_attention_forward` computes it."""

    def project(self, name: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _merged_mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """A float mask that broadcasts to `[batch, heads, queries, keys]`."""
        attn_mask, padding = _float_mask(attn_mask, q), _float_mask(key_padding_mask, q)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return attn_mask
        padding = padding[:, None, None, :]
        return padding if attn_mask is None else attn_mask + padding

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask, too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        q, k, v = (self.project(name, x) for name, x in zip(_PROJECTIONS, (query, key, value), strict=True))
        mask = self._merged_mask(attn_mask, key_padding_mask, q)
        batch, keys = k.shape[:2]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(batch, 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[1] - keys))

        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * math.sqrt(1.0 / self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights


class PackedMultiheadAttention(_Attention, PackedModule):
    """Multi-head attention whose projections are packed linear layers: `q_proj`, `k_proj`, `v_proj`, `out_proj`."""

    input_names = ()
    optional_float = ("bias_k", "bias_v")

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return {}

    @classmethod
    def empty(cls, module: nn.Module, scheme: QuantScheme, device: torch.device | str | None = None) -> Any:
        packed = super().empty(module, scheme, device)
        # its own in-projection lives in the children; None also tells TransformerEncoderLayer to call forward
        packed.register_parameter("in_proj_bias", None)
        reference = next(iter(module.parameters()))
        assert isinstance(module, nn.MultiheadAttention)
        sizes = {"q_proj": module.embed_dim, "k_proj": module.kdim, "v_proj": module.vdim}
        for name in _PROJECTIONS:
            like = nn.Linear(sizes[name], module.embed_dim, module.in_proj_bias is not None, "meta", reference.dtype)
            part = PackedLinear.empty(like, replace(scheme, output=None), device or reference.device)
            packed.add_module(name, part)
        packed.out_proj = module.out_proj
        return packed

    def project(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x)


class FakeMultiheadAttention(_Attention, FakeModule):
    """`nn.MultiheadAttention` with quantizers on each third of its in-projection; `out_proj` is a quantized layer of its own."""

    packed_type = PackedMultiheadAttention
    input_names = _PROJECTIONS

    @classmethod
    def weight_axes(cls, module: nn.Module) -> dict[str, int]:
        return {f"{name}_weight": 0 for name in _PROJECTIONS}

    @classmethod
    def adapt(cls, module: nn.Module, scheme: QuantScheme) -> tuple[QuantScheme, str]:
        return replace(scheme, output=None), "output: quantized by out_proj" if scheme.output else ""

    def get_weight(self, name: str) -> Tensor:
        if self._qkv_same_embed_dim:
            return self.in_proj_weight.chunk(3)[_PROJECTIONS.index(name.removesuffix("_weight"))]
        return super().get_weight(name)

    def _bias(self, name: str) -> Tensor | None:
        return None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[_PROJECTIONS.index(name)]

    def project(self, name: str, x: Tensor) -> Tensor:
        quantized, weight = self.fake_input(x, name), self.fake_weight(f"{name}_weight")
        return from_sources(lambda: F.linear(quantized, weight, self._bias(name)), quantized, weight)

    def to_packed(self, built: dict[int, nn.Module] | None = None) -> PackedMultiheadAttention:
        packed = self.packed_type.empty(self, self.scheme)
        with torch.no_grad():
            packed.copy_float(self)
            for name in _PROJECTIONS:
                part, bias = getattr(packed, name), self._bias(name)
                part.put_weight("weight", *self.weight_on_grid(f"{name}_weight"), 0)
                activation = getattr(self, f"{name}_fake_quant")
                if activation is not None and not activation.spec.dynamic:
                    part.put_activation("input", *activation.qparams())
                if bias is not None:
                    part.bias.copy_(bias)
        packed.out_proj = (built or {}).get(id(self.out_proj)) or copy.deepcopy(self.out_proj)
        return packed
