"""Small float modules of every quantizable type, with inputs: odd sizes, every option that changes a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

CONV1D = "Conv1D"  # transformers', by name: the package is optional


@dataclass(frozen=True)
class Case:
    kind: type[nn.Module] | str
    label: str
    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.kind if isinstance(self.kind, str) else self.kind.__name__}-{self.label}"


def simple(
    kind: type[nn.Module], label: str, build: tuple[Any, ...], shape: tuple[int, ...], call: Any = None, **options: Any
) -> Case:
    return Case(kind, label, lambda: kind(*build, **options), lambda: (torch.randn(shape),), call or {})


def make_conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(11, 150)


def indices(*shape: int) -> torch.Tensor:
    return torch.randint(0, 23, shape)


def bag(label: str, args: Callable[[], tuple[Any, ...]], kwargs: dict[str, Any] | None = None, **options: Any) -> Case:
    return Case(nn.EmbeddingBag, label, lambda: nn.EmbeddingBag(23, 70, **options), args, kwargs or {})


def sequences() -> PackedSequence:
    return pack_sequence([torch.randn(length, 70) for length in (3, 5, 2)], enforce_sorted=False)


def recurrent(kind: type[nn.Module]) -> list[Case]:
    def case(label: str, args: Callable[[], tuple[Any, ...]], **options: Any) -> Case:
        return Case(kind, label, lambda: kind(70, 9, **options), args)

    def state(*shape: int, width: int = 9) -> Any:
        hidden = torch.randn(*shape, width)
        return (hidden, torch.randn(*shape, 9)) if kind is nn.LSTM else hidden

    cases = [
        case("plain", lambda: (torch.randn(4, 3, 70),)),
        case("no-bias", lambda: (torch.randn(4, 3, 70),), bias=False),
        case("deep", lambda: (torch.randn(3, 4, 70), state(4, 3)), batch_first=True, bidirectional=True, num_layers=2),
        case("packed", lambda: (sequences(),), bidirectional=True),
        case("packed-state", lambda: (sequences(), state(2, 3)), num_layers=2),
        case("unbatched", lambda: (torch.randn(4, 70), state(2))[:2], bidirectional=True),
        case("unbatched-first", lambda: (torch.randn(4, 70),), batch_first=True),
    ]
    if kind is nn.LSTM:
        deep = {"proj_size": 5, "bidirectional": True, "num_layers": 2}
        cases.append(case("projected", lambda: (torch.randn(4, 3, 70), state(4, 3, width=5)), **deep))
        cases.append(case("projected-packed", lambda: (sequences(),), proj_size=5))
    return cases


def attention(label: str, args: Callable[[], tuple[Any, ...]], kwargs: dict[str, Any] | None = None, **options: Any) -> Case:
    options = {"embed_dim": 12, "num_heads": 3, "batch_first": True, **options}
    return Case(nn.MultiheadAttention, label, lambda: nn.MultiheadAttention(**options), args, kwargs or {})


def qkv(queries: int = 5, keys: int = 7, kdim: int = 12, vdim: int = 12, batch: tuple[int, ...] = (2,)) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*batch, length, width) for length, width in ((queries, 12), (keys, kdim), (keys, vdim)))


def same() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 5, 12),) * 3


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
FLOAT_MASK = torch.linspace(-2, 1, 35).reshape(5, 7)
HEAD_MASK = (torch.arange(6 * 5 * 7) % 4 == 1).reshape(6, 5, 7)

CASES = [
    simple(nn.Linear, "2d", (150, 11), (5, 150)),
    simple(nn.Linear, "3d-no-bias", (150, 11, False), (2, 3, 150)),
    simple(nn.Linear, "1d", (150, 11), (150,)),
    simple(nn.Linear, "one", (1, 1), (3, 1)),
    Case(CONV1D, "3d", make_conv1d, lambda: (torch.randn(2, 3, 150),)),
    simple(nn.Conv1d, "plain", (6, 5, 3), (2, 6, 9)),
    simple(nn.Conv1d, "same-circular", (25, 6, 3), (2, 25, 9), padding="same", padding_mode="circular"),
    simple(nn.Conv1d, "unbatched", (6, 5, 3), (6, 9), padding=1),
    simple(nn.Conv2d, "plain", (17, 7, 3), (2, 17, 6, 5), padding=1),
    simple(nn.Conv2d, "groups", (6, 8, 3), (2, 6, 7, 5), groups=2, stride=2, dilation=(1, 2), padding=(1, 2), bias=False),
    simple(nn.Conv2d, "depthwise", (6, 6, 3), (2, 6, 7, 5), groups=6),
    simple(nn.Conv2d, "same", (6, 5, (3, 2)), (2, 6, 7, 5), padding="same"),
    simple(nn.Conv2d, "valid", (6, 5, 3), (2, 6, 7, 5), padding="valid"),
    simple(nn.Conv2d, "reflect", (6, 5, 3), (2, 6, 7, 5), padding=(2, 1), padding_mode="reflect"),
    simple(nn.Conv2d, "replicate", (6, 5, 3), (2, 6, 7, 5), padding=2, padding_mode="replicate"),
    simple(nn.Conv2d, "circular", (6, 5, 3), (2, 6, 7, 5), padding=1, padding_mode="circular", stride=2),
    simple(nn.Conv2d, "unbatched", (6, 5, 3), (6, 7, 5)),
    simple(nn.Conv3d, "plain", (6, 5, (1, 2, 3)), (2, 6, 3, 5, 4), padding=1),
    simple(nn.Conv3d, "groups", (6, 4, 2), (2, 6, 3, 5, 4), groups=2, padding="same"),
    simple(nn.ConvTranspose1d, "plain", (25, 5, 3), (2, 25, 6), stride=2),
    simple(nn.ConvTranspose1d, "output-size", (6, 5, 3), (2, 6, 6), {"output_size": [14]}, stride=2),
    simple(nn.ConvTranspose2d, "plain", (6, 5, 3), (2, 6, 4, 5), padding=1, dilation=2),
    simple(nn.ConvTranspose2d, "groups", (6, 8, 3), (2, 6, 4, 5), groups=2, stride=2, output_padding=(1, 0), bias=False),
    simple(nn.ConvTranspose2d, "output-size", (6, 4, 3), (2, 6, 4, 5), {"output_size": [10, 11]}, groups=2, stride=2),
    simple(nn.ConvTranspose2d, "unbatched", (6, 5, 3), (6, 4, 5)),
    simple(nn.ConvTranspose3d, "plain", (6, 4, 2), (1, 6, 3, 2, 3), stride=2),
    simple(nn.ConvTranspose3d, "output-size", (6, 4, 2), (1, 6, 3, 2, 3), {"output_size": [7, 4, 6]}, stride=2),
    Case(nn.Embedding, "2d", lambda: nn.Embedding(23, 70), lambda: (indices(3, 4),)),
    Case(nn.Embedding, "padding", lambda: nn.Embedding(23, 70, padding_idx=2), lambda: (torch.tensor([2, 0, 22]),)),
    Case(nn.Embedding, "scalar", lambda: nn.Embedding(23, 70), lambda: (torch.tensor(7),)),
    bag("sum", lambda: (indices(3, 4),), mode="sum"),
    bag("mean", lambda: (indices(3, 4),), mode="mean"),
    bag("max", lambda: (indices(3, 4),), mode="max"),
    bag("offsets", lambda: (indices(9), torch.tensor([0, 0, 4])), mode="mean"),
    bag("last-offset", lambda: (indices(9), torch.tensor([0, 3, 9])), mode="sum", include_last_offset=True),
    bag("weighted", lambda: (indices(3, 4), None, torch.rand(3, 4)), mode="sum"),
    bag("weighted-offsets", lambda: (indices(9).int(), torch.tensor([0, 5]).int(), torch.rand(9)), mode="sum"),
    *(
        bag(f"padding-{mode}", lambda: (torch.tensor([[3, 3, 1, 0], [3, 3, 3, 3], [5, 22, 3, 7]]),), mode=mode, padding_idx=3)
        for mode in ("sum", "mean", "max")
    ),
    bag("no-padding-met", lambda: (torch.tensor([[1, 5], [7, 8]]),), mode="mean", padding_idx=3),
    *recurrent(nn.LSTM),
    *recurrent(nn.GRU),
    attention("self", same),
    attention("cross", qkv),
    attention("no-weights", qkv, {"need_weights": False}),
    attention("each-head", qkv, {"average_attn_weights": False}),
    attention("time-first", lambda: tuple(x.transpose(0, 1) for x in qkv()), batch_first=False),
    attention("padding", qkv, {"key_padding_mask": PADDING}),
    attention("padding-no-weights", qkv, {"key_padding_mask": PADDING, "need_weights": False}),
    attention("causal", same, {"attn_mask": CAUSAL}),
    attention("causal-hint", same, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    attention("float-mask", qkv, {"attn_mask": FLOAT_MASK}),
    attention("head-mask", qkv, {"attn_mask": HEAD_MASK, "key_padding_mask": PADDING}),
    attention("dims", lambda: qkv(kdim=9, vdim=10), kdim=9, vdim=10),
    attention("dims-no-bias", lambda: qkv(kdim=9, vdim=10), {"need_weights": False}, kdim=9, vdim=10, bias=False),
    attention("bias-kv", qkv, {"key_padding_mask": PADDING, "attn_mask": FLOAT_MASK > 0.5}, add_bias_kv=True),
    attention("zero", qkv, {"key_padding_mask": PADDING}, add_zero_attn=True),
    attention("bias-kv-zero", qkv, {"need_weights": False}, add_bias_kv=True, add_zero_attn=True),
    attention("unbatched", lambda: qkv(batch=())),
    attention("unbatched-masked", lambda: qkv(batch=()), {"key_padding_mask": PADDING[1], "attn_mask": HEAD_MASK[:3]}),
]
FIRST = list({case.kind: case for case in reversed(CASES)}.values())[::-1]
BY_ID = {case.id: case for case in CASES}
