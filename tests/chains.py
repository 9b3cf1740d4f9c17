"""Tiny models whose blocks are called in all the ways that models call them, with calibration batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def tokens(*lengths: int, rows: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 30, (rows, length), generator=generator) for length in lengths or (12, 12, 12)]


def ids(*lengths: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch} for batch in tokens(*lengths)]


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 16, generator=generator) for _ in range(3)]


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 16, 16, generator=generator) for _ in range(3)]


# --- transformers ---------------------------------------------------------------------------------------------------


def llama(blocks: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=blocks, num_key_value_heads=1, **TINY))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=32, n_embd=16, n_layer=3, n_head=2))


def gemma() -> nn.Module:
    """Layers of local and of global attention get masks and rotary embeddings of their own."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    options = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=30, num_hidden_layers=3, **options, **TINY))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=30, num_hidden_layers=2, max_position_embeddings=32, **TINY))


def padded() -> list[dict[str, Tensor]]:
    """Each batch has a mask of its own."""
    batches = ids(12, 9, 12)
    for index, batch in enumerate(batches):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 4 + index :] = 0
    return batches


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_hidden_layers=2, image_size=16, patch_size=8, **TINY))


def t5() -> nn.Module:
    """The first block of each stack makes the position bias of all; decoder blocks read the encoder's output."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=30, decoder_start_token_id=0, **sizes))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in SIZES.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=30, d_model=16, max_position_embeddings=32, **sizes))


SIZES = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}


def pairs() -> list[dict[str, Tensor]]:
    return [{"input_ids": one, "labels": two} for one, two in zip(tokens(12, 8, 12), tokens(6, 6, 5))]


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=30, num_hidden_layers=2, **options, **TINY))


# --- plain modules --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block; what subclasses change is how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.down(self.up(self.norm(x)).relu()))


class Keyword(Block):
    def forward(self, scale: float = 1.0, *, mask: Tensor | None = None, hidden: Tensor) -> tuple[str, Tensor]:  # type: ignore[override]
        return "extra", super().forward(hidden) * scale * (1 if mask is None else mask)


class Twice(Block):
    """Takes its input in two places, as attention's query and key."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:  # type: ignore[override]
        return query + self.down(self.up(self.norm(key)).relu())


class TwoStreams(Block):
    """Hands on two tensors that both depend on the input."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x + self.down(self.up(self.norm(y)).relu()), y + x.tanh()


class Loop(nn.Module):
    """Calls blocks one after the other.

    Args:
        call: how one of them is called.
    """

    def __init__(self, make: Callable[[], nn.Module], call: Callable[[nn.Module, Any], Any], count: int = 3) -> None:
        super().__init__()
        self.stem, self.head, self.call = nn.Linear(16, 16), nn.Linear(16, 4), call
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x if isinstance(x, Tensor) else x[0])


class Shared(Loop):
    """The first block runs twice."""

    def __init__(self) -> None:
        super().__init__(Block, lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.head(x)


class Streams(Loop):
    def forward(self, x: Tensor) -> Tensor:
        x = y = self.stem(x)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(x)


class Siamese(Loop):
    """Blocks pass twice in a batch, with two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(-x)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, again: bool) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * 2 if again else x


class Nested(nn.Module):
    """Stages of blocks: something happens between the stages, so they are no chain, and the blocks in each are one."""

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.between = nn.ModuleList([Stage(), Stage()]), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages[1](self.between(self.stages[0](x, True)), False)


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class ResNet(nn.Module):
    """Several `Sequential`s of blocks, with layers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1 = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(ConvBlock(), ConvBlock())
        self.shrink, self.layer2 = nn.Conv2d(8, 8, 3, stride=2), nn.Sequential(ConvBlock(), ConvBlock(), ConvBlock())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.shrink(self.layer1(self.stem(x)))).mean((2, 3)))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": llama()})

    def forward(self, batch: Tensor) -> Any:
        return self.inner["net"](input_ids=batch)


class Encoder(nn.Module):
    """torch's own layers, whose attention is a quantized module that holds another one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


class Lit(L.LightningModule):
    """Its step calls a submodule: the LightningModule itself is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Loop(Block, lambda block, x: block(x))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.cat(features()), 4, shuffle=True)


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


# name -> (model, batches, the number of blocks in each chain that is found)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], list[int]]] = {
    "llama": (llama, ids, [3]),
    "lengths": (llama, lambda: ids(12, 7, 3), [3]),
    "gpt2": (gpt2, ids, [3]),
    "gemma": (gemma, lambda: ids(12, 9), [3]),
    "bert": (bert, padded, [2]),
    "vit": (vit, lambda: [{"pixel_values": batch} for batch in images()], [2]),
    "t5": (t5, pairs, [3, 3]),
    "bart": (bart, pairs, [2, 2]),
    "mixtral": (mixtral, ids, [2]),
    "wrapper": (Wrapper, tokens, [3]),
    "encoder": (Encoder, tokens, [3]),
    "resnet": (ResNet, images, [2, 3]),
    "nested": (Nested, features, [2, 2]),
    "in place": (lambda: Loop(InPlace, plain), features, [3]),
    "keyword": (lambda: Loop(Keyword, lambda block, x: block(hidden=x)[1]), features, [3]),
    "twice": (lambda: Loop(Twice, lambda block, x: block(x, x)), features, [3]),
    "two streams": (lambda: Streams(TwoStreams, plain), features, []),
    "shared": (Shared, features, []),
    "siamese": (lambda: Siamese(Block, plain), features, []),
    "sequential": (lambda: nn.Sequential(*(Block() for _ in range(3))), features, [3]),
}


def make(name: str) -> tuple[nn.Module, list[Any]]:
    """A model of `MODELS` in eval mode, the same each time, and its batches."""
    torch.manual_seed(0)
    return MODELS[name][0]().eval(), MODELS[name][1]()
