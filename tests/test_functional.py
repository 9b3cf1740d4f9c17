from __future__ import annotations

import math

import pytest
import torch

from lightning_quant.functional import dynamic_fake_quantize, fake_quantize, lsq_fake_quantize
from lightning_quant.numerics import calc_qparams, qrange, to_groups
from lightning_quant.spec import QuantSpec
from tests.helpers import FLOAT8, own_activation, spec_id

FORMATS = [(bits, signed, symmetric) for bits in (2, 4, 8) for signed in (True, False) for symmetric in (True, False)]


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def qparams(x: torch.Tensor, spec: QuantSpec, axis: int = 0, shrink: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a range that clips some of `x`."""
    rows = to_groups(x, spec, axis)
    return calc_qparams(rows.amin(1) * shrink, rows.amax(1) * shrink, spec)


@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_ste_equals_torchs_fused_ops(bits, signed, symmetric):
    x = torch.randn(6, 5, 3)
    grad = torch.randn_like(x)
    for granularity, axis in (("tensor", 0), ("channel", 0), ("channel", 1), ("channel", -1)):
        spec = QuantSpec(bits, "int", signed, symmetric, granularity)
        scale, zero_point = qparams(x, spec, axis)
        ours, theirs = leaf(x), leaf(x)
        got = fake_quantize(ours, scale, zero_point, spec, axis)
        if granularity == "tensor":
            want = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, *qrange(spec))
        else:
            want = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point, axis % 3, *qrange(spec))
        got.backward(grad)
        want.backward(grad)
        assert torch.equal(got, want)
        assert torch.equal(ours.grad, theirs.grad)
        assert (ours.grad == 0).any()


def test_ste_by_groups_is_that_of_each_group():
    spec, one = QuantSpec(4, symmetric=False, granularity="group", group_size=16), QuantSpec(4, symmetric=False)
    x = torch.randn(3, 50)
    scale, zero_point = qparams(x, spec)
    ours = leaf(x)
    got = fake_quantize(ours, scale, zero_point, spec)
    got.sum().backward()
    scale, zero_point = scale.view(3, 4), zero_point.view(3, 4)
    for group, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50))):
        theirs = leaf(x[:, part])
        want = fake_quantize(theirs, scale[:, group], zero_point[:, group].contiguous(), one)
        want.sum().backward()
        assert torch.equal(got[:, part], want)
        assert torch.equal(ours.grad[:, part], theirs.grad)


@pytest.mark.parametrize(
    "spec", [QuantSpec(8, dtype) for dtype in FLOAT8] + [QuantSpec(4, "nf4", granularity="group", group_size=16)]
)
def test_ste_of_what_is_not_an_integer(spec):
    x = torch.randn(3, 50)
    scale, zero_point = qparams(x, spec)
    ours = leaf(x)
    fake_quantize(ours, scale, zero_point, spec).sum().backward()
    bound = scale.reshape(-1, 1) * {"nf4": 1.0, **{key: value[1] for key, value in FLOAT8.items()}}[spec.dtype]
    rows = to_groups(x, spec)
    inside = (rows.abs() <= bound).flatten()[: x.numel()].view_as(x).float()
    assert 0 < inside.mean() < 1
    assert torch.equal(ours.grad, inside)


@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_lsq_equals_torchs_learnable_ops(bits, signed, symmetric):
    x = torch.randn(6, 35) - 0.5
    grad = torch.randn_like(x)
    for granularity in ("tensor", "channel"):
        spec = QuantSpec(bits, "int", signed, symmetric, granularity)
        qmin, qmax = qrange(spec)
        scale, zero_point = qparams(x, spec)
        assert granularity == "channel" or zero_point.item() >= 0  # torch's per-tensor backward truncates negative ones
        ours, theirs = ([leaf(x), leaf(scale), leaf(zero_point.float())] for _ in range(2))
        got = lsq_fake_quantize(*ours, spec)
        factor = 1 / math.sqrt((x.numel() if granularity == "tensor" else 35) * qmax)
        if granularity == "tensor":
            want = torch._fake_quantize_learnable_per_tensor_affine(*theirs, qmin, qmax, factor)
        else:
            want = torch._fake_quantize_learnable_per_channel_affine(*theirs, 0, qmin, qmax, factor)
        got.backward(grad)
        want.backward(grad)
        assert torch.equal(got, want)
        for one, two in zip(ours, theirs):
            assert one.grad.abs().sum() > 0
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_lsq_by_groups_is_per_channel_on_reshaped_data(symmetric):
    spec, one = QuantSpec(4, symmetric=symmetric, granularity="group", group_size=8), QuantSpec(4, symmetric=symmetric)
    x = torch.randn(3, 32)
    scale, zero_point = qparams(x, spec)
    ours = [leaf(x), leaf(scale.view(3, 4)), leaf(zero_point.float().view(3, 4))]
    theirs = [leaf(x.view(12, 8)), leaf(scale), leaf(zero_point.float())]
    got, want = lsq_fake_quantize(*ours, spec), lsq_fake_quantize(*theirs, one)
    weights = torch.randn(3, 32)
    (got * weights).sum().backward()
    (want * weights.view(12, 8)).sum().backward()
    assert torch.equal(got, want.view(3, 32))
    for left, right in zip(ours, theirs):
        torch.testing.assert_close(left.grad, right.grad.view_as(left))


def test_lsq_counts_the_elements_that_it_is_told():
    spec = QuantSpec(4, granularity="tensor")
    x, zero_point = torch.randn(8, 16), torch.zeros(1)
    grads = []
    for elements in (None, 16):
        scale = leaf(torch.tensor([0.3]))
        lsq_fake_quantize(x, scale, zero_point, spec, elements=elements).sum().backward()
        grads.append(scale.grad)
    torch.testing.assert_close(grads[0] * math.sqrt(8), grads[1])


def test_lsq_is_for_integers():
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*'ste'"):
        lsq_fake_quantize(torch.randn(2), torch.ones(1), torch.zeros(1), QuantSpec(8, "float8_e4m3fn", granularity="tensor"))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(8, granularity="token", dynamic=True),
        QuantSpec(4, symmetric=False, granularity="token", dynamic=True),
        QuantSpec(8, granularity="tensor", dynamic=True),
        QuantSpec(8, "float8_e4m3fn", granularity="token", dynamic=True),
    ],
    ids=spec_id,
)
@pytest.mark.parametrize("axis", [-1, -2])
def test_dynamic(spec, axis):
    x = leaf(torch.randn(4, 3, 17) * torch.tensor([1.0, 100.0, 1e-4])[:, None])
    grad = torch.randn_like(x)
    out = dynamic_fake_quantize(x, spec, axis)
    out.backward(grad)
    torch.testing.assert_close(out.double(), own_activation(x, spec, None, None, axis), rtol=1e-6, atol=0)
    assert torch.equal(x.grad, grad)
    assert dynamic_fake_quantize(torch.empty(0, 3), spec).shape == (0, 3)
