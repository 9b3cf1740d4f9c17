"""Encoder layers have a fused inference path that reads their children's weights: none of it may run on quantized ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.nn.base import QuantizedModule
from lightning_quant.surgery import convert, prepare
from tests.helpers import assert_close, assert_same, calibrate, leaves, quantizers

WIDTH, HEADS = 12, 4  # even, or encoders use no nested tensors
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
OPTIONS = {"dropout": 0.0, "batch_first": True, "dim_feedforward": 17}


def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **{**OPTIONS, **options})


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, **{**OPTIONS, **options})


Built = tuple[nn.Module, Callable[[nn.Module], Any]]

MODELS: dict[str, Callable[[], Built]] = {
    "mha": lambda: (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), lambda m: m(x(), x(), x())),
    "mha-no-weights": lambda: (nn.MultiheadAttention(WIDTH, HEADS), lambda m: m(x(), x(), x(), need_weights=False)),
    "mha-masked": lambda: (
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda m: m(x(), x(), x(), key_padding_mask=PADDING, need_weights=False, attn_mask=CAUSAL.bool()),
    ),
    "layer-relu": lambda: (encoder_layer(), lambda m: m(x())),
    "layer-gelu": lambda: (encoder_layer(activation="gelu"), lambda m: m(x())),
    "layer-gelu-function": lambda: (encoder_layer(activation=F.gelu), lambda m: m(x())),
    "layer-norm-first": lambda: (encoder_layer(norm_first=True), lambda m: m(x(), src_mask=CAUSAL, is_causal=True)),
    "layer-masked": lambda: (encoder_layer(), lambda m: m(x(), src_mask=CAUSAL)),
    "layer-padded": lambda: (encoder_layer(), lambda m: m(x(), src_key_padding_mask=PADDING)),
    "layer-time-first": lambda: (encoder_layer(batch_first=False), lambda m: m(x())),
    "layer-no-bias": lambda: (encoder_layer(bias=False), lambda m: m(x())),
    "encoder": lambda: (nn.TransformerEncoder(encoder_layer(), 2), lambda m: m(x())),
    "encoder-padded": lambda: (
        nn.TransformerEncoder(encoder_layer(activation="gelu"), 2),
        lambda m: m(x(), src_key_padding_mask=PADDING),
    ),
    "encoder-norm-first": lambda: (
        nn.TransformerEncoder(encoder_layer(norm_first=True), 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False),
        lambda m: m(x(), mask=CAUSAL, is_causal=True),
    ),
    "decoder-layer": lambda: (decoder_layer(), lambda m: m(x(), x().flip(0))),
    "decoder-layer-masked": lambda: (
        decoder_layer(norm_first=True, activation="gelu"),
        lambda m: m(x(), x().flip(0), tgt_mask=CAUSAL, memory_key_padding_mask=PADDING, tgt_is_causal=True),
    ),
    "transformer": lambda: (
        nn.Transformer(WIDTH, HEADS, 1, 1, 17, dropout=0.0, batch_first=True),
        lambda m: m(x(), x().flip(0), tgt_mask=CAUSAL),
    ),
}


def in_every_mode(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[Any]:
    outputs = []
    for training in (True, False):
        model.train(training)
        outputs.append(call(model))
        with torch.no_grad():
            outputs.append(call(model))
        with torch.inference_mode():
            outputs.append(call(model))
    return outputs


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8", "w8a8-dynamic", "w4a4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_mode_runs_quantized(name, recipe):
    model, call = MODELS[name]()
    float_output = call(model.eval())
    prepare(model, recipe, training=True)
    for output in in_every_mode(model, call):
        assert_close(output, float_output, 2e-6)

    calibrate(model, lambda: call(model))
    # softmax hides what rounding noise does to one code; a bypass would give the float output to 1e-6
    outputs = in_every_mode(model, call)
    assert not torch.allclose(leaves(outputs[0])[0], leaves(float_output)[0], atol=1e-4)
    packed = convert(model)
    for output in outputs[1:] + in_every_mode(packed.eval(), call):
        assert_close(output, outputs[0], 2e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "layer" in name or "coder" in name or name == "transformer"])
def test_every_linear_layer_is_quantized(name):
    model, call = MODELS[name]()
    prepare(model, "w8a8", training=True)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            assert isinstance(module, QuantizedModule)
    calibrate(model, lambda: call(model))
    assert all(quantizer.has_range for quantizer in quantizers(model))


@pytest.mark.parametrize("name", ["layer-relu", "encoder", "decoder-layer"])
def test_gradients_reach_every_parameter(name):
    model, call = MODELS[name]()
    prepare(model, "w8a8", training=True)
    calibrate(model, lambda: call(model))
    (leaves(call(model.train()))[0] * torch.linspace(-1, 1, x().numel()).view(2, 5, WIDTH)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_a_float_layer_beside_quantized_ones_keeps_its_fast_path():
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    fast = encoder.layers[0].activation_relu_or_gelu
    prepare(encoder, {"scheme": "w8a16", "ignore": ["layers.0", "layers.0.*"]}, training=True)
    assert encoder.layers[0].activation_relu_or_gelu == fast != 0
    assert encoder.layers[1].activation_relu_or_gelu == 0


def test_copies_run_quantized_too():
    model, call = MODELS["encoder"]()
    prepare(model, "w4a16", training=True)
    calibrate(model, lambda: call(model))
    for module in (model, convert(model)):
        other = copy.deepcopy(module).eval()
        with torch.inference_mode():
            assert_same(call(other), call(module.eval()))
