from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quant.fake_quant import FakeQuantize
from lightning_quant.functional import fake_quantize, lsq_fake_quantize
from lightning_quant.kernels.kept import Kept
from lightning_quant.methods import METHODS
from lightning_quant.numerics import calc_qparams, qparams_shape, to_groups
from lightning_quant.spec import QuantSpec
from tests.helpers import spec_id
from tests.kernels.triton import only_interpreted

only_interpreted()

SIZES = (("tensor", None), ("channel", None), ("group", 8), ("group", 12), ("group", 64))
FORMATS = [(bits, signed, even) for bits in (2, 8) for signed in (True, False) for even in (True, False)]
SPECS = [QuantSpec(*form[:1], "int", *form[1:], kind, size) for form in FORMATS for kind, size in SIZES]
by_spec = pytest.mark.parametrize("spec", SPECS, ids=spec_id)


def qparams(x: Tensor, spec: QuantSpec, axis: int) -> tuple[Tensor, Tensor]:
    """Of a range that clips some of `x`."""
    rows = to_groups(x.float(), spec, axis)
    scale, zero_point = calc_qparams(rows.amin(1) * 0.6, rows.amax(1) * 0.6, spec)
    shape = qparams_shape(x.shape, spec, axis)
    return scale.reshape(shape), zero_point.reshape(shape)


def both(function: Any, tensors: tuple[Tensor, ...], args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Output and gradients, in plain operators and fused."""
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("LQ_BACKEND", backend)
        leaves = [value.detach().clone(memory_format=torch.preserve_format) for value in tensors]
        for leaf in leaves:
            leaf.requires_grad_(leaf is leaves[0] or function is lsq_fake_quantize)
        out = function(*leaves, *args)
        assert ("FusedFakeQuantize" in out.grad_fn.name()) == (backend == "triton")
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape).to(out.dtype))
        results.append([out, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return results


@pytest.mark.parametrize("function", [fake_quantize, lsq_fake_quantize])
def test_what_is_used_again_is_quantized_once(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQ_BACKEND", "triton")
    spec, kept = QuantSpec(4), Kept()
    x = torch.randn(7, 29, requires_grad=True)
    scale, zero_point = qparams(x.detach(), spec, 0)
    uses = []
    for _ in range(4):
        with kept.used(x, scale, zero_point):
            uses.append(function(x, scale, zero_point, spec, 0))
    assert len({out.data_ptr() for out in uses}) == 2  # the first, and from the second on another
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in uses]
    assert all(torch.equal(out, uses[0]) for out in uses)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    with torch.no_grad():
        x.mul_(2)
    with kept.used(x, scale, zero_point):
        assert not torch.equal(function(x, scale, zero_point, spec, 0), uses[0])


@by_spec
def test_ste(spec, monkeypatch):
    for shape, axis, dtype in (((7, 29), 0, torch.float32), ((3, 5, 2), 1, torch.bfloat16), ((33,), 0, torch.float16)):
        x = torch.randn(shape).to(dtype)
        want, got = both(fake_quantize, (x, *(value.detach() for value in qparams(x, spec, axis))), (spec, axis), monkeypatch)
        assert got[0].dtype == dtype
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert len(got) == 2  # a scale learns nothing here


@by_spec
def test_lsq(spec, monkeypatch):
    for shape, axis, elements in (((7, 29), 0, None), ((3, 5, 2), -1, 11)):
        x = torch.randn(shape)
        scale, zero_point = qparams(x, spec, axis)
        learned = zero_point + 0.3 if not spec.symmetric else zero_point.float()
        want, got = both(lsq_fake_quantize, (x, scale, learned), (spec, axis, elements), monkeypatch)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert len(got) == len(want) == 4
        for one, two in zip(got[2:], want[2:]):
            assert two.abs().sum() > 0
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_long_row_is_cut_in_chunks(monkeypatch):
    for spec in (QuantSpec(4, granularity="tensor"), QuantSpec(4), QuantSpec(4, granularity="group", group_size=3000)):
        x = torch.randn(2, 5000)
        scale, zero_point = qparams(x, spec, 0)
        want, got = both(lsq_fake_quantize, (x, scale, zero_point.float()), (spec,), monkeypatch)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[2:], want[2:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_strides_stay(granularity, monkeypatch):
    spec = QuantSpec(4, granularity=granularity)
    x = torch.randn(2, 6, 3, 3).to(memory_format=torch.channels_last)
    want, got = both(fake_quantize, (x, *qparams(x, spec, 0)), (spec,), monkeypatch)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    if granularity == "tensor":
        assert got[0].is_contiguous(memory_format=torch.channels_last)
    turned = torch.randn(9, 4).t()
    want, got = both(fake_quantize, (turned, *qparams(turned, spec, 0)), (spec,), monkeypatch)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_nothing_to_quantize(monkeypatch):
    monkeypatch.setenv("LQ_BACKEND", "triton")
    spec, x = QuantSpec(8, granularity="tensor"), torch.empty(0, 4, requires_grad=True)
    out = lsq_fake_quantize(x, torch.ones(1, requires_grad=True), torch.zeros(1), spec)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 4)


def test_nan_is_not_hidden(monkeypatch):
    monkeypatch.setenv("LQ_BACKEND", "triton")
    x, scale = torch.tensor([1.0, float("nan")]), torch.ones(1, requires_grad=True)
    out = lsq_fake_quantize(x, scale, torch.zeros(1), QuantSpec(8, granularity="tensor"))
    assert out.isnan().tolist() == [False, True]
    out.sum().backward()
    assert scale.grad.isnan().all()


@pytest.mark.parametrize("learned", [False, True])
def test_a_quantizer_trains_as_without(learned, monkeypatch):
    spec, results = QuantSpec(4, symmetric=False, granularity="group", group_size=16), []
    weight = torch.randn(6, 40)
    for backend in ("reference", "triton"):
        monkeypatch.setenv("LQ_BACKEND", backend)
        quantizer = FakeQuantize(spec, weight.shape, axis=0, rule=METHODS["lsq" if learned else "ste"].weight)
        quantizer.observe(weight)
        quantizer.observing = not learned
        quantizer.quantizing = True
        leaf = weight.clone().requires_grad_()
        (quantizer(leaf) ** 2).sum().backward()
        results.append([leaf.grad, *(value.grad for value in quantizer.parameters())])
    assert len(results[0]) == (3 if learned else 1)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_float64_and_other_grids_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("LQ_BACKEND", "triton")
    spec = QuantSpec(8, granularity="tensor")
    out = fake_quantize(
        torch.randn(4, dtype=torch.float64, requires_grad=True), torch.ones(1), torch.zeros(1, dtype=torch.int32), spec
    )
    assert "Fused" not in out.grad_fn.name()
    assert out.dtype == torch.float64
    float8 = QuantSpec(8, "float8_e4m3fn", granularity="tensor")
    assert fake_quantize(torch.tensor([1.03]), torch.ones(1), torch.zeros(1), float8).item() == 1.0
