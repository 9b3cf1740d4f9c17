from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_quant.grids import minmax_qparams, nearest, output_error, refine_scale, search_qparams
from lightning_quant.spec import QuantSpec

SPECS = [
    QuantSpec(4),
    QuantSpec(3, symmetric=False),
    QuantSpec(2, signed=False, symmetric=False, granularity="group", group_size=32),
    QuantSpec(3, granularity="group", group_size=24),  # ragged
]


def heavy(channels: int, columns: int) -> Tensor:
    """Weights with outliers, where clipping pays."""
    return torch.randn(channels, columns) ** 3


def hessian(columns: int) -> Tensor:
    x = torch.randn(300, columns) @ torch.randn(columns, columns)
    return x.T @ x


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label.replace(" ", "-"))
def test_a_search_never_ends_worse_than_the_whole_range(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight, products = heavy(16, 100), hessian(100)
    blocks = torch.zeros_like(products)
    size = spec.group_size or 100
    for start in range(0, 100, size):
        part = slice(start, start + size)
        blocks[part, part] = products[part, part]
    errors = [output_error(weight, nearest(weight, *qparams, spec), blocks) for qparams in (
        minmax_qparams(weight, spec), search_qparams(weight, products, spec)
    )]  # fmt: skip
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label.replace(" ", "-"))
def test_refined_scales_are_the_least_squares_solution(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight, products = torch.randn(6, 100), hessian(100)
    scale, zero_point = minmax_qparams(weight, spec)
    rounded = nearest(weight, scale, zero_point, spec)
    refined = refine_scale(weight, products, scale, zero_point, rounded, spec)
    size = spec.group_size or 100
    spread = scale.repeat_interleave(size, 1)[:, :100]
    levels = (rounded / spread).round()
    again = levels * refined.repeat_interleave(size, 1)[:, :100]
    assert (output_error(weight, again, products) <= output_error(weight, rounded, products)).all()
    root = torch.linalg.cholesky(products.double() + 1e-6 * torch.eye(100, dtype=torch.float64))
    for channel in range(6):  # min |(w - L s) R|^2 over the scales s, solved by torch itself
        member = torch.nn.functional.one_hot(torch.arange(100) // size, scale.shape[1]).double()
        design = root.T @ (levels[channel].double()[:, None] * member)
        solved = torch.linalg.lstsq(design, (root.T @ weight[channel].double())[:, None]).solution[:, 0]
        usable = (solved > 0.5 * scale[channel]) & (solved < 2 * scale[channel])
        assert torch.allclose(refined[channel][usable].double(), solved[usable], rtol=0.02)


def test_a_channel_of_zeros_keeps_its_scale() -> None:
    weight, spec = torch.zeros(2, 8), QuantSpec(4)
    scale, zero_point = minmax_qparams(weight, spec)
    assert torch.equal(refine_scale(weight, torch.eye(8), scale, zero_point, weight, spec), scale)
    assert torch.isfinite(search_qparams(weight, torch.eye(8), spec)[0]).all()
