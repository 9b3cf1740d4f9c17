from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_quant.kernels import reference
from lightning_quant.kernels.triton.configs import pick
from lightning_quant.numerics import calc_qparams
from lightning_quant.spec import QuantSpec
from tests.helpers import assert_close, spec_id
from tests.kernels.triton import only_interpreted
from tests.kernels.triton.cases import TOLERANCE, packed_weight

only_interpreted()
from lightning_quant.kernels.triton import int8  # noqa: E402

WEIGHTS = [
    QuantSpec(8),
    QuantSpec(8, granularity="tensor"),
    QuantSpec(8, symmetric=False),
    QuantSpec(8, signed=False),
    QuantSpec(8, symmetric=False, granularity="group", group_size=64),
    QuantSpec(5, symmetric=False, granularity="tensor"),
    QuantSpec(4),
    QuantSpec(4, granularity="group", group_size=128),
    QuantSpec(4, symmetric=False, granularity="group", group_size=32),
    QuantSpec(3, symmetric=False),
    QuantSpec(2),
]
INPUTS = [
    QuantSpec(8, granularity="token", dynamic=True),
    QuantSpec(8, symmetric=False, granularity="token", dynamic=True),
    QuantSpec(4, signed=False, symmetric=False, granularity="token", dynamic=True),
    QuantSpec(8, granularity="tensor"),
    QuantSpec(8, symmetric=False, granularity="tensor"),
    QuantSpec(8, signed=False, symmetric=False, granularity="tensor"),
    QuantSpec(8, granularity="tensor", dynamic=True),
]
by_weight = pytest.mark.parametrize("weight_spec", WEIGHTS, ids=spec_id)
by_input = pytest.mark.parametrize("input_spec", INPUTS, ids=spec_id)


def check(weight_spec: QuantSpec, input_spec: QuantSpec, x: Tensor, channels: int = 37) -> None:
    columns = x.shape[-1]
    assert int8.supports_int8(weight_spec, input_spec, columns)
    weight, bias = packed_weight(weight_spec, channels, columns), torch.randn(channels).requires_grad_()
    given = (None, None)
    if not input_spec.dynamic:
        given = calc_qparams(x.min().float().reshape(1) * 0.7, x.max().float().reshape(1) * 0.7, input_spec)
    x = x.detach().requires_grad_()
    matrix = reference.dequantize_weight(*weight, (channels, columns), 0, weight_spec).double()
    on_grid = reference.quantize_input(x.float(), *given, input_spec)
    want = torch.nn.functional.linear(on_grid.double(), matrix, bias.double())
    got = int8.Int8Linear.apply(x, *weight, bias, *given, columns, weight_spec, input_spec)
    assert got.dtype == x.dtype
    assert_close(got, want, TOLERANCE[x.dtype])
    direction = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, bias), direction)
    assert_close(grads, torch.autograd.grad(want, (x, bias), direction.double()), TOLERANCE[x.dtype])


@pytest.mark.parametrize("input_spec", [INPUTS[0], INPUTS[5]], ids=spec_id)
@by_weight
def test_product_and_gradients(weight_spec, input_spec):
    check(weight_spec, input_spec, torch.randn(3, 150) + 0.3)


@by_weight
def test_many_rows(weight_spec):
    check(weight_spec, INPUTS[1], torch.randn(65, 40) + 0.3, 9)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@by_input
def test_dtypes(input_spec, dtype):
    check(WEIGHTS[7], input_spec, torch.randn(5, 256).to(dtype))


@pytest.mark.parametrize("rows", [1, 16, 17, 65, 300])
def test_numbers_of_rows(rows):
    check(WEIGHTS[0], INPUTS[1] if rows < 300 else INPUTS[4], torch.randn(rows, 97), 5)


@pytest.mark.parametrize("input_spec", [INPUTS[0], INPUTS[4]], ids=spec_id)
def test_inputs_that_are_not_contiguous(input_spec):
    check(WEIGHTS[0], input_spec, torch.randn(96, 5).t())
    check(WEIGHTS[0], input_spec, torch.randn(2, 4, 100)[:, ::2, 3:99])


def test_no_rows():
    weight = packed_weight(WEIGHTS[0], 5, 64)
    args = (None, None, None, 64, WEIGHTS[0], INPUTS[0])
    assert int8.Int8Linear.apply(torch.empty(0, 64), *weight, *args).shape == (0, 5)


@by_weight
def test_few_rows_are_split(weight_spec):
    assert pick("int8", 4, 500).split_k > 1
    check(weight_spec, INPUTS[1], torch.randn(4, 500), 70)


def test_a_product_of_integers_is_exact():
    # 300 * 127 * 127 is below 2^24: float64 and the kernel agree to the bit
    weight_spec, input_spec = QuantSpec(8, granularity="tensor"), INPUTS[3]
    words, _, _ = packed_weight(weight_spec, 20, 300)
    one = torch.ones(1)
    x = torch.randint(-128, 128, (20, 300)).float()
    matrix = reference.dequantize_weight(words, one, None, (20, 300), 0, weight_spec)
    zero = torch.zeros(1, dtype=torch.int32)
    got = int8.Int8Linear.apply(x, words, one, None, None, one, zero, 300, weight_spec, input_spec)
    assert torch.equal(got.double(), x.double() @ matrix.double().t())


@pytest.mark.parametrize(
    ("weight_spec", "input_spec", "columns"),
    [
        (QuantSpec(4, granularity="group", group_size=48), INPUTS[0], 96),
        (QuantSpec(8), None, 96),
        (QuantSpec(8), QuantSpec(8, "float8_e4m3fn", granularity="token", dynamic=True), 96),
        (QuantSpec(4, "nf4"), INPUTS[0], 96),
        (QuantSpec(8), INPUTS[0], 70000),
    ],
)
def test_what_is_no_product_of_integers(weight_spec, input_spec, columns):
    assert not int8.supports_int8(weight_spec, input_spec, columns)
