"""Scales in 8 bits: against bitsandbytes, and through a packed module's life."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_quant as lq
from lightning_quant.double_quant import BLOCK, dequantize_scale, dynamic_values, quantize_scale, scale_shapes
from tests.helpers import assert_close

DOUBLE = lq.Recipe("nf4", double_quant=True)


@pytest.fixture
def functional():
    return pytest.importorskip("bitsandbytes.functional")


def test_the_dynamic_format_is_that_of_bitsandbytes(functional):
    assert torch.equal(torch.tensor(dynamic_values()), functional.create_dynamic_map(signed=True))


@pytest.mark.parametrize("blocks", [7, 256, 1000, 5000])
def test_scales_are_stored_as_bitsandbytes_does(functional, blocks):
    weight = torch.randn(blocks, 64)
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    scale = weight.abs().amax(1)
    codes, absmax, offset = quantize_scale(scale)
    assert torch.equal(absmax, state.state2.absmax)
    assert torch.equal(offset[0], state.offset)
    # its code for CPUs does not always take the nearest value; what it takes instead is the next one
    differing = (codes != state.absmax).nonzero().flatten()
    assert len(differing) <= max(1, blocks // 100)
    assert ((codes.int() - state.absmax.int()).abs() <= 1).all()
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(dequantize_scale(state.absmax, absmax, offset), theirs)
    assert (dequantize_scale(codes, absmax, offset) - scale).abs().sum() <= (theirs - scale).abs().sum()


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_shapes_and_errors(count):
    scale = torch.rand(count) + 0.5
    parts = quantize_scale(scale)
    assert tuple(tuple(part.shape) for part in parts) == scale_shapes(count)
    bound = scale.sub(scale.mean()).abs().max() * 0.02 + 1e-6
    assert (dequantize_scale(*parts) - scale).abs().max() <= bound


def test_equal_scales_are_exact():
    scale = torch.full((300,), 0.37)
    assert torch.allclose(dequantize_scale(*quantize_scale(scale)), scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
def test_a_packed_layer_takes_at_most_half_a_byte_and_a_little(dtype):
    net = nn.Sequential(nn.Linear(512, 512, bias=False))
    spec = lq.QuantSpec(4, dtype, granularity="group", group_size=64, double_quant=True)
    packed = lq.quantize(net, lq.Recipe(lq.QuantScheme(spec)))
    summary = lq.summary(packed)
    row = next(iter(summary.rows))
    assert row.bytes_after / (512 * 512) <= 0.53
    assert "double-quantized" in str(summary)


def test_codes_are_those_of_single_quantization():
    net = nn.Sequential(nn.Linear(128, 64))
    single, double = (lq.quantize(net, recipe)[0] for recipe in ("nf4", DOUBLE))
    assert torch.equal(single.weight_packed, double.weight_packed)
    assert not torch.equal(single.dequantized_weight(), double.dequantized_weight())
    assert_close(double.dequantized_weight(), single.dequantized_weight(), 0.02)


def test_what_is_trained_is_what_is_packed():
    net, x = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(5, 192)
    prepared = lq.prepare(copy.deepcopy(net), DOUBLE)
    for module in prepared.modules():
        if hasattr(module, "quantizing"):
            module.quantizing = True
    assert_close(lq.convert(prepared)(x), prepared.eval()(x))


def test_saved_loaded_and_cast(tmp_path):
    net, x = nn.Sequential(nn.Linear(192, 64)), torch.randn(5, 192)
    packed = lq.quantize(net, DOUBLE)
    lq.save_quantized(packed, tmp_path)
    again = lq.load_quantized(nn.Sequential(nn.Linear(192, 64)), tmp_path)
    assert torch.equal(again(x), packed(x))
    weight = packed[0].dequantized_weight()
    assert torch.equal(packed.to(torch.bfloat16)[0].dequantized_weight(), weight)
    assert sorted(name for name, _ in packed[0].named_parameters()) == [
        *("bias", "weight_packed", "weight_scale_absmax", "weight_scale_offset", "weight_scale_packed", "weight_shape")
    ]


def test_only_nf4_and_fp4_in_groups():
    with pytest.raises(ValueError, match="double_quant=True: for nf4 and fp4 in groups, not for int4 group64"):
        lq.QuantSpec(4, granularity="group", group_size=64, double_quant=True)
    with pytest.raises(ValueError, match="double_quant"):
        lq.Recipe("w4a16", double_quant=True)
    assert lq.Recipe.from_dict(DOUBLE.to_dict()) == DOUBLE
    spec = DOUBLE.scheme.weight
    assert lq.QuantSpec.decode(spec.encode()) == spec
    assert BLOCK == 256
