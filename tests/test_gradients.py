"""Gradients against the papers' formulas, written anew in float64 for autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quant.gradients import binary_fake_quantize, pact_fake_quantize, refit_scale, tanh_weight, ternary_fake_quantize
from lightning_quant.methods import METHODS, ewgs_fake_quantize, offset_fake_quantize
from lightning_quant.numerics import calc_qparams, qrange, to_groups
from lightning_quant.spec import QuantSpec
from tests.helpers import spec_id

SPECS = [
    QuantSpec(4, granularity="tensor"),
    QuantSpec(3),
    QuantSpec(2, granularity="group", group_size=12),
    QuantSpec(8, signed=False, symmetric=False, granularity="tensor"),
    QuantSpec(4, symmetric=False),
    QuantSpec(2, symmetric=False, granularity="tensor"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=spec_id)


class Round(torch.autograd.Function):
    """Rounding; its gradient g becomes g * (1 + delta * sign(g) * (x - round(x)))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: float = 0.0) -> Tensor:
        ctx.save_for_backward(x)
        ctx.delta = delta
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (1 + ctx.delta * grad.sign() * (x - x.round())), None


def case(spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and the qparams of ranges that clip some of them."""
    x = torch.randn(6, 32) + 0.3
    rows = to_groups(x, spec)
    return x, *calc_qparams(rows.amin(1) * 0.6, rows.amax(1) * 0.6, spec)


def leaf(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return value.detach().to(dtype).clone().requires_grad_()


def run(fake: Callable[..., Tensor], spec: QuantSpec, *values: Tensor, double: bool = False) -> list[Tensor]:
    """What a function gives in rows, and its gradients by all that it is given, for a random gradient that is always the same."""
    leaves = [leaf(value, torch.float64 if double else torch.float32) for value in values]
    out = fake(*leaves, spec)
    rows = out if double else to_groups(out, spec)
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows.dtype)
    rows.backward(grad)
    for value in leaves:
        if value.grad is None:
            value.grad = torch.zeros_like(value)
    return [rows, *(value.grad for value in leaves)]


def assert_close(got: list[Tensor], want: list[Tensor], factors: list[float]) -> None:
    for one, two, factor in zip(got, want, [1.0, 1.0, *factors], strict=True):
        torch.testing.assert_close(one.double(), two * factor, rtol=5e-4, atol=2e-5)


def lsq(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, delta: float = 0.0, codes: Any = None) -> Tensor:
    """LSQ: a code beyond the ends is the end, times the scale, without gradient by x."""
    low, high = codes or qrange(spec)
    offset = Round.apply(zero_point)[:, None]
    level = Round.apply(to_groups(x, spec) / scale[:, None], delta) + offset
    return (torch.where((level < low) | (level > high), level.detach().clamp(low, high), level) - offset) * scale[:, None]


def factor(x: Tensor, spec: QuantSpec, high: int | None = None) -> float:
    return 1 / math.sqrt(to_groups(x, spec).shape[1] * (high or qrange(spec)[1]))


@every_spec
@pytest.mark.parametrize("delta", [0.0, 0.2, 1.5])
def test_ewgs(spec: QuantSpec, delta: float) -> None:
    x, scale, zero_point = case(spec)
    got = run(lambda *args: ewgs_fake_quantize(*args, delta=delta), spec, x, scale, zero_point)
    want = run(lambda *args: lsq(*args, delta=delta), spec, x, scale, zero_point, double=True)
    plain = run(METHODS["lsq"].weight.fake, spec, x, scale, zero_point)
    assert_close(got[:2], want[:2], [])
    assert torch.equal(got[1], plain[1]) == (delta == 0)
    for index in (0, 2, 3):  # the scale and the zero point learn as in LSQ
        assert torch.equal(got[index], plain[index])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.symmetric], ids=spec_id)
def test_a_learned_offset_moves_as_if_it_were_the_parameter(spec: QuantSpec) -> None:
    x, scale, zero_point = case(spec)

    def formula(x: Tensor, scale: Tensor, beta: Tensor, spec: QuantSpec) -> Tensor:
        return lsq(x, scale, -beta / scale, spec)

    got = run(offset_fake_quantize, spec, x, scale, zero_point)
    want = run(formula, spec, x, scale, -zero_point * scale.double(), double=True)
    assert_close(got[:3], want[:3], [factor(x, spec)])
    rate = 1e-9
    scale, zero_point = scale.double(), zero_point.double()
    before, after = -zero_point * scale, -(zero_point - rate * got[3].double()) * (scale - rate * got[2].double())
    moved, asked = (after - before) / -rate, want[3] * factor(x, spec)
    assert asked.abs().max() > 0
    torch.testing.assert_close(moved, asked, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.granularity == "tensor"], ids=spec_id)
@pytest.mark.parametrize("side", ["positive", "negative", "both"])
def test_pact(spec: QuantSpec, side: str) -> None:
    x = torch.randn(6, 32)
    x = x if side == "both" or spec.symmetric else x.abs() if side == "positive" else -x.abs()
    scale, zero_point = calc_qparams(x.min()[None].clamp(max=0) * 0.6, x.max()[None].clamp(min=0) * 0.6, spec)
    qmin, qmax = qrange(spec)
    below, above = qmin - zero_point.item(), qmax - zero_point.item()
    largest = max(above, -below)

    def formula(x: Tensor, alpha: Tensor, spec: QuantSpec) -> Tensor:
        step = (alpha / largest).detach()
        clipped = torch.minimum(torch.maximum(x, alpha * below / largest), alpha * above / largest)
        return (clipped + ((clipped / step).round() * step - clipped).detach()).reshape(1, -1)

    got = run(lambda x, scale, spec: pact_fake_quantize(x, scale, zero_point, spec), spec, x, scale)
    want = run(formula, spec, x, scale.double() * largest, double=True)
    assert 0 < (want[1] == 0).double().mean() < 1
    assert_close(got, want, [1 / largest])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ternary(granularity: Any) -> None:
    spec = QuantSpec(2, granularity=granularity)
    x, scale, _ = case(spec)
    got = run(ternary_fake_quantize, spec, x, scale)
    want = run(lambda x, s, spec: lsq(x, s, torch.zeros_like(s), spec, codes=(-1, 1)), spec, x, scale, double=True)
    assert_close(got, want, [factor(x, spec, 1)])
    assert set((got[0] / got[0].abs().amax(1, keepdim=True)).round().unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_binary(granularity: Any) -> None:
    spec = QuantSpec(2, granularity=granularity)
    x, scale, _ = case(spec)

    def formula(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
        rows, step = to_groups(x, spec), scale.reshape(-1, 1)
        straight = rows.clamp(-step.detach(), step.detach())  # its gradient is 1 within a scale
        sign = torch.where(rows.detach() < 0, -1.0, 1.0)
        return sign * step + straight - straight.detach()

    got = run(binary_fake_quantize, spec, x, scale)
    assert_close(got, run(formula, spec, x, scale, double=True), [factor(x, spec, 1)])
    assert 0 < (got[1] == 0).double().mean() < 1
    assert (got[0].abs() == to_groups(got[0], spec).abs().amax(1, keepdim=True)).all() or granularity == "tensor"
    with pytest.raises(ValueError, match="more than 2 bits"):
        binary_fake_quantize(x, scale, QuantSpec(4, granularity=granularity))


@pytest.mark.parametrize("size", [0.01, 1.0, 5.0])
def test_tanh_weights(size: float) -> None:
    x = torch.randn(6, 32) * size

    def formula(x: Tensor, spec: None) -> Tensor:
        return x.tanh() * (x.abs().max() / x.tanh().abs().max()).detach()

    mine, theirs = leaf(x), leaf(x, torch.float64)
    got, want = tanh_weight(mine), formula(theirs, None)
    grad = torch.randn_like(x)
    got.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert got.abs().max().item() == pytest.approx(x.abs().max().item())
    assert tanh_weight(torch.empty(0, 3)).shape == (0, 3)
    assert tanh_weight(torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_refitted_scale_has_less_error() -> None:
    x = torch.randn(5, 400)

    def error(scale: Tensor) -> Tensor:
        return ((x / scale[:, None]).round().clamp(-1, 1) * scale[:, None] - x).square().sum(1)

    start = x.abs().amax(1)
    scale = refit_scale(x, start, (-1, 0, 1))
    assert (error(scale) < 0.5 * error(start)).all()
    around = torch.stack([error(scale * factor) for factor in torch.linspace(0.5, 2, 31).tolist()])
    assert (error(scale) <= around.min(0).values * 1.02).all()
    assert refit_scale(torch.zeros(1, 4), torch.ones(1), (-1, 0, 1)).item() == 1
    torch.testing.assert_close(refit_scale(x, start, (-1, 1)), x.abs().mean(1))
    counts = torch.ones_like(x)
    counts[:, 300:] = 0  # which only fill a group up
    torch.testing.assert_close(refit_scale(x * counts, start, (-1, 1), counts=counts), x[:, :300].abs().mean(1))
