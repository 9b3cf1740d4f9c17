"""`nn.Embedding` and `nn.EmbeddingBag`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.kernels import embedding
from lightning_quant.nn.base import Unsupported, without_input
from lightning_quant.nn.fake import FakeModule
from lightning_quant.nn.packed import PackedModule
from lightning_quant.spec import QuantScheme


class _Table:
    """What both tables share."""

    input_names = ()
    optional_float = ()
    operator = "embedding"

    @classmethod
    def adapt(cls, module: nn.Module, scheme: QuantScheme) -> tuple[QuantScheme, str]:
        if module.max_norm is not None:
            raise Unsupported("max_norm rewrites the weight in every forward")
        if module.sparse:
            raise Unsupported("sparse gradients do not pass a fake-quantized weight; use sparse=False")
        return without_input(scheme)


class PackedEmbedding(_Table, PackedModule, nn.Embedding):
    """A table with packed rows: `[...]` indices -> `[..., embedding_dim]`."""

    def packed_shape(self, name: str) -> list[int]:
        return [self.num_embeddings, self.embedding_dim]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized table in the module's float dtype, computed on every access."""
        return self.dequantized_weight().to(self._float_dtype)

    def forward(self, input: Tensor) -> Tensor:
        rows = embedding(input, *self.packed_weight(), self.embedding_dim, self.spec_args[0])
        return self.quantize_output(rows.to(self._float_dtype))


class FakeEmbedding(_Table, FakeModule, nn.Embedding):
    """`nn.Embedding` with a quantizer on its table."""

    packed_type = PackedEmbedding

    def forward(self, input: Tensor) -> Tensor:
        out = F.embedding(input, self.fake_weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return self.fake_output(out)


class PackedEmbeddingBag(_Table, PackedModule, nn.EmbeddingBag):
    """Sums, means or maxima of packed rows."""

    packed_shape = PackedEmbedding.packed_shape
    weight = PackedEmbedding.weight

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        # only the rows that occur are dequantized, and the bag's indices point into them
        rows, index = torch.unique(input, return_inverse=True)
        padding = None
        if self.padding_idx is not None:
            rows = torch.cat([rows, rows.new_tensor([self.padding_idx])])
            padding = len(rows) - 1
            index = torch.where(input == self.padding_idx, padding, index)
        table = embedding(rows, *self.packed_weight(), self.embedding_dim, self.spec_args[0]).to(self._float_dtype)
        out = F.embedding_bag(
            index.to(input.dtype),
            table,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
        return self.quantize_output(out)


class FakeEmbeddingBag(_Table, FakeModule, nn.EmbeddingBag):
    """`nn.EmbeddingBag` with a quantizer on its table."""

    packed_type = PackedEmbeddingBag

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        out = F.embedding_bag(
            input,
            self.fake_weight(),
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        return self.fake_output(out)
