from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_quant.functional import dynamic_fake_quantize
from lightning_quant.numerics import calc_qparams, dynamic_qparams, quantize, quantize_rows
from lightning_quant.spec import QuantSpec
from tests.helpers import spec_id
from tests.kernels.triton import only_interpreted

only_interpreted()
from lightning_quant.kernels.triton.quantize import quantize_input  # noqa: E402

FORMATS = [(bits, signed, even) for bits in (2, 7, 8) for signed in (True, False) for even in (True, False)]
TOKENS = [QuantSpec(bits, "int", signed, even, "token", dynamic=True) for bits, signed, even in FORMATS]
TENSORS = [QuantSpec(bits, "int", signed, even, "tensor") for bits, signed, even in FORMATS]


def rows(columns: int = 70) -> Tensor:
    """Ordinary ones, ties, and what is at the ends of float32."""
    x = torch.randn(12, columns)
    x[1] = 0
    x[2] = 3.0
    x[3] = -x[3].abs()
    x[4, ::2] = 0
    x[5] *= 1e-39
    x[6] = x[6].clamp(-3, 3) * 1e38
    x[7] = torch.arange(columns) * 0.5 - 10
    x[7, 0] = 127.0
    x[8] = 1e-45
    return x


@pytest.mark.parametrize("spec", TOKENS, ids=spec_id)
def test_tokens_have_the_numbers_of_the_reference(spec):
    normal = [0, 1, 2, 3, 4, 6, 7]  # the interpreter reads bfloat16's subnormal numbers wrong
    for x in (rows(), rows()[normal].bfloat16(), rows(3000)[:4, :2500], torch.randn(70, 5).t()):
        scale, zero_point = dynamic_qparams(x, spec)
        codes, own_scale, own_zero = quantize_input(x, None, None, spec)
        assert torch.equal(own_scale, scale)
        assert torch.equal(own_zero, zero_point)
        want = quantize_rows(x, scale, zero_point, spec)
        assert codes.dtype == want.dtype
        assert torch.equal(codes, want)


@pytest.mark.parametrize("spec", TENSORS, ids=spec_id)
def test_a_given_grid(spec):
    x = rows().clamp(-1000, 1000)
    scale, zero_point = calc_qparams(torch.tensor([-1.0]), torch.tensor([2.0]), spec)
    codes, *_ = quantize_input(x, scale, zero_point, spec)
    assert torch.equal(codes, quantize(x, scale, zero_point, spec))
    shifted, _, offset = quantize_input(x, scale, zero_point, spec, shifted=True)
    assert shifted.dtype == torch.int8
    assert torch.equal(shifted.int() - offset, codes.int() - zero_point)


def test_a_tensors_own_range():
    spec, x = QuantSpec(8, symmetric=False, granularity="tensor", dynamic=True), torch.randn(3, 50)
    codes, scale, zero_point = quantize_input(x, None, None, spec)
    want = dynamic_qparams(x, spec)
    assert torch.equal(scale, want[0])
    assert torch.equal(codes, quantize(x, *want, spec))
    assert torch.equal(zero_point, want[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("even", [True, False])
def test_what_is_not_finite_stays_in_its_row(value, even, monkeypatch):
    spec, x = QuantSpec(8, symmetric=even, granularity="token", dynamic=True), torch.randn(3, 50)
    want = dynamic_fake_quantize(x, spec)
    x[1, 7] = value
    monkeypatch.setenv("LQ_BACKEND", "triton")
    out = dynamic_fake_quantize(x, spec)
    assert not torch.isfinite(out[1]).any()
    assert torch.equal(out[::2], want[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", TOKENS[-4:], ids=spec_id)
def test_fake_quantization_of_tokens(spec, dtype, monkeypatch):
    x = (torch.randn(2, 2, 3, 5) + 0.3).to(dtype).requires_grad_()
    for axis in (-1, -2, 1):
        monkeypatch.delenv("LQ_BACKEND", raising=False)
        want = dynamic_fake_quantize(x, spec, axis)
        monkeypatch.setenv("LQ_BACKEND", "triton")
        got = dynamic_fake_quantize(x, spec, axis)
        assert "TokenFakeQuantize" in names(got)
        assert got.dtype == dtype
        assert torch.equal(got, want)
        direction = torch.randn_like(got)
        assert torch.equal(*(torch.autograd.grad(out, x, direction)[0] for out in (got, want)))


def names(tensor: Tensor) -> str:
    """The functions that a tensor came from."""
    found, node = [], tensor.grad_fn
    while node is not None:
        found.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(found)


def test_no_tokens():
    spec = TOKENS[0]
    codes, scale, zero_point = quantize_input(torch.empty(0, 7), None, None, spec)
    assert (codes.shape, scale.shape, zero_point.shape) == ((0, 7), (0,), (0,))
