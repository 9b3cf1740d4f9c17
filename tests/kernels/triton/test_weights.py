from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_quant.kernels import reference
from lightning_quant.kernels.triton.configs import pick
from lightning_quant.packing import pack, packed_words
from lightning_quant.spec import QuantSpec
from tests.helpers import assert_close, spec_id
from tests.kernels.triton import only_interpreted
from tests.kernels.triton.cases import FEW, SPECS, TOLERANCE, packed_weight

only_interpreted()
from lightning_quant.kernels.triton import weights  # noqa: E402

by_spec = pytest.mark.parametrize("spec", SPECS, ids=spec_id)
by_few = pytest.mark.parametrize("spec", FEW, ids=spec_id)


def check(spec: QuantSpec, x: Tensor, channels: int) -> None:
    """The product and its gradients, against the reference in float64."""
    columns = x.shape[-1]
    weight, bias = packed_weight(spec, channels, columns), torch.randn(channels).requires_grad_()
    x = x.detach().requires_grad_()
    matrix = reference.dequantize_weight(*weight, (channels, columns), 0, spec).to(x.dtype).double()
    want = torch.nn.functional.linear(x.double(), matrix, bias.double())
    got = weights.WeightOnlyLinear.apply(x, *weight, bias, columns, spec)
    assert got.dtype == x.dtype
    assert_close(got, want, TOLERANCE[x.dtype])
    direction = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, bias), direction)
    assert_close(grads, torch.autograd.grad(want, (x, bias), direction.double()), TOLERANCE[x.dtype])


@by_spec
def test_product_and_gradients(spec):
    check(spec, torch.randn(3, 150), 37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_few
def test_narrow_dtypes(spec, dtype):
    check(spec, torch.randn(3, 150).to(dtype), 37)


@by_few
def test_many_rows(spec):
    check(spec, torch.randn(65, 77).half(), 9)


@pytest.mark.parametrize("spec", FEW[1:4], ids=spec_id)
@pytest.mark.parametrize("rows", [1, 16, 17, 65, 300])
def test_numbers_of_rows(spec, rows):
    check(spec, torch.randn(rows, 97), 5)


@by_few
def test_a_weight_that_is_decoded_once(spec, monkeypatch):
    monkeypatch.setattr(weights, "FUSED_ROWS", 4)
    monkeypatch.setattr(weights, "pick", lambda kernel, *args, **more: {"dequantize": pick}[kernel](kernel, *args, **more))
    check(spec, torch.randn(2, 3, 97).half(), 5)


@by_few
def test_no_rows(spec):
    weight, x = packed_weight(spec, 5, 64), torch.empty(2, 0, 64).requires_grad_()
    out = weights.WeightOnlyLinear.apply(x, *weight, None, 64, spec)
    assert out.shape == (2, 0, 5)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@by_few
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (1, 64)], ids=str)
def test_leading_dimensions(spec, shape):
    check(spec, torch.randn(shape), 7)


@by_few
def test_inputs_that_are_not_contiguous(spec):
    check(spec, torch.randn(96, 5).t(), 7)
    check(spec, torch.randn(5, 4, 100)[:, ::2, 3:99], 7)
    check(spec, torch.randn(1, 96).expand(4, 96), 7)


@by_few
def test_an_output_gradient_that_is_not_contiguous(spec):
    weight, x = packed_weight(spec, 8, 64), torch.randn(3, 64).requires_grad_()
    out = weights.WeightOnlyLinear.apply(x, *weight, None, 64, spec)
    matrix = reference.dequantize_weight(*weight, (8, 64), 0, spec)
    assert_close(torch.autograd.grad(out.sum(), x)[0], torch.ones(3, 8) @ matrix)


def test_few_rows_are_split_and_repeat_to_the_bit():
    spec = QuantSpec(4, granularity="group", group_size=128)
    assert pick("weights", 4, 1000, 128).split_k > 1
    weight, x = packed_weight(spec, 70, 1000), torch.randn(4, 1000).half()
    check(spec, x, 70)
    first, second = (weights.linear_forward(x, *weight, None, 1000, spec) for _ in range(2))
    assert torch.equal(first, second)
    alone = weights.linear_forward(x[:1], *weight, None, 1000, spec)
    assert torch.equal(alone, first[:1])


@by_spec
def test_weights_are_those_of_the_reference_to_the_bit(spec):
    for shape, axis, dtype in (((37, 150), 0, torch.float32), ((5, 3, 7), 1, torch.float16), ((4, 64), 0, torch.bfloat16)):
        channels = shape[axis]
        weight = packed_weight(spec, channels, torch.Size(shape).numel() // channels)
        args = (*weight, shape, axis, spec, dtype)
        assert torch.equal(weights.dequantize_weight(*args), reference.dequantize_weight(*args))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_every_byte_of_a_float8(kind):
    spec, codes = QuantSpec(8, kind), torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind))[None]
    args = (pack(codes, spec), torch.tensor([[0.5]]), None, (1, 256), 0, spec)
    torch.testing.assert_close(weights.dequantize_weight(*args), reference.dequantize_weight(*args), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_code_of_a_codebook(kind):
    spec = QuantSpec(4, kind, granularity="group", group_size=16)
    words = torch.arange(256, dtype=torch.uint8).view(torch.int32).reshape(8, -1)  # every pair of codes, as bytes
    assert words.shape[1] == packed_words(64, 4)
    args = (words, torch.rand(32) + 0.5, None, (8, 64), 0, spec)
    assert torch.equal(weights.dequantize_weight(*args), reference.dequantize_weight(*args))
