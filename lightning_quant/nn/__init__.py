"""Quantized modules, and the table that says which float module becomes which."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import nn

from lightning_quant.nn import attention, conv, embedding, linear, rnn
from lightning_quant.nn.base import Unsupported
from lightning_quant.nn.fake import FakeModule, fake_subclass
from lightning_quant.nn.packed import PackedModule


@dataclass(frozen=True)
class Entry:
    """A float module's quantized classes.

    Args:
        fake: with quantizers, for training and calibration.
        packed: with packed integers.
        by_default: whether a recipe's default scheme applies; else only a pattern that names the module.
    """

    fake: type[FakeModule]
    packed: type[PackedModule]
    by_default: bool = True


QMODULES: dict[type[nn.Module], Entry] = {
    nn.Linear: Entry(linear.FakeLinear, linear.PackedLinear),
    nn.Conv1d: Entry(conv.FakeConv1d, conv.PackedConv1d),
    nn.Conv2d: Entry(conv.FakeConv2d, conv.PackedConv2d),
    nn.Conv3d: Entry(conv.FakeConv3d, conv.PackedConv3d),
    nn.ConvTranspose1d: Entry(conv.FakeConvTranspose1d, conv.PackedConvTranspose1d),
    nn.ConvTranspose2d: Entry(conv.FakeConvTranspose2d, conv.PackedConvTranspose2d),
    nn.ConvTranspose3d: Entry(conv.FakeConvTranspose3d, conv.PackedConvTranspose3d),
    nn.Embedding: Entry(embedding.FakeEmbedding, embedding.PackedEmbedding, by_default=False),
    nn.EmbeddingBag: Entry(embedding.FakeEmbeddingBag, embedding.PackedEmbeddingBag, by_default=False),
    nn.LSTM: Entry(rnn.FakeLSTM, rnn.PackedLSTM),
    nn.GRU: Entry(rnn.FakeGRU, rnn.PackedGRU),
    nn.MultiheadAttention: Entry(attention.FakeMultiheadAttention, attention.PackedMultiheadAttention),
}

# float modules of optional packages: qualified name -> (module here, fake class, packed class); imported when one is met
OPTIONAL: dict[str, tuple[str, str, str]] = {
    "transformers.pytorch_utils.Conv1D": ("lightning_quant.nn.transformers_conv1d", "FakeConv1D", "PackedConv1D"),
}


def lookup(cls: type[nn.Module]) -> tuple[type[nn.Module], Entry] | None:
    """The float type in the table that `cls` is or extends, and its entry; None if there is none."""
    for base in cls.__mro__:
        if base in QMODULES:
            return base, QMODULES[base]
        name = f"{base.__module__}.{base.__qualname__}"
        if name in OPTIONAL:
            module, fake, packed = OPTIONAL[name]
            found = importlib.import_module(module)
            QMODULES[base] = Entry(getattr(found, fake), getattr(found, packed))
            return base, QMODULES[base]
    return None


def find_entry(module: nn.Module) -> Entry:
    """The entry of a module's type. Raises `Unsupported` if it has none, or overrides `forward`."""
    found = lookup(type(module))
    if found is None:
        raise Unsupported(f"no quantized {type(module).__name__}")
    base, entry = found
    for method in ("forward", "_conv_forward", "_output_padding"):
        if getattr(type(module), method, None) is not getattr(base, method, None):
            told = "forward" if method == "forward" else f"{method} (part of the forward)"
            raise Unsupported(f"{type(module).__name__} overrides the {told} of {base.__name__}, which quantization would replace")
    for method in ("get_extra_state", "set_extra_state"):
        if getattr(type(module), method) is not getattr(base, method):
            raise Unsupported(f"{type(module).__name__} has an extra state of its own, where a quantized module keeps its scheme")
    return entry


def make_fake(module: nn.Module, entry: Entry) -> FakeModule:
    """Change the module's class in place: a user's subclass stays a base of the new class."""
    float_type = next(base for base, value in QMODULES.items() if value is entry)
    user_type = type(module)
    module.__class__ = entry.fake if user_type is float_type else fake_subclass(entry.fake, user_type)  # type: ignore[arg-type]
    assert isinstance(module, FakeModule)
    return module


__all__ = ["QMODULES", "Entry", "FakeModule", "PackedModule", "Unsupported", "find_entry", "lookup", "make_fake"]
